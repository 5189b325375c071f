"""One description of the cache for all three pagings, shared by the kernels and the reference.

Key j of sequence b lives in slot j % page_size of the page that

    CSR           kv_indices[kv_indptr[b] + j // page_size]
    block table   block_table[b, j // page_size]
    dense         b                                          (page_size is the capacity)

names. A dense [B,S,·] cache is thus a paged cache with page_size = S, and costs nothing extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PagedKV:
    kv_c: Tensor  # [pages, page_size, Lkv]
    k_pe: Tensor  # [pages, page_size, R]
    B: int
    table: Tensor | None  # CSR [entries] or block table [B, max_pages]; None: dense
    starts: Tensor | None  # [B+1] where a sequence's entries start; None unless CSR
    lens: Tensor | None  # [B] tokens, for CSR tokens in the last page; None: dense and full

    @property
    def page_size(self) -> int:
        return self.kv_c.shape[1]

    @property
    def capacity(self) -> int | None:
        """Tokens of the longest sequence these tensors can hold, where the host knows it."""
        if self.table is None:
            return self.page_size
        return None if self.starts is not None else self.table.shape[1] * self.page_size

    @property
    def typical_len(self) -> int:
        """What the host can say about Skv without asking the device."""
        if self.capacity is not None:
            return self.capacity
        assert self.table is not None
        return self.table.numel() * self.page_size // max(self.B, 1)

    def lengths(self) -> list[int]:
        """Skv of every sequence. Asks the device."""
        if self.lens is None:
            return [self.page_size] * self.B
        lens = self.lens.tolist()
        if self.starts is None:
            return lens
        pages = self.starts.diff().tolist()
        return [
            (n - 1) * self.page_size + last if n else 0 for n, last in zip(pages, lens, strict=True)
        ]

    def pages(self, b: int, length: int) -> Tensor | None:
        """Physical pages of sequence b in order; None where it owns page b."""
        if self.table is None:
            return None
        count = -(-length // self.page_size)
        if self.starts is None:
            return self.table[b, :count]
        first = int(self.starts[b])
        return self.table[first : first + count]

    def rows(self, b: int, pages: Tensor | None, at: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Keys `at` of sequence b, [n,Lkv] and [n,R]. A slice of one page is a view, not a copy."""
        if pages is None:
            return self.kv_c[b, at], self.k_pe[b, at]
        if isinstance(at, slice):
            at = torch.arange(at.start, at.stop, device=pages.device)
        page, slot = pages[at // self.page_size].long(), at % self.page_size
        return self.kv_c[page, slot], self.k_pe[page, slot]


def build_csr(
    pages: Sequence[Sequence[int]],
    seq_lens: Sequence[int],
    page_size: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.int32,
) -> tuple[Tensor, Tensor, Tensor]:
    """kv_indptr, kv_indices, kv_last_page_lens from each sequence's physical pages.

    >>> build_csr([[7, 2], []], [20, 0], page_size=16)[0]
    tensor([0, 2, 2], dtype=torch.int32)
    """
    used = [list(p[: -(-n // page_size)]) for p, n in zip(pages, seq_lens, strict=True)]
    indptr = [0]
    for p in used:
        indptr.append(indptr[-1] + len(p))
    last = [(n - 1) % page_size + 1 if n else 0 for n in seq_lens]
    flat = [page for p in used for page in p]
    return (
        torch.tensor(indptr, dtype=dtype, device=device),
        torch.tensor(flat, dtype=dtype, device=device),
        torch.tensor(last, dtype=dtype, device=device),
    )


def build_block_table(
    pages: Sequence[Sequence[int]],
    *,
    fill: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.int32,
) -> Tensor:
    """[B, max_pages] from each sequence's physical pages; `fill` in the entries nobody reads.

    >>> build_block_table([[7, 2], [5]])
    tensor([[7, 2],
            [5, 0]], dtype=torch.int32)
    """
    width = max((len(p) for p in pages), default=0)
    rows = [[*p, *[fill] * (width - len(p))] for p in pages]
    return torch.tensor(rows, dtype=dtype, device=device).reshape(len(rows), width)
