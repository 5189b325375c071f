"""Keys and values expanded from the latent in the step, as Hugging Face's models do."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.spellings.common import SCALE, Inputs, expand, numbers, wide


def expanded_eager(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    s = torch.matmul(q, k.transpose(2, 3)) * SCALE
    p = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(p, 0.0, training=False), v).transpose(1, 2).contiguous()


def expanded_eager_additive_mask_input(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    s = torch.matmul(q, k.transpose(2, 3)) * SCALE + x.bias.to(q.dtype)
    return torch.matmul(s.softmax(-1, dtype=torch.float32).to(q.dtype), v).transpose(1, 2)


def expanded_eager_additive_mask_filled_again(x: Inputs) -> Tensor:
    """An indexer hides more tokens than the mask that is handed in."""
    q, k, v = expand(x)
    mask = x.bias.to(q.dtype).masked_fill(~x.keep, torch.finfo(q.dtype).min)
    s = torch.matmul(q, k.transpose(2, 3)) * SCALE + mask
    return torch.matmul(s.softmax(-1, dtype=torch.float32).to(q.dtype), v).transpose(1, 2)


def expanded_eager_length_mask(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    low = torch.finfo(q.dtype).min
    mask = q.new_zeros(()).masked_fill(~x.visible[:, None, None], low)
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


def expanded_rope_repeated(x: Inputs) -> Tensor:
    B, Skv, _ = x.kv_c.shape
    k, v = F.linear(x.kv_c, x.w).view(B, Skv, x.N, -1).chunk(2, dim=-1)
    k = torch.cat([k, x.k_pe.unsqueeze(2).repeat(1, 1, x.N, 1)], -1)
    s = torch.einsum("bshd,bthd->bhst", torch.cat([x.q_nope, x.q_pe], -1), k) * SCALE
    return torch.einsum("bhst,bthd->bshd", s.softmax(-1), v)


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


def angles(x: Inputs, count: int) -> tuple[Tensor, Tensor]:
    """cos and sin [Skv, count] of every position."""
    position = numbers(x).float()
    angle = position[:, None] * 0.01 * torch.arange(1, count + 1, device=position.device)
    return angle.cos().to(x.k_pe.dtype), angle.sin().to(x.k_pe.dtype)


def expanded_rope_in_the_step_from_a_unified_cache(x: Inputs) -> Tensor:
    """GPU MODE's reference: all cached k_pe are rotated in each step."""
    B, Skv, _ = x.fused.shape
    kv_c, k_pe = x.fused.split([32, 8], -1)
    cos, sin = angles(x, 8)
    a, b = k_pe.chunk(2, -1)
    k_pe = k_pe * cos + torch.cat([-b, a], -1) * sin
    k, v = F.linear(kv_c, x.w).view(B, Skv, x.N, -1).split([16, 16], -1)
    k = torch.cat([k, k_pe[:, :, None].expand(-1, -1, x.N, -1)], -1).transpose(1, 2)
    q = torch.cat([x.q_nope, x.q_pe], -1).transpose(1, 2)
    p = F.softmax(torch.matmul(q, k.mT) / math.sqrt(24), dim=-1)
    out: Tensor = p @ v.transpose(1, 2)
    return out.transpose(1, 2)


def expanded_rope_in_the_step_by_halves(x: Inputs) -> Tensor:
    cos, sin = angles(x, 4)
    a, b = x.k_pe.chunk(2, -1)
    return expanded_eager(replace(x, k_pe=torch.cat([a * cos - b * sin, a * sin + b * cos], -1)))


def expanded_rope_in_the_step_interleaved(x: Inputs) -> Tensor:
    cos, sin = angles(x, 4)
    a, b = x.k_pe[..., 0::2], x.k_pe[..., 1::2]
    k_pe = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return expanded_eager(replace(x, k_pe=k_pe))


def expanded_rope_in_the_step_complex(x: Inputs) -> Tensor:
    B, Skv, _ = x.k_pe.shape
    cos, sin = angles(x, 4)
    pairs = torch.view_as_complex(x.k_pe.float().reshape(B, Skv, 4, 2))
    k_pe = torch.view_as_real(pairs * torch.complex(cos.float(), sin.float())).flatten(-2)
    return expanded_eager(replace(x, k_pe=k_pe.to(x.k_pe.dtype)))


