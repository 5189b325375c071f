"""MLA decode attention, as people write it.  Every function takes an `Inputs` and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

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
    P: int = 16

    def to(self, dtype: torch.dtype) -> Inputs:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "P"}
        return replace(
            self, **{k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}
        )

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
        return torch.arange(self.kv_c.shape[1]) < self.lens[:, None]


def inputs(B: int = 3, Sq: int = 1, Skv: int = 48, N: int = 4, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    fused = normal(B, Skv, 40)
    keep = torch.rand(B, 1, Sq, Skv, generator=generator) < 0.7
    keep[..., 0] = True
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
    )


def absorbed_scores(x: Inputs) -> Tensor:
    q = torch.einsum("bshd,hdc->bshc", x.q_nope, x.W_UK)
    latent = torch.einsum("bshc,btc->bsht", q, x.kv_c)
    return (latent + torch.einsum("bshr,btr->bsht", x.q_pe, x.k_pe)) * SCALE


def up(out: Tensor, x: Inputs) -> Tensor:
    return torch.einsum("bshc,hdc->bshd", out, x.W_UV)


def deepseek_absorbed(x: Inputs) -> Tensor:
    """DeepSeek's inference code: the sum of two einsums over two caches, no mask at decode."""
    p = absorbed_scores(x).softmax(-1, dtype=torch.float32).type_as(x.kv_c)
    return up(torch.einsum("bsht,btc->bshc", p, x.kv_c), x)


def deepseek_absorbed_slices_a_larger_cache(x: Inputs) -> Tensor:
    kv_cache = torch.zeros(5, 96, 32, dtype=x.kv_c.dtype)
    pe_cache = torch.zeros(5, 96, 8, dtype=x.kv_c.dtype)
    B, Skv, _ = x.kv_c.shape
    kv_cache[:B, :Skv], pe_cache[:B, :Skv] = x.kv_c, x.k_pe
    return deepseek_absorbed(replace(x, kv_c=kv_cache[:B, :Skv], k_pe=pe_cache[:B, :Skv]))


def deepseek_fp32_operands(x: Inputs) -> Tensor:
    """V3.2: operands in fp32 before QK, a masked_fill, PV in the cache's type."""
    q = torch.einsum("bshd,hdc->bshc", x.q_nope, x.W_UK)
    s = torch.einsum("bshc,btc->bsht", q.float(), x.kv_c.float())
    s = (s + torch.einsum("bshr,btr->bsht", x.q_pe.float(), x.k_pe.float())) * SCALE
    s = s.masked_fill(~x.keep.transpose(1, 2), float("-inf"))
    p = s.softmax(-1, dtype=torch.float32).type_as(x.kv_c)
    return up(torch.einsum("bsht,btc->bshc", p, x.kv_c), x)


def absorbed_fused_cache(x: Inputs) -> Tensor:
    """One buffer of kv_c and k_pe; q concatenated; values are its first columns."""
    q = torch.cat([torch.einsum("bshd,hdc->bshc", x.q_nope, x.W_UK), x.q_pe], -1)
    s = torch.einsum("bshd,btd->bsht", q, x.fused) * SCALE
    s = s.masked_fill(~x.visible[:, None, None], float("-inf"))
    return up(torch.einsum("bsht,btc->bshc", s.softmax(-1), x.fused[..., :32]), x)


def absorbed_fused_cache_split(x: Inputs) -> Tensor:
    kv_c, k_pe = x.fused.split([32, 8], -1)
    return absorbed_scaled_queries(replace(x, kv_c=kv_c, k_pe=k_pe))


