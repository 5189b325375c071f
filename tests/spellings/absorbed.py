"""Queries absorbed: attention over the latent itself."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.spellings.common import SCALE, Inputs, absorbed_scores, numbers, up, wide


def deepseek_absorbed(x: Inputs) -> Tensor:
    """DeepSeek's inference code: the sum of two einsums over two caches, no mask at decode."""
    p = absorbed_scores(x).softmax(-1, dtype=torch.float32).type_as(x.kv_c)
    return up(torch.einsum("bsht,btc->bshc", p, x.kv_c), x)


def deepseek_absorbed_slices_a_larger_cache(x: Inputs) -> Tensor:
    kv_cache = x.kv_c.new_zeros(5, 96, 32)
    pe_cache = x.kv_c.new_zeros(5, 96, 8)
    B, Skv, _ = x.kv_c.shape
    kv_cache[:B, :Skv], pe_cache[:B, :Skv] = x.kv_c, x.k_pe
    return deepseek_absorbed(replace(x, kv_c=kv_cache[:B, :Skv], k_pe=pe_cache[:B, :Skv]))


def deepseek_fp32_operands(x: Inputs) -> Tensor:
    """V3.2: operands in fp32 before QK, a masked_fill, PV in the cache's type."""
    q = torch.einsum("bshd,hdc->bshc", x.q_nope, x.W_UK)
    s = torch.einsum("bshc,btc->bsht", wide(q), wide(x.kv_c))
    s = (s + torch.einsum("bshr,btr->bsht", wide(x.q_pe), wide(x.k_pe))) * SCALE
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
    s = wide(q @ k.mT)
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
    s = torch.where(x.visible[:, None], s, s.new_full((), float("-inf")))
    out = torch.bmm(torch.softmax(s, -1), x.kv_c).view(B, S, N, -1)
    return up(out, x)


def autocast(x: Inputs) -> torch.autocast:
    """Of fp32: operands are rounded where they are used, a cache once for each view of it."""
    full = x.kv_c.dtype is torch.float32
    return torch.autocast(x.kv_c.device.type, torch.bfloat16, enabled=full)


def absorbed_in_autocast(x: Inputs) -> Tensor:
    with autocast(x):
        return weighed(absorbed_scores(x), x)


def absorbed_fused_cache_in_autocast(x: Inputs) -> Tensor:
    with autocast(x):
        s = torch.einsum("bshd,btd->bsht", latent_queries(x), x.fused) * SCALE
        return weighed(s, replace(x, kv_c=x.fused[..., :32]))


def absorbed_fill_in_a_tensor(x: Inputs) -> Tensor:
    s = torch.where(x.visible[:, None, None], absorbed_scores(x), torch.tensor(-1e9))
    return up(torch.einsum("bsht,btc->bshc", s.softmax(-1), x.kv_c), x)


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


def weighed(scores: Tensor, x: Inputs) -> Tensor:
    """[B, Sq, N, V] from scores [B, Sq, N, Skv], masked or not."""
    p = scores.softmax(-1).to(x.kv_c.dtype)
    return up(torch.einsum("bsht,btc->bshc", p, x.kv_c), x)


def latent_queries(x: Inputs) -> Tensor:
    """[B, Sq, N, Lkv + R]"""
    return torch.cat([torch.einsum("bshd,hdc->bshc", x.q_nope, x.W_UK), x.q_pe], -1)


def absorbed_matmuls_with_a_mask_before_fp32_softmax(x: Inputs) -> Tensor:
    """ktransformers: rope first, matmuls that broadcast over heads, an additive mask."""
    q = x.q_nope.transpose(1, 2) @ x.W_UK
    rope = torch.matmul(x.q_pe.transpose(1, 2), x.k_pe.unsqueeze(1).mT)
    s = (rope + torch.matmul(q, x.kv_c.unsqueeze(-3).mT)) * SCALE + x.bias
    p = F.softmax(s, dim=-1, dtype=torch.float32).to(q.dtype)
    out = torch.einsum("bhql,blc->bhqc", p, x.kv_c)
    return torch.matmul(out, x.W_UV.mT).transpose(1, 2)


def absorbed_sdpa_over_one_key_head(x: Inputs) -> Tensor:
    """vLLM's and SGLang's references: grouped queries, values a slice of the keys."""
    k = x.fused[:, None]
    mask = x.visible[:, None, None]
    q = latent_queries(x).transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q, k, k[..., :32], attn_mask=mask, scale=SCALE, enable_gqa=True
    )
    return torch.einsum("bhsc,hdc->bshd", out, x.W_UV)


def absorbed_sdpa_over_concatenated_keys(x: Inputs) -> Tensor:
    k, v = torch.cat([x.kv_c, x.k_pe], -1)[:, None], x.kv_c[:, None]
    q = latent_queries(x).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, scale=SCALE, enable_gqa=True)
    return torch.einsum("bhsc,hdc->bshd", out, x.W_UV)


