"""The kernels against naive PyTorch: interpreted on CPU, compiled where there is a GPU."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mla_compile.kernels.config import FALLBACK, FULL, GLUON, HALF, Config, workspace_numel
from mla_compile.kernels.decode import _device, decode, launch
from mla_compile.validate import validate
from tests.cases import CASES, Case, Problem, assert_right, build, outputs

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreter, id="interpreted"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="compiled"),
]


def run(problem: Problem, device: str, config: Config | None = None) -> tuple[Tensor, Tensor]:
    problem = problem.to(device)
    out, lse = outputs(problem, device)
    call = validate(*problem.args, **problem.options)
    splits = problem.case.num_kv_splits
    workspace = torch.full(
        (workspace_numel(call.dims, splits or 300) + 10**7,), math.nan, device=device
    )
    launch(call, out, lse, splits, workspace, config)
    return out, lse


@pytest.mark.parametrize(
    ("device", "case"),
    [
        pytest.param(*device.values, case, marks=device.marks, id=f"{device.id}-{case}")
        for device in DEVICES
        for case in CASES
        if case.gpu or device.id == "interpreted"
    ],
)
def test_matches_naive_pytorch(device: str, case: Case) -> None:
    problem = build(case)
    assert_right(problem, *run(problem, device))


# What the Gluon kernels serve, at the only dims they have, and long enough for their pipelines.
LONG = (4096, 1, 0, 63, 64, 65, 128, 129, 1000, 0, 2047)
GLUON_CASES = [
    *[
        dataclasses.replace(case, Lkv=512, R=64)
        for case in CASES
        if (case.Lkv, case.R, case.dtype.itemsize, case.cache_dtype) == (32, 16, 2, None)
        and not (case.mask or case.logit_cap or case.scaled)
    ],
    *[
        Case(
            f"mask: {mask}, {dtype}, {splits} splits",
            tuple(n for n in LONG if n) if splits else (300, 1, 70, 1100),
            1,
            N,
            512,
            64,
            dtype,
            paging="dense",
            mask=mask,
            mask_fill=fill,
            num_kv_splits=splits,
        )
        for mask, fill in (
            ("length", None),
            ("left padded", None),
            ("holes", None),
            ("holes", torch.finfo(torch.bfloat16).min),
            ("nothing for one", torch.finfo(torch.float32).min),
            ("length", -5.0),
            ("one column", None),
            ("additive per key", None),
            ("additive lowest", None),
            ("additive lowest everywhere", None),
            ("additive lowest and -inf", None),
            ("additive lowest but last", None),
        )
        for dtype, N, splits in ((torch.bfloat16, 128, None), (torch.float16, 40, 3))
    ],
    *[
        Case(f"long, {N} heads, {splits} splits", LONG, 1, N, 512, 64, num_kv_splits=splits)
        for N in (16, 63, 64, 128)
        for splits in (1, 5)
    ],
    *[
        Case(f"evenly, {N} heads, pages of {page_size}", LONG, 1, N, 512, 64, page_size=page_size)
        for N in (16, 63, 128)
        for page_size in (1, 64, 37)
    ],
    Case("evenly, one long among short", (7, 8192, *[60] * 70, 0), 1, 128, 512, 64),
    Case("evenly, one long and causal", (9, 4096, 300, 0), 4, 40, 512, 64, page_size=64),
    Case("evenly, ragged tokens", (900, 4096, 1, 700), (3, 1, 0, 5), 128, 512, 64),
    Case("evenly, block table", LONG, 2, 128, 512, 64, page_size=64, paging="table"),
    Case("evenly, dense", LONG, 1, 128, 512, 64, paging="dense"),
    *[
        Case(f"evenly, in pieces, {N} heads", lens, Sq, N, 512, 64, page_size=64)
        for lens in ((4096, 4000, 3900), (700, 0, 690, 650), (64,) * 33)
        for N, Sq in ((16, 1), (128, 2))
    ],
    Case("evenly, in pieces, ragged tokens", (900, 960, 1000), (3, 0, 5), 128, 512, 64),
    Case("evenly, more sequences than groups", tuple(range(0, 400, 3)), 1, 128, 512, 64),
    Case("evenly, nothing", (0, 0, 0), 1, 128, 512, 64),
    Case("long, three tokens of 128 heads", LONG, 3, 128, 512, 64, page_size=64),
    Case("long, four tokens of 16 heads", LONG, 4, 16, 512, 64, num_kv_splits=2),
    *[
        Case(f"{Sq} tokens of {N} heads", (1000, 5, 0, 300), Sq, N, 512, 64, num_kv_splits=splits)
        for Sq, N, splits in ((8, 16, None), (17, 16, 3), (17, 128, None))
    ],
    Case("tiles, ragged tokens", (900, 4096, 1, 700), (3, 1, 0, 5), 48, 512, 64, num_kv_splits=3),
    Case("long, fp16", LONG, 1, 128, 512, 64, torch.float16, page_size=1),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", GLUON_CASES, ids=str)
def test_gluon_matches_naive_pytorch(case: Case) -> None:
    arch, _ = _device(torch.device("cuda", 0))
    if arch not in GLUON:
        pytest.skip(f"no Gluon kernel for {arch}")
    problem = build(case)
    config = dataclasses.replace(GLUON[arch][-1], even_from=0)  # a schedule for few tiles as well
    assert_right(problem, *run(problem, "cuda", config))


SHIPPED = {
    (c.block_m, c.block_n, c.reload_v, c.chunk): dataclasses.replace(c, options=())
    for table in (*HALF.values(), *FULL.values(), FALLBACK)
    for c in table
}


@pytest.mark.interpreter
@pytest.mark.parametrize("page_size", [1, 64], ids="pages-of-{}".format)
@pytest.mark.parametrize(
    "tile", SHIPPED, ids="rows-{0[0]}-keys-{0[1]}-reload-{0[2]}-chunk-{0[3]}".format
)
def test_every_shipped_tile_is_right(tile: tuple[int, int, bool, int], page_size: int) -> None:
    case = Case("tile", lens=(150, 64, 3), N=24, page_size=page_size, num_kv_splits=2)
    problem = build(case)
    assert_right(problem, *run(problem, "cpu", SHIPPED[tile]))


@pytest.mark.parametrize("device", DEVICES)
def test_strided_output_and_oversized_workspace(device: str) -> None:
    problem = build(Case("strided", num_kv_splits=3)).to(device)
    T, N, Lkv = problem.args[0].shape
    wide = torch.full((T, 2 * N, Lkv + 8), math.nan, dtype=torch.bfloat16, device=device)
    out, (_, lse) = wide[:, ::2, :Lkv], outputs(problem, device)
    workspace = torch.full((10**5,), math.nan, device=device)
    launch(validate(*problem.args, **problem.options), out, lse, 3, workspace)
    assert_right(problem, out, lse)
    assert bool(wide[:, 1::2].isnan().all()) and bool(wide[..., Lkv:].isnan().all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("Lkv, R, dtype", [(32, 16, torch.float32), (512, 64, torch.bfloat16)])
def test_a_cache_without_tokens(device: str, Lkv: int, R: int, dtype: torch.dtype) -> None:
    q, cache = (torch.randn(3, n, Lkv + R, dtype=dtype, device=device) for n in (64, 0))
    args = (q[..., :Lkv], q[..., Lkv:], cache[..., :Lkv], cache[..., Lkv:], 0.1)
    out, lse = decode(args, {})
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("Lkv, R, dtype", [(32, 16, torch.float32), (512, 64, torch.bfloat16)])
def test_a_nan_in_a_query_is_in_its_lse(
    device: str, splits: int, Lkv: int, R: int, dtype: torch.dtype
) -> None:
    problem = build(Case("nan", (512,), 2, 16, Lkv, R, dtype, num_kv_splits=splits)).to(device)
    problem.args[0][0, 5, 0] = math.nan
    out, lse = run(problem, device)
    for found in (out[..., 0], lse):
        assert found[0, 5].isnan() and found.isnan().sum() == 1


@pytest.mark.parametrize("device", DEVICES)
def test_heads_further_apart_than_32_bits_tell(device: str) -> None:
    buffer = torch.empty(128, 353000, 48, dtype=torch.float16, device=device)
    q, cache = buffer.transpose(0, 1)[:2], torch.randn(2, 20, 48, device=device).half()
    q.normal_()

    def halves(q: Tensor) -> tuple[Any, ...]:
        return q[..., :32], q[..., 32:], cache[..., :32], cache[..., 32:], 0.1

    for far, near in zip(decode(halves(q), {}), decode(halves(q.contiguous()), {}), strict=True):
        assert torch.equal(far, near)


@pytest.mark.parametrize("device", DEVICES)
def test_a_workspace_too_small_is_refused(device: str) -> None:
    problem = build(Case("small")).to(device)
    out, lse = outputs(problem, device)
    workspace = torch.empty(100, device=device)
    with pytest.raises(ValueError, match="workspace: expected at least"):
        launch(validate(*problem.args, **problem.options), out, lse, 3, workspace)
    assert bool(out.isnan().all()) and bool(lse.isnan().all())


@pytest.mark.parametrize("device", DEVICES)
def test_tiles_that_every_row_masks_are_not_read(device: str) -> None:
    """A row-varying mask skips whole tiles: NaN behind them stays out."""
    case = Case("tiles", lens=(512,), paging="whole", N=4, queries=2, dtype=torch.float32)
    problem = build(case)
    q_nope, q_pe, kv_c, k_pe, scale = problem.args
    mask = torch.zeros(1, 4, 2, 512, dtype=torch.bool)
    mask[..., :100], mask[..., 300:] = True, torch.rand(4, 2, 212) < 0.5
    expected, expected_lse = torch.ops.mla_compile.mla_decode(
        *problem.args, max_seqlen_q=2, attn_mask=mask
    )
    kv_c[:, 128:256], k_pe[:, 128:256] = math.nan, math.nan
    for fill in (-math.inf, torch.finfo(torch.float32).min):
        additive = torch.where(mask, 0.0, fill)
        out, lse = (t.to(device) for t in outputs(problem))
        args: list[Any] = [t.to(device) for t in (q_nope, q_pe, kv_c, k_pe)] + [scale]
        options: dict[str, Any] = {"max_seqlen_q": 2, "attn_mask": additive.to(device)}
        launch(validate(*args, **options), out, lse, 1)
        torch.testing.assert_close(out.cpu(), expected)
        torch.testing.assert_close(lse.cpu(), expected_lse)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("low", [-math.inf, torch.finfo(torch.float32).min, -1e30])
@pytest.mark.parametrize("rows", [1, 2], ids=["per-key", "per-row"])
@pytest.mark.parametrize("Lkv, R, dtype", [(32, 16, torch.float32), (512, 64, torch.bfloat16)])
def test_a_mask_value_that_no_score_survives_hides_a_nan(
    device: str, low: float, rows: int, Lkv: int, R: int, dtype: torch.dtype
) -> None:
    case = Case("garbage", (512,), 2, 16, Lkv, R, dtype, paging="whole")
    problem = build(case).to(device)
    mask = torch.zeros(1, 1, rows, 512, device=device)
    mask[:, :, 0, 100:140] = low
    results = []
    for garbage in (1.0, math.nan, 3e38):
        problem.args[3][:, 100:140] = garbage
        out, lse = outputs(problem, device)
        options: dict[str, Any] = {"max_seqlen_q": 2, "attn_mask": mask.expand(-1, -1, 2, -1)}
        launch(validate(*problem.args, **options), out, lse, 2)
        results.append((out[: 3 - rows], lse[: 3 - rows]))
    for out, lse in results:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])
        assert bool(out.isfinite().all() and lse.isfinite().all())