def expanded_from_a_latent_that_is_normalised_twice(x: Inputs) -> Tensor:
    """Each projection normalises for itself."""
    B, Skv, _ = x.kv_c.shape
    k, v = (
        F.linear(F.rms_norm(x.kv_c, x.kv_c.shape[-1:]), w.reshape(-1, 32)) for w in (x.W_UK, x.W_UV)
    )
    k, v = (t.view(B, Skv, x.N, -1).transpose(1, 2) for t in (k, v))
    k = torch.cat([k, x.k_pe[:, None].expand(B, x.N, Skv, -1)], -1)
    q = torch.cat([x.q_nope, x.q_pe], -1).transpose(1, 2)
    return ((q @ k.mT * SCALE).softmax(-1) @ v).transpose(1, 2)


def expanded_two_linears_without_rope(x: Inputs) -> Tensor:
    """Educational code: mask before the scale, heads merged at the end, dropout in eval mode."""
    B, Skv, _ = x.kv_c.shape
    k = F.linear(x.kv_c, x.W_UK.reshape(-1, 32)).view(B, Skv, x.N, -1).transpose(1, 2)
    v = F.linear(x.kv_c, x.W_UV.reshape(-1, 32)).view(B, Skv, x.N, -1).transpose(1, 2)
    s = x.q_nope.transpose(1, 2) @ k.transpose(2, 3)
    s.masked_fill_(~x.keep, -torch.inf)
    p = F.dropout(torch.softmax(s / k.shape[-1] ** 0.5, dim=-1), 0.1, training=False)
    return (p @ v).transpose(1, 2).contiguous().view(B, -1, x.N * 16)


