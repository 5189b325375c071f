"""Bad calls: each is refused by a ValueError that names the argument and the remedy, and writes
nothing. Then the calls that only look bad."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mla_compile
from mla_compile.paged import build_block_table, build_csr
from mla_compile.validate import validate

OPS = torch.ops.mla_compile
B, N, LKV, R, PAGES, PAGE = 3, 4, 32, 16, 8, 16
DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="gpu"),
]


def good(paging: str, device: str) -> dict[str, Any]:
    """A call of mla_decode_out by keyword, which every bad call below is one step away from."""
    q, cache = torch.randn(B, N, LKV + R), torch.randn(PAGES, PAGE, LKV + R)
    indptr, indices, last = build_csr([[3, 1], [2, 7], [5]], [20, 32, 1], PAGE)
    call: dict[str, Any] = {
        "q_nope": q[..., :LKV],
        "q_pe": q[..., LKV:],
        "kv_c": cache[..., :LKV],
        "k_pe": cache[..., LKV:],
        "sm_scale": 0.1,
        "out": torch.full((B, N, LKV), 7.0),
        "lse": torch.full((B, N), 7.0),
    }
    if paging == "csr":
        call |= {"kv_indptr": indptr, "kv_indices": indices, "kv_last_page_lens": last}
    elif paging == "table":
        table = build_block_table([[3, 1], [2, 7], [5]])
        call |= {"block_table": table, "seq_lens": torch.tensor([20, 32, 1])}
    else:
        call |= {"kv_c": cache[:B, :, :LKV], "k_pe": cache[:B, :, LKV:]}
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in call.items()}


def tensor(*values: int) -> Callable[[dict[str, Any]], Tensor]:
    return lambda call: torch.tensor(values, dtype=torch.int32, device=call["kv_c"].device)


def like(name: str, edit: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], Tensor]:
    return lambda call: edit(call[name])


def made(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, Any]], Tensor]:
    return lambda call: torch.zeros(shape, dtype=dtype, device=call["kv_c"].device)


NAN, INF = math.nan, math.inf
LAYOUT: list[tuple[str, str, str, Any]] = [  # what is wrong, paging, the argument, its bad value
    *[(f"no {name}", "csr", name, None) for name in ("q_nope", "q_pe", "kv_c", "k_pe")],
    ("q_nope of rank 2", "csr", "q_nope", like("q_nope", lambda t: t[0])),
    ("q_nope of int", "csr", "q_nope", like("q_nope", lambda t: t.int())),
    ("q_nope of another dtype than the cache", "csr", "q_nope", like("q_nope", Tensor.bfloat16)),
    ("q_nope without heads", "csr", "q_nope", like("q_nope", lambda t: t[:, :0])),
    (
        "q_nope strided in its last dim",
        "csr",
        "q_nope",
        like("q_nope", lambda t: t.mT.contiguous().mT),
    ),
    ("q_nope with a token too many", "csr", "q_nope", made(B + 1, N, LKV)),
    ("q_pe of rank 4", "csr", "q_pe", like("q_pe", lambda t: t[None])),
    ("q_pe of another dtype than q_nope", "csr", "q_pe", like("q_pe", Tensor.half)),
    ("q_pe with other heads", "csr", "q_pe", like("q_pe", lambda t: t[:, 1:])),
    ("q_pe of another width than k_pe", "csr", "k_pe", like("k_pe", lambda t: t[..., 1:])),
    ("kv_c of rank 4", "csr", "kv_c", like("kv_c", lambda t: t[:, :, None])),
    ("kv_c of ints", "csr", "kv_c", like("kv_c", lambda t: t.int())),
    ("kv_c narrower than q_nope", "csr", "kv_c", like("kv_c", lambda t: t[..., 1:])),
    ("kv_c with empty pages", "csr", "kv_c", made(PAGES, 0, LKV)),
    ("kv_c strided in its last dim", "csr", "kv_c", like("kv_c", lambda t: t.mT.contiguous().mT)),
    ("k_pe paged differently", "csr", "k_pe", like("k_pe", lambda t: t[1:])),
    ("k_pe of another dtype than kv_c", "csr", "k_pe", like("k_pe", Tensor.half)),
    ("half a CSR triple", "csr", "kv_indices", None),
    ("a third of a CSR triple", "whole", "kv_indptr", tensor(0, 1, 2, 3)),
    ("both pagings", "csr", "block_table", tensor(0)),
    ("CSR and seq_lens", "csr", "seq_lens", tensor(20, 32, 1)),
    ("block_table without seq_lens", "table", "seq_lens", None),
    ("block_table of rank 1", "table", "block_table", tensor(3, 1, 2)),
    ("block_table of floats", "table", "block_table", like("block_table", Tensor.float)),
    ("seq_lens of another batch", "table", "seq_lens", tensor(20, 32)),
    ("seq_lens of another batch than a dense cache", "whole", "seq_lens", tensor(1, 2)),
    ("kv_indptr of rank 2", "csr", "kv_indptr", like("kv_indptr", lambda t: t[None])),
    ("kv_indptr empty", "csr", "kv_indptr", like("kv_indptr", lambda t: t[:0])),
    ("kv_indices of int16", "csr", "kv_indices", like("kv_indices", Tensor.short)),
    ("kv_indices strided", "csr", "kv_indices", like("kv_indices", lambda t: t.repeat(2)[::2])),
    ("kv_last_page_lens of another batch", "csr", "kv_last_page_lens", tensor(1, 1)),
    ("qo_indptr of another batch", "csr", "qo_indptr", tensor(0, 1, 3)),
    ("qo_indptr of floats", "csr", "qo_indptr", made(B + 1)),
    ("max_seqlen_q of none", "csr", "max_seqlen_q", 0),
    ("max_seqlen_q that T contradicts", "csr", "max_seqlen_q", 2),
    ("attn_mask of ints", "whole", "attn_mask", made(B, 1, 1, PAGE, dtype=torch.int64)),
    ("attn_mask of other heads", "whole", "attn_mask", made(B, N + 1, 1, PAGE)),
    ("attn_mask of another batch", "whole", "attn_mask", made(2, 1, 1, PAGE)),
    ("attn_mask of rank 5", "whole", "attn_mask", made(1, B, 1, 1, PAGE)),
    ("attn_mask narrower than the cache", "whole", "attn_mask", made(1, 1, 1, PAGE - 1)),
    ("attn_mask narrower than the table", "table", "attn_mask", made(1, 1, 1, 2 * PAGE - 1)),
    ("mask_fill of NaN", "whole", "mask_fill", NAN),
    ("mask_fill of infinity", "whole", "mask_fill", INF),
    ("mask_fill above all floats", "whole", "mask_fill", 1e39),
    ("sm_scale of NaN", "csr", "sm_scale", NAN),
    ("sm_scale of infinity", "csr", "sm_scale", INF),
    ("sm_scale above all floats", "csr", "sm_scale", 1e39),
    ("logit_cap of NaN", "csr", "logit_cap", NAN),
    ("logit_cap below zero", "csr", "logit_cap", -1.0),
    ("logit_cap near all floats", "csr", "logit_cap", 3e38),
    ("logit_cap near zero", "csr", "logit_cap", 1e-42),
    ("q_scale of bf16", "csr", "q_scale", made(1, dtype=torch.bfloat16)),
    ("k_scale per head", "csr", "k_scale", made(N)),
    ("num_kv_splits of none", "csr", "num_kv_splits", 0),
    ("num_kv_splits past the limit", "csr", "num_kv_splits", 257),
    ("out of another shape", "csr", "out", made(B, N, LKV + 1)),
    ("out of another dtype", "csr", "out", made(B, N, LKV, dtype=torch.bfloat16)),
    ("out strided in its last dim", "csr", "out", like("out", lambda t: t.mT.contiguous().mT)),
    ("out of one token for all", "csr", "out", like("out", lambda t: t[:1].expand(B, -1, -1))),
    ("lse of another shape", "csr", "lse", made(N, B)),
    ("lse of bf16", "csr", "lse", made(B, N, dtype=torch.bfloat16)),
    ("lse transposed", "csr", "lse", like("lse", lambda t: t.T.contiguous().T)),
    ("workspace of bf16", "csr", "workspace", made(9999, dtype=torch.bfloat16)),
    ("workspace of rank 2", "csr", "workspace", made(99, 99)),
]
CONTENTS: list[tuple[str, str, str, Any]] = [  # seen on a GPU under debug_checks only
    ("kv_indptr that decreases", "csr", "kv_indptr", tensor(0, 4, 2, 5)),
    ("kv_indptr below zero", "csr", "kv_indptr", tensor(-1, 2, 4, 5)),
    ("kv_indptr past kv_indices", "csr", "kv_indptr", tensor(0, 2, 4, 6)),
    ("kv_indptr in tokens", "csr", "kv_indptr", tensor(0, 20, 52, 53)),
    ("kv_last_page_lens of none", "csr", "kv_last_page_lens", tensor(4, 0, 1)),
    ("kv_last_page_lens past the page", "csr", "kv_last_page_lens", tensor(4, 17, 1)),
    ("kv_indices past the cache", "csr", "kv_indices", tensor(3, 1, 2, 8, 5)),
    ("kv_indices below zero", "csr", "kv_indices", tensor(3, 1, -1, 7, 5)),
    ("seq_lens below zero", "table", "seq_lens", tensor(20, -1, 1)),
    ("seq_lens past the table", "table", "seq_lens", tensor(20, 33, 1)),
    ("seq_lens past a dense cache", "whole", "seq_lens", tensor(16, 17, 1)),
    ("block_table past the cache", "table", "block_table", like("block_table", lambda t: t + 6)),
    ("qo_indptr that ends early", "csr", "qo_indptr", tensor(0, 1, 2, 2)),
    ("qo_indptr that starts late", "csr", "qo_indptr", tensor(1, 1, 2, 3)),
    ("qo_indptr that decreases", "csr", "qo_indptr", tensor(0, 2, 1, 3)),
    ("q_scale of NaN", "csr", "q_scale", lambda call: made(1)(call) * NAN),
    ("k_scale of infinity", "csr", "k_scale", lambda call: made(1)(call) + INF),
]
NAMED_ELSEWHERE = {  # the argument the message names, where it is not the edited one
    "q_nope with a token too many": "q_pe",
    "a third of a CSR triple": "kv_indices",
    "max_seqlen_q that T contradicts": "q_nope",
    "kv_c of ints": "kv_c|k_pe|q_nope",
}


def refused(call: dict[str, Any], what: str, name: str) -> None:
    names = NAMED_ELSEWHERE.get(what, name)
    before = {k: call[k].clone() for k in ("out", "lse")}
    with pytest.raises(ValueError, match=rf"^({names})(\[\d+\])?: expected .+, got .+\. \w.+\.$"):
        OPS.mla_decode_out(**call)
    for k, tensor in before.items():
        assert torch.equal(call[k], tensor), f"{k} was written"


def parametrized(table: list[tuple[str, str, str, Any]]) -> pytest.MarkDecorator:
    ids = [what.replace(" ", "-") for what, *_ in table]
    return pytest.mark.parametrize(("what", "paging", "name", "value"), table, ids=ids)


@pytest.mark.parametrize("device", DEVICES)
@parametrized(LAYOUT)
def test_bad_layout_is_refused(what: str, paging: str, name: str, value: Any, device: str) -> None:
    call = good(paging, device)
    call[name] = value(call) if callable(value) else value
    refused(call, what, name)


@pytest.mark.parametrize("device", DEVICES)
@parametrized(CONTENTS)
def test_bad_contents_are_refused(
    what: str, paging: str, name: str, value: Any, device: str
) -> None:
    call = good(paging, device)
    call[name] = value(call)
    with mla_compile.debug_checks():
        refused(call, what, name)


@pytest.mark.parametrize("device", DEVICES)
def test_a_sequence_with_more_query_tokens_than_said(device: str) -> None:
    call = good("csr", device) | {"qo_indptr": tensor(0, 0, 2, 3)(good("csr", device))}
    with mla_compile.debug_checks():
        refused(call, "longer", "max_seqlen_q")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "name",
    ["q_pe", "kv_c", "k_pe", "block_table", "seq_lens", "attn_mask", "k_scale", "out", "lse"],
)
def test_another_device_is_refused(name: str, device: str) -> None:
    call = good("table", device)
    call |= {"attn_mask": made(1, 1, 1, 2 * PAGE)(call), "k_scale": made(1)(call) + 1}
    call[name] = call[name].to("cpu" if device == "cuda" else "meta")
    # The dispatcher hands a call with a meta tensor to the fakes: ask the validator itself.
    decode = OPS.mla_decode_out if device == "cuda" else validate
    with pytest.raises(ValueError, match=f"^{name}: expected device {device}"):
        decode(**call)


@pytest.mark.parametrize("name", ["out", "lse"])
def test_nothing_to_write_to(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor"):
        OPS.mla_decode_out(**good("csr", "cpu") | {name: None})


def test_mask_fill_beside_an_additive_mask() -> None:
    call = good("whole", "cpu") | {"attn_mask": torch.zeros(1, 1, 1, PAGE), "mask_fill": -1.0}
    refused(call, "mask_fill", "mask_fill")


def test_fp8_query_over_a_bf16_cache() -> None:
    call = good("csr", "cpu")
    for name in ("q_nope", "q_pe"):
        call[name] = call[name].to(torch.float8_e4m3fn)
    refused(call, "fp8", "q_nope")


def test_fp32_query_over_an_fp8_cache() -> None:
    call = good("csr", "cpu")
    for name in ("kv_c", "k_pe"):
        call[name] = call[name].to(torch.float8_e4m3fn)
    refused(call, "fp8", "q_nope")


@pytest.mark.gpu
def test_fp64_on_a_gpu() -> None:
    call = good("csr", "cuda")
    for name in ("q_nope", "q_pe", "kv_c", "k_pe"):
        call[name] = call[name].double()
    refused(call, "fp64", "kv_c")


def aiter(device: str = "cpu") -> dict[str, Any]:
    call = good("csr", device)
    return {
        "q": torch.cat([call["q_nope"], call["q_pe"]], -1),
        "kv_buffer": torch.cat([call["kv_c"], call["k_pe"]], -1).unsqueeze(2),
        "o": call["out"],
        "qo_indptr": torch.arange(B + 1, dtype=torch.int32, device=device),
        **{k: call[k] for k in ("kv_indptr", "kv_indices", "kv_last_page_lens")},
        "max_seqlen_q": 1,
    }


AITER: list[tuple[str, str, Any]] = [
    ("an int in 9th place", "sm_scale", 1),
    ("no q", "q", None),
    ("q of rank 2", "q", like("q", lambda t: t[0])),
    ("q of another dtype", "q", like("q", Tensor.half)),
    ("q strided in its last dim", "q", like("q", lambda t: t.mT.contiguous().mT)),
    ("kv_buffer of rank 3", "kv_buffer", like("kv_buffer", lambda t: t[:, :, 0])),
    ("kv_buffer with empty pages", "kv_buffer", like("kv_buffer", lambda t: t[:, :0])),
    ("kv_buffer narrower than q", "kv_buffer", like("kv_buffer", lambda t: t[..., 1:])),
    ("kv_buffer of two heads", "kv_buffer", like("kv_buffer", lambda t: t.expand(-1, -1, 2, -1))),
    ("two KV heads", "nhead_kv", 2),
    ("kv_scale per head", "kv_scale", lambda _: torch.ones(N)),
    ("another page size than the buffer's", "page_size", 1),
    ("o wider than q", "o", lambda _: torch.full((B, N, LKV + R + 1), 7.0)),
    ("o of other heads", "o", lambda _: torch.full((B, N + 1, LKV), 7.0)),
    ("o of another dtype", "o", lambda _: torch.full((B, N, LKV), 7.0, dtype=torch.bfloat16)),
    ("o of rank 2", "o", lambda _: torch.full((B, LKV), 7.0)),
    ("o strided in its last dim", "o", like("o", lambda t: t.mT.contiguous().mT)),
    ("sm_scale of NaN", "sm_scale", NAN),
    ("kv_indptr that decreases", "kv_indptr", lambda _: torch.tensor([0, 4, 2, 5])),
]


@pytest.mark.parametrize(
    ("name", "value"), [c[1:] for c in AITER], ids=[c[0].replace(" ", "-") for c in AITER]
)
def test_bad_aiter_call_is_refused(name: str, value: Any) -> None:
    call = aiter()
    call["kv_c"] = call["kv_buffer"]  # for the helpers above, which look up its device
    bad = value(call) if callable(value) else value
    del call["kv_c"]
    call[name] = bad
    before = call["o"].clone()
    with pytest.raises(ValueError, match=rf"^{name}: expected .+, got .+\. \w.+\.$"):
        mla_compile.mla_decode_fwd(**call)
    assert torch.equal(call["o"], before)


@pytest.mark.parametrize("paging", ["csr", "table", "whole"])
def test_the_good_calls_are_good(paging: str) -> None:
    call = good(paging, "cpu")
    OPS.mla_decode_out(**call)
    assert bool(call["out"].isfinite().all()) and not bool((call["out"] == 7.0).any())


@pytest.mark.parametrize(
    ("paging", "name", "value"),
    [
        pytest.param("csr", "kv_indices", tensor(3, 1, 2, 7, 5, 99999), id="padded-kv_indices"),
        pytest.param("csr", "attn_mask", made(1, 1, 1, 3), id="short-mask-over-csr"),
        pytest.param("whole", "attn_mask", made(PAGE), id="mask-of-rank-1"),
        pytest.param("whole", "attn_mask", made(1, 1, 1, PAGE + 3), id="mask-wider-than-the-cache"),
        pytest.param("csr", "q_scale", lambda _: torch.tensor(1.0), id="scale-of-rank-0"),
        pytest.param("csr", "sm_scale", -0.5, id="negative-scale"),
    ],
)
def test_what_only_looks_bad_is_accepted(paging: str, name: str, value: Any) -> None:
    call = good(paging, "cpu")
    call[name] = value(call) if callable(value) else value
    OPS.mla_decode_out(**call)
    assert bool(call["out"].isfinite().all())


@pytest.mark.gpu
def test_contents_are_not_looked_at_on_a_gpu_without_debug_checks() -> None:
    call = good("csr", "cuda") | {"q_scale": torch.tensor([NAN], device="cuda")}
    OPS.mla_decode_out(**call)
    assert bool(call["out"].isnan().all())