def absorbed_scaled_queries(x: Inputs) -> Tensor:
    """Heads first, the scale in q, K concatenated and repeated over heads, softmax by hand."""
    q = torch.cat([x.q_nope.transpose(1, 2) @ x.W_UK, x.q_pe.transpose(1, 2)], -1) * SCALE
    k = torch.cat([x.kv_c, x.k_pe], -1)[:, None].repeat_interleave(x.N, dim=1)
    s = (q @ k.mT).float()
    s = s.masked_fill(x.visible.logical_not()[:, None, None], torch.finfo(torch.float32).min)
    e = (s - s.amax(-1, keepdim=True)).exp()
    p = (e / e.sum(-1, keepdim=True)).to(q.dtype)
    return up((p @ k[..., :32]).transpose(1, 2), x)


def absorbed_flattened_heads(x: Inputs) -> Tensor:
    """3-D bmm over flattened query rows, baddbmm, a where mask."""
    B, S, N, _ = x.q_nope.shape
    q = torch.bmm(x.q_nope.permute(2, 0, 1, 3).reshape(N, B * S, -1), x.W_UK)
    q = q.view(N, B, S, -1).permute(1, 2, 0, 3).reshape(B, S * N, -1)
    rope = torch.bmm(x.q_pe.reshape(B, S * N, -1), x.k_pe.transpose(1, 2))
    s = torch.baddbmm(rope, q, x.kv_c.transpose(1, 2), beta=SCALE, alpha=SCALE)
    s = torch.where(x.visible[:, None], s, torch.full((), float("-inf"), dtype=s.dtype))
    out = torch.bmm(torch.softmax(s, -1), x.kv_c).view(B, S, N, -1)
    return up(out, x)


def absorbed_multiply_and_sum(x: Inputs) -> Tensor:
    """Broadcast multiply and sum, tokens before heads, the scale as a division."""
    q = (x.q_nope.unsqueeze(-1) * x.W_UK).sum(-2)
    s = (q[:, None] * x.kv_c[:, :, None, None]).sum(-1)
    s = (s + (x.q_pe[:, None] * x.k_pe[:, :, None, None]).sum(-1)) / (1 / SCALE)
    s = torch.where(x.visible[:, :, None, None], s, -1e30)
    return up(torch.einsum("btsh,btc->bshc", s.softmax(1), x.kv_c), x)


def absorbed_without_rope(x: Inputs) -> Tensor:
    q = torch.einsum("bshd,hdc->bshc", x.q_nope, x.W_UK)
    p = (torch.einsum("bshc,btc->bsht", q, x.kv_c) * SCALE).softmax(-1)
    return up(torch.einsum("bsht,btc->bshc", p, x.kv_c), x)


def absorbed_different_scales(x: Inputs) -> Tensor:
    q = torch.einsum("bshd,hdc->bshc", x.q_nope, x.W_UK)
    s = torch.einsum("bshc,btc->bsht", q, x.kv_c) * 0.5
    s = s + torch.einsum("bshr,btr->bsht", x.q_pe, x.k_pe) * 0.25
    return up(torch.einsum("bsht,btc->bshc", s.softmax(-1), x.kv_c), x)