def expanded_heads_looped(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    outs = [torch.softmax(q[:, h] @ k[:, h].mT * SCALE, -1) @ v[:, h] for h in range(x.N)]
    return torch.stack(outs, 2)


def expanded_multiply_and_sum(x: Inputs) -> Tensor:
    """What Inductor makes of a bmm of one row under coordinate-descent tuning."""
    q, k, v = expand(x)
    p = ((q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1) * SCALE).softmax(-1)
    return (p.unsqueeze(-1) * v.unsqueeze(-3)).sum(-2).transpose(1, 2)


def expanded_sdpa_additive_mask_input(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    mask = x.bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE).transpose(1, 2)


def expanded_bias_of_every_head(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    slopes = 0.5 ** numbers(x)[1 : x.N + 1]
    bias = slopes[:, None, None] * numbers(x) / 8
    return (((q @ k.mT) * SCALE + bias).softmax(-1) @ v).transpose(1, 2)


def expanded_keys_and_values_unbound(x: Inputs) -> Tensor:
    """Rope dimensions are repeated side by side, then viewed as heads."""
    B, Skv, _ = x.kv_c.shape
    k, v = F.linear(x.kv_c, x.w).view(B, Skv, x.N, 2, x.P).permute(3, 0, 2, 1, 4).unbind(0)
    k_pe = x.k_pe.repeat(1, 1, x.N).view(B, Skv, x.N, -1).transpose(1, 2)
    q = torch.cat([x.q_nope, x.q_pe], -1).transpose(1, 2)
    return ((q @ torch.cat([k, k_pe], -1).mT * SCALE).softmax(-1) @ v).transpose(1, 2)


def expanded_for_groups_of_heads(x: Inputs, width: int = 24) -> Tensor:
    """Fewer key heads than query heads: grouped-query attention over a latent cache."""
    B, Skv, _ = x.kv_c.shape
    k, v = F.linear(x.kv_c, x.w[:64]).view(B, Skv, 2, 32).transpose(1, 2).split([16, 16], -1)
    k = torch.cat([k, x.k_pe[:, None].expand(-1, 2, -1, -1)], -1)[..., :width]
    q = torch.cat([x.q_nope, x.q_pe], -1).transpose(1, 2)[..., :width]
    out = F.scaled_dot_product_attention(q, k, v, x.keep, scale=SCALE, enable_gqa=True)
    return out.transpose(1, 2)


def expanded_for_groups_of_heads_without_rope(x: Inputs) -> Tensor:
    """Keys as wide as values: on a CPU the call stays fused."""
    return expanded_for_groups_of_heads(x, 16)


def biased(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of an nn.Linear as it is by default: kv_b_proj has a bias."""
    B, Skv, _ = x.kv_c.shape
    kv = F.linear(x.kv_c, x.w, x.w.sum(1)).view(B, Skv, x.N, -1).transpose(1, 2)
    k = torch.cat([kv[..., : x.P], x.k_pe[:, None].expand(-1, x.N, -1, -1)], -1)
    return torch.cat([x.q_nope, x.q_pe], -1).transpose(1, 2), k, kv[..., x.P :]


def expanded_with_biases(x: Inputs) -> Tensor:
    q, k, v = biased(x)
    s = (q @ k.mT * SCALE).masked_fill(~x.keep, float("-inf"))
    return (s.softmax(-1) @ v).transpose(1, 2)


def expanded_with_biases_by_sdpa(x: Inputs) -> Tensor:
    q, k, v = biased(x)
    mask = x.bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v / 2, mask, scale=SCALE).transpose(1, 2)


def expanded_with_biases_and_divided_late(x: Inputs) -> Tensor:
    q, k, v = biased(x)
    e = wide(q @ k.mT * SCALE).exp()
    return (e.to(v.dtype) @ v / e.sum(-1, keepdim=True)).to(v.dtype).transpose(1, 2)


def expanded_from_slices_of_a_fused_cache(x: Inputs) -> Tensor:
    """A linear of a strided slice becomes a bmm with a weight of stride zero."""
    return expanded_eager(replace(x, kv_c=x.fused[..., :32], k_pe=x.fused[..., 32:]))


def expanded_with_biases_from_slices_of_a_fused_cache(x: Inputs) -> Tensor:
    """Of a strided slice the bias is added to the bmm."""
    kv_c, k_pe = x.fused[..., :32], x.fused[..., 32:]
    return expanded_with_biases(replace(x, kv_c=kv_c, k_pe=k_pe))


def expanded_in_fp32(x: Inputs) -> Tensor:
    q, k, v = (wide(t) for t in expand(x))
    return ((q @ k.mT * SCALE).softmax(-1) @ v).transpose(1, 2).to(x.kv_c.dtype)


def expanded_batch_and_heads_flattened(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    B, N, Sq, _ = q.shape
    s = torch.bmm(q.reshape(B * N, Sq, -1), k.reshape(B * N, -1, 24).transpose(1, 2)) * SCALE
    out = torch.bmm(s.softmax(-1), v.reshape(B * N, -1, 16))
    return out.view(B, N, Sq, 16).transpose(1, 2)


def expanded_sdpa_without_rope(x: Inputs) -> Tensor:
    """Keys as wide as values: on a CPU the call stays fused, with its query's layout."""
    _, k, v = expand(x)
    q, mask = x.q_nope.transpose(1, 2), x.keep
    out = F.scaled_dot_product_attention(q, k[..., :16], v, attn_mask=mask, scale=SCALE)
    B, N, Sq, _ = out.shape
    return out.transpose(1, 2).contiguous().view(B, Sq, N * 16)


def expanded_sdpa_of_values_padded_to_the_width_of_the_keys(x: Inputs) -> Tensor:
    """Flash style: one width for all, the output cropped; on a CPU the call stays fused."""
    q, k, v = expand(x)
    v = F.pad(v, [0, k.shape[-1] - v.shape[-1]])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=x.keep, scale=SCALE)
    return out.transpose(1, 2).contiguous()[..., :16]


def expanded_values_joined_with_zeros(x: Inputs) -> Tensor:
    """The same by hand, divided after the values."""
    q, k, v = expand(x)
    e = wide(q @ k.mT * SCALE).exp()
    padded = torch.cat([v, torch.zeros_like(v[..., :8])], -1)
    out = e.to(v.dtype) @ padded / e.sum(-1, keepdim=True)
    return out[..., :16].to(v.dtype).transpose(1, 2)
