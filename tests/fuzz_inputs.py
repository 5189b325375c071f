"""What a program of the grammar reads: queries, caches of every layout, weights, masks."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

PAGE = 4


@dataclass(frozen=True)
class Sizes:
    """The symbols of DESIGN.md; Skv is a multiple of PAGE."""

    B: int
    Sq: int
    Skv: int
    N: int
    Lkv: int
    R: int
    P: int
    V: int

    @property
    def longer(self) -> Sizes:
        """Other sizes for a graph with dynamic ones; a batch of one is never dynamic."""
        return replace(self, B=self.B + (self.B > 1), Skv=self.Skv + 2 * PAGE)


@dataclass
class Inputs:
    """What the programs read; `dynamic` names the dimensions that may be symbolic."""

    q_nope: Tensor  # [B, Sq, N, P]
    q_pe: Tensor  # [B, Sq, N, R]
    kv_c: Tensor  # [B, Skv, Lkv]
    k_pe: Tensor  # [B, Skv, R]
    fused: Tensor  # [B, Skv, Lkv + R]
    other: Tensor  # [B, Skv, Lkv + R], another layer's cache
    pool: Tensor  # [pages, PAGE, Lkv + R]
    table: Tensor  # [B, Skv / PAGE], into the pages
    slots: Tensor  # [B, Skv], into the tokens of the pool
    w: Tensor  # [N * (P + V), Lkv], kv_b_proj
    norm: Tensor  # [Lkv]
    lens: Tensor  # [B]
    keep: Tensor  # [B, 1, Sq, Skv] bool
    temperature: Tensor  # []

    dynamic: ClassVar[dict[str, tuple[int, ...]]] = {
        "q_nope": (0,),
        "q_pe": (0,),
        "kv_c": (0, 1),
        "k_pe": (0, 1),
        "fused": (0, 1),
        "other": (0, 1),
        "pool": (0,),
        "table": (0, 1),
        "slots": (0, 1),
        "lens": (0,),
        "keep": (0, 3),
    }

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def to(self, dtype: torch.dtype) -> Inputs:
        floats = {k: t.to(dtype) for k, t in self.tensors().items() if t.is_floating_point()}
        return replace(self, **floats)

    def of_head(self, h: int) -> Inputs:
        rows = self.w.shape[0] // self.q_nope.shape[2]
        q_nope, q_pe = self.q_nope[:, :, h : h + 1], self.q_pe[:, :, h : h + 1]
        return replace(self, q_nope=q_nope, q_pe=q_pe, w=self.w[h * rows : (h + 1) * rows])

    def of_sequence(self, b: int) -> Inputs:
        batched = [k for k, dims in self.dynamic.items() if 0 in dims and k != "pool"]
        return replace(self, **{k: getattr(self, k)[b : b + 1] for k in batched})


def inputs(n: Sizes, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    fused, pages = normal(n.B, n.Skv, n.Lkv + n.R), n.B * n.Skv // PAGE
    table = torch.randperm(pages + 3, generator=generator)[:pages].view(n.B, -1)
    slots = (table[..., None] * PAGE + torch.arange(PAGE)).flatten(1)
    keep = torch.rand(n.B, 1, n.Sq, n.Skv, generator=generator) < 0.7
    keep[..., 0] = True
    return Inputs(
        q_nope=normal(n.B, n.Sq, n.N, n.P),
        q_pe=normal(n.B, n.Sq, n.N, n.R),
        kv_c=fused[..., : n.Lkv].clone(),
        k_pe=fused[..., n.Lkv :].clone(),
        fused=fused,
        other=normal(n.B, n.Skv, n.Lkv + n.R),
        pool=normal(pages + 3, PAGE, n.Lkv + n.R),
        table=table,
        slots=slots,
        w=normal(n.N * (n.P + n.V), n.Lkv) / n.Lkv**0.5,
        norm=1 + normal(n.Lkv) / 4,
        lens=torch.randint(1, n.Skv + 1, (n.B,), generator=generator),
        keep=keep,
        temperature=torch.tensor(1.25),
    )