def expand(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Hugging Face's template: q, k [B, N, S, P + R] and v [B, N, Skv, V]; K by new_empty and two copies."""
    B, Skv, _ = x.kv_c.shape
    q = torch.cat([x.q_nope, x.q_pe], -1).transpose(1, 2)
    kv = F.linear(x.kv_c, x.w).view(B, Skv, x.N, -1).transpose(1, 2)
    k_nope, v = kv.split([x.P, kv.shape[-1] - x.P], dim=-1)
    k = k_nope.new_empty(B, x.N, Skv, x.P + x.k_pe.shape[-1])
    k[..., : x.P] = k_nope
    k[..., x.P :] = x.k_pe[:, None].expand(-1, x.N, -1, -1)
    return q, k, v


def expanded_eager(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    s = torch.matmul(q, k.transpose(2, 3)) * SCALE
    p = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(p, 0.0, training=False), v).transpose(1, 2).contiguous()


def expanded_eager_additive_mask_input(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    s = torch.matmul(q, k.transpose(2, 3)) * SCALE + x.bias.to(q.dtype)
    return torch.matmul(s.softmax(-1, dtype=torch.float32).to(q.dtype), v).transpose(1, 2)


def expanded_eager_length_mask(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    low = torch.finfo(q.dtype).min
    mask = torch.zeros((), dtype=q.dtype).masked_fill(~x.visible[:, None, None], low)
    s = torch.matmul(q, k.transpose(2, 3)) * SCALE + mask
    return torch.matmul(s.softmax(-1, dtype=torch.float32).to(q.dtype), v).transpose(1, 2)


def expanded_sdpa(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    return F.scaled_dot_product_attention(q, k, v, scale=SCALE).transpose(1, 2)


def expanded_sdpa_mask_input(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=x.keep, scale=SCALE).transpose(1, 2)


def expanded_sdpa_length_mask(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    mask = x.visible[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE).transpose(1, 2)


def expanded_two_linears(x: Inputs) -> Tensor:
    """Separate W_UK and W_UV, K by cat and expand, the mask before the scale."""
    B, Skv, _ = x.kv_c.shape
    q = torch.cat([x.q_nope, x.q_pe], -1).transpose(1, 2)
    k = F.linear(x.kv_c, x.W_UK.reshape(-1, 32)).view(B, Skv, x.N, -1).transpose(1, 2)
    v = F.linear(x.kv_c, x.W_UV.reshape(-1, 32)).view(B, Skv, x.N, -1).transpose(1, 2)
    k = torch.cat([k, x.k_pe[:, None].expand(B, x.N, Skv, -1)], -1)
    s = (q @ k.mT).masked_fill(~x.visible[:, None, None], float("-inf"))
    return ((s * SCALE).softmax(-1) @ v).transpose(1, 2)


def expanded_heads_last(x: Inputs) -> Tensor:
    """DeepSeek's naive mode, with the expansion in the step: einsums over [B, S, N, D]."""
    q = torch.cat([x.q_nope, x.q_pe], -1)
    kv = F.linear(x.kv_c, x.w).unflatten(-1, (x.N, -1))
    k = torch.cat([kv[..., : x.P], x.k_pe.unsqueeze(2).expand(-1, -1, x.N, -1)], -1)
    s = torch.einsum("bshd,bthd->bsht", q, k) * SCALE
    return torch.einsum("bsht,bthd->bshd", s.softmax(-1), kv[..., x.P :])


def expanded_after_a_cache_write(x: Inputs) -> Tensor:
    """A static cache: the new token is written, then all of it is read."""
    position = x.lens[:1] - 1
    kv_c = x.kv_c.index_copy(1, position, x.kv_c[:, :1] * 2)
    k_pe = x.k_pe.index_copy(1, position, x.k_pe[:, :1] * 2)
    return expanded_sdpa_length_mask(replace(x, kv_c=kv_c, k_pe=k_pe))


def expanded_after_a_cache_append(x: Inputs) -> Tensor:
    """A dynamic cache: the new token is appended."""
    kv_c = torch.cat([x.kv_c, x.kv_c[:, :1] * 2], 1)
    k_pe = torch.cat([x.k_pe, x.k_pe[:, :1] * 2], 1)
    return expanded_eager(replace(x, kv_c=kv_c, k_pe=k_pe))


POSITIVES = [
    deepseek_absorbed,
    deepseek_absorbed_slices_a_larger_cache,
    deepseek_fp32_operands,
    absorbed_fused_cache,
    absorbed_fused_cache_split,
    absorbed_scaled_queries,
    absorbed_flattened_heads,
    absorbed_multiply_and_sum,
    absorbed_without_rope,
    absorbed_different_scales,
    expanded_eager,
    expanded_eager_additive_mask_input,
    expanded_eager_length_mask,
    expanded_sdpa,
    expanded_sdpa_mask_input,
    expanded_sdpa_length_mask,
    expanded_two_linears,
    expanded_heads_last,
    expanded_after_a_cache_write,
    expanded_after_a_cache_append,
]
