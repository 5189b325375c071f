"""Checks of what stands in a call's tensors: always on CPU, on a GPU only under `debug_checks`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor

from mla_compile.dims import Dims
from mla_compile.paged import PagedKV

_debug: ContextVar[bool] = ContextVar("mla_compile_debug_checks", default=False)


@contextmanager
def debug_checks() -> Iterator[None]:
    """Also check, on a GPU, what only a device sync can tell. On CPU tensors these always run.

    Under this context a call raises ValueError when
    - `kv_indptr` is negative, decreases, or ends past `kv_indices`;
    - `kv_last_page_lens` of a sequence with pages is outside 1..page_size;
    - `seq_lens` is negative or more than `block_table` (or a dense cache's page) holds;
    - an entry of `kv_indices` or `block_table` that a sequence uses is not a page of the cache;
    - `qo_indptr` does not start at 0, decreases, does not end at T, or holds a sequence of more
      than `max_seqlen_q` tokens;
    - `q_scale` or `k_scale` is NaN or infinite.
    """
    token = _debug.set(True)
    try:
        yield
    finally:
        _debug.reset(token)


def due(device: torch.device) -> bool:
    return device.type == "cpu" or _debug.get()


def refuse(argument: str, expected: str, got: object, remedy: str) -> NoReturn:
    raise ValueError(f"{argument}: expected {expected}, got {got}. {remedy}")


def check_contents(
    dims: Dims,
    cache: PagedKV,
    qo_indptr: Tensor | None,
    q_scale: Tensor | None,
    k_scale: Tensor | None,
) -> None:
    if cache.starts is not None:
        _check_csr(cache)
    elif cache.lens is not None:
        _check_seq_lens(cache)
    if qo_indptr is not None:
        _check_qo_indptr(dims, qo_indptr)
    for name, scale in (("q_scale", q_scale), ("k_scale", k_scale)):
        if scale is not None and not bool(scale.isfinite().all()):
            refuse(name, "a finite scale", scale.item(), "Mend the quantisation that made it.")


def _check_csr(cache: PagedKV) -> None:
    assert cache.starts is not None and cache.table is not None and cache.lens is not None
    starts, entries = cache.starts.tolist(), cache.table.shape[0]
    if starts[0] < 0 or any(b < a for a, b in pairwise(starts)):
        refuse("kv_indptr", "non-negative, never decreasing", starts, "Pass a prefix sum of pages.")
    if starts[-1] > entries:
        refuse(
            "kv_indptr",
            f"an end of at most {entries}, the entries of kv_indices",
            starts[-1],
            "kv_indptr counts pages, not tokens; extend kv_indices otherwise.",
        )
    for b, last in enumerate(cache.lens.tolist()):
        if starts[b + 1] > starts[b] and not 1 <= last <= cache.page_size:
            refuse(
                f"kv_last_page_lens[{b}]",
                f"1..{cache.page_size}, the page size",
                last,
                "Pass (length - 1) % page_size + 1; a sequence without tokens has no pages.",
            )
    _check_pages("kv_indices", cache.table[starts[0] : starts[-1]], cache)


def _check_seq_lens(cache: PagedKV) -> None:
    assert cache.lens is not None and cache.capacity is not None
    holder = "kv_c" if cache.table is None else "block_table"
    for b, length in enumerate(cache.lens.tolist()):
        if not 0 <= length <= cache.capacity:
            refuse(
                f"seq_lens[{b}]",
                f"0..{cache.capacity}, the tokens a row of {holder} holds",
                length,
                f"Mend the length, or give {holder} more pages.",
            )
    if cache.table is not None:
        first = torch.arange(cache.table.shape[1], device=cache.table.device) * cache.page_size
        _check_pages("block_table", cache.table[first < cache.lens[:, None]], cache)


def _check_pages(name: str, used: Tensor, cache: PagedKV) -> None:
    pages = cache.kv_c.shape[0]
    wrong = used[(used < 0) | (used >= pages)]
    if wrong.numel():
        refuse(
            name,
            f"used entries in 0..{pages - 1}, the pages of kv_c",
            int(wrong[0]),
            "Mend the page table, or pass the whole cache.",
        )


def _check_qo_indptr(dims: Dims, qo_indptr: Tensor) -> None:
    starts = qo_indptr.tolist()
    if starts[0] != 0 or starts[-1] != dims.T:
        refuse(
            "qo_indptr",
            f"0 first and T = {dims.T} last",
            f"{starts[0]} and {starts[-1]}",
            "Every query token belongs to one sequence.",
        )
    if any(b < a for a, b in pairwise(starts)):
        refuse("qo_indptr", "never decreasing", starts, "Pass a prefix sum of query tokens.")
    longest = max((b - a for a, b in pairwise(starts)), default=0)
    if longest > dims.Sq:
        refuse(
            "max_seqlen_q",
            f"at least {longest}, the longest sequence of qo_indptr",
            dims.Sq,
            "Pass that maximum.",
        )
