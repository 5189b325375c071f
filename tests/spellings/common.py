"""What the spellings of MLA are written over."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 0.21
DYNAMIC = {
    "q_nope": (0,),
    "q_pe": (0,),
    "kv_c": (0, 1),
    "k_pe": (0, 1),
    "fused": (0, 1),
    "lens": (0,),
    "keep": (0, 3),
    "bias": (0, 3),
    "pool": (0,),
    "table": (0, 1),
}


@dataclass
class Inputs:
    """P = V = 16, Lkv = 32, R = 8; lens[b] cached tokens of sequence b are its own."""

    q_nope: Tensor  # [B, Sq, N, P]
    q_pe: Tensor  # [B, Sq, N, R]
    kv_c: Tensor  # [B, Skv, Lkv]
    k_pe: Tensor  # [B, Skv, R]
    fused: Tensor  # [B, Skv, Lkv + R]
    w: Tensor  # [N * (P + V), Lkv], kv_b_proj
    lens: Tensor  # [B]
    keep: Tensor  # [B, 1, Sq, Skv] bool
    bias: Tensor  # [B, 1, Sq, Skv]
    pool: Tensor  # [pages, page_size, Lkv + R]: fused is pool[table], other pages are NaN
    table: Tensor  # [B, Skv / page_size]
    P: int = 16

    def to(self, dtype: torch.dtype, device: str = "cpu") -> Inputs:
        def moved(t: Tensor) -> Tensor:
            return t.to(device, dtype if t.is_floating_point() else t.dtype)

        tensors: dict[str, Any] = {
            f.name: moved(getattr(self, f.name)) for f in fields(self) if f.name != "P"
        }
        return replace(self, **tensors)

    def with_dynamic_sizes(self) -> Inputs:
        """The same, with the number of sequences and of cached tokens marked as dynamic."""
        for name, dims in DYNAMIC.items():
            for dim in dims:
                torch._dynamo.mark_dynamic(getattr(self, name), dim)
        return self

    @property
    def N(self) -> int:
        return self.q_nope.shape[2]

    @property
    def W_UK(self) -> Tensor:  # [N, P, Lkv]
        return self.w.view(self.N, 2 * self.P, -1)[:, : self.P]

    @property
    def W_UV(self) -> Tensor:  # [N, V, Lkv]
        return self.w.view(self.N, 2 * self.P, -1)[:, self.P :]

    @property
    def visible(self) -> Tensor:  # [B, Skv] bool
        return torch.arange(self.kv_c.shape[1], device=self.lens.device) < self.lens[:, None]


def inputs(B: int = 3, Sq: int = 1, Skv: int = 48, N: int = 4, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    pages = torch.randperm(B * Skv // 4 + 5, generator=generator)
    table = pages[5:].view(B, Skv // 4).to(torch.int32)
    pool = normal(len(pages), 4, 40).index_fill(0, pages[:5], torch.nan)
    fused = pool[table].view(B, Skv, 40)
    keep = torch.rand(B, 1, Sq, Skv, generator=generator) < 0.7
    keep[..., :1] = True
    return Inputs(
        q_nope=normal(B, Sq, N, 16),
        q_pe=normal(B, Sq, N, 8),
        kv_c=fused[..., :32].clone(),
        k_pe=fused[..., 32:].clone(),
        fused=fused,
        w=normal(N * 32, 32) / 32**0.5,
        lens=torch.randint(Skv // 2, Skv + 1, (B,), generator=generator),
        keep=keep,
        bias=torch.where(keep, 0.0, torch.finfo(torch.bfloat16).min),
        pool=pool,
        table=table,
    )


def absorbed_scores(x: Inputs) -> Tensor:
    q = torch.einsum("bshd,hdc->bshc", x.q_nope, x.W_UK)
    latent = torch.einsum("bshc,btc->bsht", q, x.kv_c)
    return (latent + torch.einsum("bshr,btr->bsht", x.q_pe, x.k_pe)) * SCALE


def numbers(x: Inputs) -> Tensor:
    """[Skv], the number of every cached token."""
    return torch.arange(x.kv_c.shape[1], dtype=x.kv_c.dtype, device=x.kv_c.device)


def wide(x: Tensor) -> Tensor:
    """In fp32, or in fp64 where an exact result is asked for."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def up(out: Tensor, x: Inputs) -> Tensor:
    return torch.einsum("bshc,hdc->bshd", out, x.W_UV)


def expand(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Hugging Face's template: q, k [B, N, S, P + R], v [B, N, Skv, V]; K by copies."""
    B, Skv, _ = x.kv_c.shape
    q = torch.cat([x.q_nope, x.q_pe], -1).transpose(1, 2)
    kv = F.linear(x.kv_c, x.w).view(B, Skv, x.N, -1).transpose(1, 2)
    k_nope, v = kv.split([x.P, kv.shape[-1] - x.P], dim=-1)
    k = k_nope.new_empty(B, x.N, Skv, x.P + x.k_pe.shape[-1])
    k[..., : x.P] = k_nope
    k[..., x.P :] = x.k_pe[:, None].expand(-1, x.N, -1, -1)
    return q, k, v
