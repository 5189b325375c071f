"""The operators as PyTorch sees them: schema, fakes, torch.compile, AITER's call."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import mla_compile
from tests.cases import Case, Problem, assert_right, build, outputs
from tests.naive import naive_decode

OPS = torch.ops.mla_compile
DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]
SAMPLES = [
    Case("csr"),
    Case("block table", paging="table", num_kv_splits=2),
    Case("dense and masked", paging="dense", mask="length", mask_fill=-1e9),
    Case("ragged query tokens", queries=(2, 1, 3, 1), logit_cap=5.0),
    Case("fp8 cache", cache_dtype=torch.float8_e4m3fn, scaled=True),
]


def aiter_arguments(problem: Problem) -> dict[str, Any]:
    """A CSR problem as AITER takes it: q, kv_buffer, o, and the index tensors."""
    q_nope, q_pe, kv_c, k_pe, sm_scale = problem.args
    q, kv_buffer = torch.cat([q_nope, q_pe], -1), torch.cat([kv_c, k_pe], -1).unsqueeze(2)
    o = torch.full_like(q_nope, math.nan, memory_format=torch.contiguous_format)
    options = problem.options
    B = len(options["kv_last_page_lens"])
    qo_indptr = options.get("qo_indptr", torch.arange(B + 1, dtype=torch.int32, device=q.device))
    names = ("kv_indptr", "kv_indices", "kv_last_page_lens", "max_seqlen_q")
    call = {"q": q, "kv_buffer": kv_buffer, "o": o, "qo_indptr": qo_indptr}
    return call | {name: options[name] for name in names} | {"sm_scale": sm_scale}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck_functional(case: Case, device: str) -> None:
    problem = build(case).to(device)
    modes = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if case.cache_dtype is None:  # opcheck compares by a multiplication that fp8 lacks
        modes.append("test_schema")
    torch.library.opcheck(OPS.mla_decode.default, problem.args, problem.options, test_utils=modes)


@pytest.mark.parametrize("device", DEVICES)
def test_nobody_sees_an_empty_cache(device: str) -> None:
    q, cache = torch.randn(6, 16, 48, device=device), torch.randn(3, 0, 48, device=device)
    mask = torch.ones(3, 1, 2, 0, dtype=torch.bool, device=device)
    args = q[..., :32], q[..., 32:], cache[..., :32], cache[..., 32:], 0.1
    out, lse = mla_compile.mla_decode(*args, max_seqlen_q=2, attn_mask=mask)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_fill_below_all_floats_is_a_low_one(device: str) -> None:
    problem = build(Case("low", paging="dense", mask="nothing", mask_fill=-1e9)).to(device)
    average = mla_compile.mla_decode(*problem.args, **problem.options)
    low = mla_compile.mla_decode(*problem.args, **problem.options | {"mask_fill": -1e300})
    torch.testing.assert_close(low[0], average[0])


def test_a_mask_means_the_same_under_any_default_dtype() -> None:
    problem = build(Case("default", paging="dense", mask="nothing", mask_fill=-1e9))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        out, lse = mla_compile.mla_decode(*problem.args, **problem.options)
    finally:
        torch.set_default_dtype(before)
    assert_right(problem, out, lse)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_changes_nothing(device: str) -> None:
    problem = build(Case("autocast", dtype=torch.float32)).to(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out, lse = mla_compile.mla_decode(*problem.args, **problem.options)
    assert_right(problem, out, lse)


def test_an_empty_cache_has_no_lengths() -> None:
    q, cache = torch.randn(3, 16, 48), torch.randn(3, 0, 48)
    args = q[..., :32], q[..., 32:], cache[..., :32], cache[..., 32:], 0.1
    with pytest.raises(ValueError, match="seq_lens"):
        mla_compile.mla_decode(*args, seq_lens=torch.tensor([0, 1, 0]))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", SAMPLES[:3], ids=str)
def test_opcheck_out(case: Case, device: str) -> None:
    problem = build(case).to(device)
    out, lse = (t.zero_() for t in outputs(problem, device))
    options = {**problem.options, "out": out, "lse": lse}
    torch.library.opcheck(OPS.mla_decode_out.default, problem.args, options)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_aiter(device: str) -> None:
    call = aiter_arguments(build(SAMPLES[3]).to(device))
    call["o"].zero_()
    torch.library.opcheck(OPS.mla_decode_fwd.default, tuple(call.values()))


@pytest.mark.parametrize("device", DEVICES)
def test_out_form_writes_out_lse_and_leaves_the_rest(device: str) -> None:
    problem = build(SAMPLES[1]).to(device)
    before = [t.clone() for t in problem.args[:4]]
    out, lse = outputs(problem, device)
    workspace = torch.full((10**5,), math.nan, device=device)
    OPS.mla_decode_out(*problem.args, **problem.options, out=out, lse=lse, workspace=workspace)
    assert_right(problem, out, lse)
    for tensor, copy in zip(problem.args, before, strict=False):
        torch.testing.assert_close(tensor, copy, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_without_a_graph_break(dynamic: bool, device: str) -> None:
    torch._dynamo.reset()

    def step(q: Tensor, cache: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = mla_compile.mla_decode(
            q[..., :32], q[..., 32:], cache[..., :32], cache[..., 32:], 0.1, seq_lens=seq_lens
        )
        return out * 2, lse

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for B, S in ((2, 40), (5, 64), (3, 7)) if dynamic else ((2, 40),):
            q = torch.randn(B, 4, 48, device=device)
            cache = torch.randn(B, S, 48, device=device)
            seq_lens = torch.full((B,), S - 1, device=device)
            torch.testing.assert_close(compiled(q, cache, seq_lens), step(q, cache, seq_lens))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_the_aiter_call(device: str) -> None:
    torch._dynamo.reset()
    problem = build(SAMPLES[3]).to(device)
    call = aiter_arguments(problem)
    compiled = torch.compile(mla_compile.mla_decode_fwd, fullgraph=True)
    o, lse = compiled(**call, logit_cap=5.0, causal=True, return_lse=True)
    assert o.data_ptr() == call["o"].data_ptr() and lse is not None
    assert_right(problem, call["o"], lse)


def test_fakes_know_shapes_and_dtypes_only() -> None:
    problem = build(SAMPLES[4]).to("cpu")
    args = [a.to("meta") if isinstance(a, Tensor) else a for a in problem.args]
    options = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in problem.options.items()}
    out, lse = OPS.mla_decode(*args, **options)
    assert out.shape == args[0].shape and out.dtype == torch.bfloat16
    assert lse.shape == args[0].shape[:2] and lse.dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
def test_aiter_call_writes_o_and_returns_it(device: str) -> None:
    problem = build(Case("aiter", page_size=1, queries=(2, 1, 3, 1))).to(device)
    call = aiter_arguments(problem)
    o, lse = mla_compile.mla_decode_fwd(*call.values(), return_lse=True)
    assert o is call["o"] and lse is not None
    assert_right(problem, o, lse)
    assert mla_compile.mla_decode_fwd(**call)[1] is None


def test_aiter_call_scales_by_the_query_width_unless_told() -> None:
    problem = build(Case("scale", dtype=torch.float32))
    call = aiter_arguments(problem)
    assert call.pop("sm_scale") == call["q"].shape[-1] ** -0.5  # what `build` passes
    default, _ = mla_compile.mla_decode_fwd(**call)
    assert_right(problem, default, problem.truth[1].float())


def test_aiter_call_takes_the_newer_keywords() -> None:
    problem = build(Case("keywords", scaled=True, queries=(2, 1, 1, 1)))
    o, lse = mla_compile.mla_decode_fwd(
        **aiter_arguments(problem),
        page_size=16,
        nhead_kv=1,
        q_scale=problem.options["q_scale"],
        kv_scale=problem.options["k_scale"],
        num_kv_splits=2,
        causal=True,
        return_lse=True,
    )
    assert lse is not None
    assert_right(problem, o, lse)


@pytest.mark.parametrize("device", DEVICES)
def test_the_tutorial(device: str) -> None:
    """Batch 128, 4096 tokens, 128 heads, pages of one token; on CPU 4 sequences of a small pool."""
    B, S, pool = (128, 4096, 2097152) if device == "cuda" else (4, 4096, 32768)
    q = torch.randn(B, 128, 576, dtype=torch.bfloat16, device=device)
    kv_buffer = torch.randn(pool, 1, 1, 576, dtype=torch.bfloat16, device=device)
    o = torch.empty(B, 128, 512, dtype=torch.bfloat16, device=device).fill_(-1)
    qo_indptr = torch.arange(B + 1, dtype=torch.int, device=device)
    kv_indptr = qo_indptr * S
    kv_indices = torch.randint(0, pool, (B * S,), dtype=torch.int, device=device)
    kv_last_page_lens = torch.ones(B, dtype=torch.int, device=device)
    mla_compile.mla_decode_fwd(
        q, kv_buffer, o, qo_indptr, kv_indptr, kv_indices, kv_last_page_lens, 1, sm_scale=128**-0.5
    )
    for b in (0, B - 1):
        keys = kv_buffer[kv_indices[b * S : (b + 1) * S].long(), 0, 0]

        def naive(dtype: torch.dtype, q: Tensor = q[b], keys: Tensor = keys) -> Tensor:
            prob = (q.to(dtype) @ keys.to(dtype).T * 128**-0.5).softmax(-1)
            return torch.mm(prob, keys[:, :512].to(dtype)).double()

        truth = naive(torch.float64)
        error = (o[b].double() - truth).abs().max()
        assert error <= 2 * (naive(torch.bfloat16) - truth).abs().max()


def test_importing_is_quick_and_imports_no_compiler() -> None:
    program = """
import sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import mla_compile
seconds = time.perf_counter() - start
heavy = {"triton", "torch._inductor", "torch._dynamo", "transformers"}
print(seconds, torch.cuda.is_initialized(), sorted(heavy & (sys.modules.keys() - before)))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    )
    seconds, initialised, imported = done.stdout.split(maxsplit=2)
    assert float(seconds) < 0.3
    assert initialised == "False"
    assert imported.strip() == "[]"


def test_public_names() -> None:
    eager = {"mla_decode", "mla_decode_fwd", "debug_checks", "__version__"}
    assert eager <= vars(mla_compile).keys()
    assert eager <= set(mla_compile.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mla_compile.nothing  # noqa: B018


@pytest.mark.gpu
def test_a_call_waits_for_nothing() -> None:
    problem = build(Case("sync", num_kv_splits=None)).to("cuda")
    mla_compile.mla_decode(*problem.args, **problem.options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, lse = mla_compile.mla_decode(*problem.args, **problem.options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_right(problem, out, lse)


@pytest.mark.gpu
def test_a_captured_call_follows_what_its_tensors_hold() -> None:
    problem = build(Case("graph", paging="table")).to("cuda")
    mla_compile.mla_decode(*problem.args, **problem.options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = mla_compile.mla_decode(*problem.args, **problem.options)
    graph.replay()
    assert_right(problem, out, lse)
    problem.options["seq_lens"].copy_(torch.tensor([12, 1, 20, 0]))
    graph.replay()
    expected = mla_compile.mla_decode(*problem.args, **problem.options)
    torch.testing.assert_close((out, lse), expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_offsets_past_32_bits() -> None:
    """A cache of more than 2^31 elements, with the sequence at its very end."""
    pages = 2**31 // (64 * 576) + 2
    cache = torch.empty(pages, 64, 576, dtype=torch.bfloat16, device="cuda")
    cache[-1].normal_()
    q = torch.randn(1, 16, 576, dtype=torch.bfloat16, device="cuda")
    table = torch.tensor([[pages - 1]], dtype=torch.int32, device="cuda")
    lens = torch.tensor([64], dtype=torch.int32, device="cuda")
    args = (q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:], 0.04)
    out, lse = mla_compile.mla_decode(*args, block_table=table, seq_lens=lens)

    def naive(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return naive_decode([q.cpu().to(dtype)], [cache[-1].cpu().to(dtype)], 512, 0.04)

    problem = Problem(Case("end"), args, {}, naive(torch.float64), naive(torch.bfloat16))
    assert_right(problem, out, lse)