def absorbed_concatenated_keys(x: Inputs) -> Tensor:
    """TileLang's reference: the scale is a division by a square root."""
    k = torch.cat([x.kv_c, x.k_pe], -1)
    return weighed(torch.einsum("bshd,btd->bsht", latent_queries(x), k) / 24**0.5, x)


def absorbed_keys_repeated_over_heads(x: Inputs) -> Tensor:
    """FlashInfer's reference: repeat_interleave, fp32, masked where the mask is zero."""
    k = torch.cat([x.kv_c, x.k_pe], -1).unsqueeze(2).repeat_interleave(x.N, dim=2)
    v = x.kv_c.unsqueeze(2).repeat_interleave(x.N, dim=2)
    s = torch.einsum("bmhd,bnhd->bhmn", wide(latent_queries(x)), wide(k)) * SCALE
    p = s.masked_fill(x.keep == 0, float("-inf")).softmax(-1)
    return up(torch.einsum("bhmn,bnhd->bmhd", p, wide(v)).to(v.dtype), x)


def absorbed_causal_triangle(x: Inputs) -> Tensor:
    """The last queries of the cache, an additive triangle of -inf built in the step."""
    Sq, Skv = x.q_nope.shape[1], x.kv_c.shape[1]
    past = x.keep.new_ones(Sq, Skv).tril(Skv - Sq)
    bias = x.kv_c.new_zeros(Sq, Skv).masked_fill(~past, float("-inf"))
    return weighed(absorbed_scores(x) + bias[:, None], x)


def absorbed_causal_positions(x: Inputs) -> Tensor:
    """Each sequence at its own position of a larger cache."""
    Sq, Skv = x.q_nope.shape[1], x.kv_c.shape[1]
    position = (x.lens - Sq)[:, None] + torch.arange(Sq, device=x.lens.device)
    past = torch.arange(Skv, device=x.lens.device) <= position[..., None]
    return weighed(absorbed_scores(x).masked_fill(~past[:, :, None], float("-inf")), x)


def absorbed_square_roots_of_the_scale(x: Inputs) -> Tensor:
    root = SCALE**0.5
    q = torch.einsum("bshd,hdc->bshc", x.q_nope, x.W_UK) * root
    s = torch.einsum("bshc,btc->bsht", q, x.kv_c * root)
    return weighed(s + torch.einsum("bshr,btr->bsht", x.q_pe * root, x.k_pe * root), x)


def absorbed_scale_of_one_element(x: Inputs) -> Tensor:
    """A buffer of shape [1], as torch.FloatTensor([width]) makes it."""
    return weighed(absorbed_scores(x) / (4 + x.q_pe.flatten()[:1].sigmoid()), x)


def absorbed_from_the_second_half_of_a_batch(x: Inputs) -> Tensor:
    """Two layers in one dimension: no label is split where it stays within one of them."""
    layers = torch.stack([x.kv_c + 1, x.kv_c]).flatten(0, 1)
    own = replace(x, kv_c=layers[x.kv_c.shape[0] :])
    return weighed(absorbed_scores(own), own)


def absorbed_bias_of_every_head(x: Inputs) -> Tensor:
    """ALiBi: an additive mask with a head dimension."""
    slopes = 0.5 ** numbers(x)[1 : x.N + 1]
    bias = slopes[:, None] * numbers(x) / 8
    return weighed(absorbed_scores(x) + bias, x)


def absorbed_penalties_subtracted(x: Inputs) -> Tensor:
    """ALiBi by distance, tokens hidden by a large number."""
    slopes = 0.5 ** numbers(x)[1 : x.N + 1]
    far = torch.flip(numbers(x), (0,)) / 8
    hidden = (~x.keep).to(torch.float32).transpose(1, 2)
    return weighed(wide(absorbed_scores(x)) - slopes[:, None] * far - 1e9 * hidden, x)


def absorbed_soft_cap(x: Inputs) -> Tensor:
    return weighed(torch.tanh(absorbed_scores(x) / 5) * 5, x)


def absorbed_soft_cap_of_two_score_terms_under_a_mask(x: Inputs) -> Tensor:
    s = 2 * (wide(absorbed_scores(x)) * 0.5).tanh()
    s = s.masked_fill(~x.visible[:, None, None], float("-inf"))
    return weighed(s.to(x.kv_c.dtype), x)


def absorbed_heads_looped(x: Inputs) -> Tensor:
    outs = []
    for h in range(x.N):
        q = x.q_nope[:, :, h] @ x.W_UK[h]
        s = (q @ x.kv_c.mT + x.q_pe[:, :, h] @ x.k_pe.mT) * SCALE
        outs.append(s.softmax(-1) @ x.kv_c @ x.W_UV[h].T)
    return torch.stack(outs, 2)


def absorbed_sequences_looped(x: Inputs) -> Tensor:
    outs = []
    for b in range(3):
        one = {k: getattr(x, k)[b : b + 1] for k in ("q_nope", "q_pe", "kv_c", "k_pe")}
        outs.append(deepseek_absorbed(replace(x, **one)))
    return torch.cat(outs)
