"""Splits are merged, however they lie; what a schedule cut is too, and the rest is left alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mla_compile.kernels.combine import combine_cut_kernel, combine_kernel

LKV = 512
# Parts of each sequence, 0 where it is whole, and the group in which it begins.
CUTS = [(0, 0), (2, 0), (0, 1), (0, 1), (5, 1), (3, 5), (2, 7), (0, 8), (11, 8)]
GROUPS = 20
TOKENS = [2, 1, 4, 0, 4, 3, 1, 2, 2]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreter, id="interpreted"),
    pytest.param("cuda", marks=pytest.mark.gpu, id="compiled"),
]


def slots(parts: int, group: int) -> list[int]:
    """Where `schedule` says they are: what begins in a group, then what goes on in each next."""
    return [2 * group + 1, *(2 * (group + i) for i in range(1, parts))][:parts]


def merged(part_out: Tensor, part_ml: Tensor) -> tuple[Tensor, Tensor]:
    """[parts, rows, LKV] and [parts, rows, 2] in fp64: out and lse."""
    log = part_ml[..., 0].double() * math.log(2) + part_ml[..., 1].double().log()
    lse = log.logsumexp(0)
    weight = (log - lse.masked_fill(lse == -math.inf, 0)).exp()
    return (part_out.double() * weight[..., None]).sum(0), lse


def as_tiles(part_out: Tensor) -> Tensor:
    """[parts, rows, LKV] as [parts, rows / 16, 16 * LKV]: rows are (h, r), columns (j, t, e)."""
    tiles = part_out.reshape(len(part_out), -1, 2, 8, LKV // 8, 4, 2)
    return tiles.permute(0, 1, 4, 3, 5, 2, 6).reshape(len(part_out), -1, 16 * LKV)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tiled", [False, True], ids=["rows", "tiles"])
@pytest.mark.parametrize("num_splits", [3, 9])
def test_splits_are_merged(device: str, tiled: bool, num_splits: int) -> None:
    rows, block_s, block_l = 2 * 16, 4, 256  # of two tokens
    part_out = torch.randn(rows, num_splits, LKV)
    part_ml = torch.stack([torch.randn(rows, num_splits) * 20, torch.rand(rows, num_splits)], -1)
    empty = torch.arange(rows * num_splits).view(rows, num_splits) % 5 == 0
    empty[7] = True
    part_out[empty], part_ml[empty] = 0, torch.tensor([-math.inf, 0])
    expected, expected_lse = merged(part_out.transpose(0, 1), part_ml.transpose(0, 1))
    if tiled:
        part_out = as_tiles(part_out.transpose(0, 1)).transpose(0, 1).contiguous()
    out, lse = torch.full((2, 16, LKV), math.nan), torch.full((2, 16), math.nan)
    tensors = [t.to(device) for t in (part_out, part_ml, out, lse)]
    strides = {"stride_ot": 16 * LKV, "stride_on": LKV}
    blocks = {"BLOCK_S": block_s, "BLOCK_L": block_l}
    combine_kernel[(rows // (1 + tiled), LKV // block_l)](
        *tensors,
        num_splits,
        **strides,
        N=16,
        LKV=LKV,
        EARLY=False,
        TILED=tiled,
        num_warps=1,
        **blocks,
    )
    out, lse = tensors[2].cpu().double(), tensors[3].cpu().double()
    torch.testing.assert_close(out, expected.nan_to_num(0).view(2, 16, LKV), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse.view(2, 16), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ragged", [False, True], ids=["as-many-tokens", "ragged-tokens"])
@pytest.mark.parametrize("shares", [1, 4], ids=["a-program", "4-programs"])
@pytest.mark.parametrize("tiled", [False, True], ids=["rows", "tiles"])
def test_cut_sequences_are_merged_and_whole_ones_kept(
    device: str, ragged: bool, shares: int, tiled: bool
) -> None:
    N, ROWS = (16, 64) if tiled else (3, 16)
    tokens = TOKENS if ragged else [4] * len(CUTS)
    starts = [0, *torch.tensor(tokens).cumsum(0).tolist()]
    part_out = torch.full((2 * GROUPS, ROWS, LKV), math.nan)
    part_ml = torch.full((2 * GROUPS * ROWS * 2 + 3 * GROUPS,), math.nan)
    ml = part_ml[: 2 * GROUPS * ROWS * 2].view(2 * GROUPS, ROWS, 2)
    records = part_ml[ml.numel() :].view(GROUPS, 3)
    records[:, 2] = 0
    out = torch.full((starts[-1], N, LKV), -7.0)
    lse = torch.full((starts[-1], N), -7.0)
    expected, expected_lse = out.double(), lse.double()
    for b, (parts, group) in enumerate(CUTS):
        records[group + 1 : group + parts] = torch.tensor([b, group, parts]).float()
        rows = tokens[b] * N
        for i, slot in enumerate(slots(parts, group)):
            part_out[slot, :rows] = torch.randn(rows, LKV)
            ml[slot, :rows, 0] = torch.randn(rows) * 20
            ml[slot, :rows, 1] = torch.rand(rows) + 0.5
            empty = torch.arange(rows) % 4 == i if b != 5 else torch.ones(rows, dtype=torch.bool)
            part_out[slot, :rows][empty], ml[slot, :rows][empty] = 0, torch.tensor([-math.inf, 0])
        if parts:
            at = slots(parts, group)
            o, lse_b = merged(part_out[at, :rows], ml[at, :rows])
            expected[starts[b] : starts[b + 1]] = o.nan_to_num(0).view(-1, N, LKV)
            expected_lse[starts[b] : starts[b + 1]] = lse_b.view(-1, N)

    if tiled:
        part_out = as_tiles(part_out)
    part_out, part_ml, out, lse = (t.to(device) for t in (part_out, part_ml, out, lse))
    qo_indptr = torch.tensor(starts, dtype=torch.int32, device=device) if ragged else None
    tensors = (part_out, part_ml, out, lse, qo_indptr)
    strides = {"stride_ot": N * LKV, "stride_on": LKV}
    constants = {"N": N, "LKV": LKV, "ROWS": ROWS, "SHARES": shares, "BLOCK_L": LKV}
    flags = {"EARLY": False, "TILED": tiled}
    combine_cut_kernel[(GROUPS * shares,)](*tensors, 4, GROUPS, **strides, **constants, **flags)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.cpu().double(), expected_lse, rtol=1e-5, atol=1e-5)
