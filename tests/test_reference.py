"""The CPU implementation against naive PyTorch."""

from __future__ import annotations

import math

import pytest
import torch

from mla_compile import reference
from mla_compile.validate import validate
from tests.cases import CASES, Case, assert_right, build, outputs


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_naive_pytorch(case: Case) -> None:
    problem = build(case)
    out, lse = torch.ops.mla_compile.mla_decode(*problem.args, **problem.options)
    assert_right(problem, out, lse)


@pytest.mark.parametrize("queries", [1, (3, 1, 5, 2)], ids=["one-token", "ragged-tokens"])
@pytest.mark.parametrize("mask", ["", "holes", "per row", "additive lowest per row"])
def test_blocks_of_keys_do_not_show(
    monkeypatch: pytest.MonkeyPatch, mask: str, queries: int | tuple[int, ...]
) -> None:
    monkeypatch.setattr(reference, "KEYS", 7)
    problem = build(Case("blocked", mask=mask, queries=queries, dtype=torch.float32))
    out, lse = outputs(problem)
    reference.mla_decode_reference(validate(*problem.args, **problem.options), out, lse)
    assert_right(problem, out, lse)


def test_a_key_that_only_a_later_query_may_see_is_not_read() -> None:
    q, cache = torch.randn(2, 1, 48), torch.randn(1, 2, 48)
    cache[0, 1] = math.nan
    mask = torch.tensor([0.0, -math.inf]).view(1, 1, 2, 1).expand(-1, -1, -1, 2)
    args = q[..., :32], q[..., 32:], cache[..., :32], cache[..., 32:], 0.1
    out, lse = torch.ops.mla_compile.mla_decode(*args, max_seqlen_q=2, attn_mask=mask)
    assert torch.equal(out[0, 0], cache[0, 0, :32]) and lse[0].isfinite().all()
    assert (out[1] == 0).all() and lse[1] == -math.inf


def test_fp64_is_computed_in_fp64() -> None:
    problem = build(Case("fp64", dtype=torch.float64))
    out, _ = torch.ops.mla_compile.mla_decode(*problem.args, **problem.options)
    assert out.dtype == torch.float64
    assert_right(problem, out, problem.truth[1].float())


def test_a_dense_cache_is_read_in_place() -> None:
    problem = build(Case("dense", paging="dense", dtype=torch.float32))
    cache = validate(*problem.args, **problem.options).cache
    kv_c, k_pe = cache.rows(2, cache.pages(2, 37), slice(5, 37))
    assert kv_c.data_ptr() == cache.kv_c[2, 5].data_ptr()
    assert k_pe.data_ptr() == cache.k_pe[2, 5].data_ptr()


def test_scores_of_many_rows_stay_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    blocks = reference._blocks

    def recorded(keys: object, size: int) -> object:
        seen.append(size)
        return blocks(keys, size)  # type: ignore[arg-type]

    monkeypatch.setattr(reference, "_blocks", recorded)
    monkeypatch.setattr(reference, "SCORES", 1 << 10)
    problem = build(Case("rows", N=8, queries=4, dtype=torch.float32))
    torch.ops.mla_compile.mla_decode(*problem.args, **problem.options)
    assert max(seen) * 8 * 4 <= 1 << 10
