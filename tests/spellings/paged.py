"""Caches gathered from pools of pages: the op reads the pool, nothing is gathered."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.spellings.absorbed import absorbed_fused_cache, deepseek_absorbed, latent_queries
from tests.spellings.common import SCALE, Inputs, up, wide
from tests.spellings.expanded import expanded_sdpa_length_mask


def pages_by_table(x: Inputs) -> Tensor:
    """pool[block_table] as one long cache, under a length mask."""
    return absorbed_fused_cache(replace(x, fused=x.pool[x.table].view(len(x.table), -1, 40)))


def pages_without_a_mask(x: Inputs) -> Tensor:
    fused = x.pool[x.table].reshape(len(x.table), -1, 40)
    return deepseek_absorbed(replace(x, kv_c=fused[..., :32], k_pe=fused[..., 32:]))


def pages_by_index_select(x: Inputs) -> Tensor:
    fused = x.pool.index_select(0, x.table.flatten()).view(len(x.table), -1, 40)
    return absorbed_fused_cache(replace(x, fused=fused))


def pages_of_two_pools(x: Inputs) -> Tensor:
    kv_c, k_pe = x.pool[..., :32].contiguous(), x.pool[..., 32:].contiguous()
    kv_c, k_pe = kv_c[x.table].flatten(1, 2), k_pe[x.table].flatten(1, 2)
    return deepseek_absorbed(replace(x, kv_c=kv_c, k_pe=k_pe))


def pages_counted_from_the_end(x: Inputs) -> Tensor:
    """An index may be negative; a table must not."""
    fused = x.pool[x.table - x.pool.shape[0]].view(len(x.table), -1, 40)
    return absorbed_fused_cache(replace(x, fused=fused))


def pages_of_one_layer(x: Inputs) -> Tensor:
    """The pool of all layers, one of them selected, with a dimension for the one key head."""
    pools = torch.stack([x.pool.nan_to_num() * 2, x.pool]).unsqueeze(3)
    fused = pools[1][x.table].view(len(x.table), -1, 40)
    return absorbed_fused_cache(replace(x, fused=fused))


def pages_expanded(x: Inputs) -> Tensor:
    """Keys and values expanded from gathered latents."""
    fused = x.pool[x.table].view(len(x.table), -1, 40)
    return expanded_sdpa_length_mask(replace(x, kv_c=fused[..., :32], k_pe=fused[..., 32:]))


def slots(x: Inputs) -> Tensor:
    """[B, Skv], where in the pool each token is."""
    return (
        x.table[:, :, None] * 4 + torch.arange(4, dtype=torch.int32, device=x.table.device)
    ).flatten(1)


def tokens_by_slot(x: Inputs) -> Tensor:
    """SGLang: an index for each token, pages of one."""
    fused = x.pool.view(-1, 1, 40)[slots(x)].squeeze(2)
    return absorbed_fused_cache(replace(x, fused=fused))


def requests_by_table(x: Inputs) -> Tensor:
    """FlashMLA's and vLLM's references: a loop over requests, pages cut to the request's length."""
    outs = []
    for b, length in enumerate((45, 48, 19)):
        fused = x.pool[x.table[b]].view(-1, 40)[:length]
        s = wide(torch.einsum("qhd,kd->hqk", latent_queries(x)[b], fused)) * SCALE
        p = s.softmax(-1).to(fused.dtype)
        outs.append(torch.einsum("hqk,kd->qhd", p, fused[:, :32]))
    return up(torch.stack(outs), x)


def requests_by_sdpa(x: Inputs) -> Tensor:
    """vLLM's CPU reference: grouped-query sdpa of one request at a time."""
    outs = []
    for b in range(3):
        k = x.pool[x.table[b]].view(1, 1, -1, 40)
        q, mask = latent_queries(x)[b : b + 1].transpose(1, 2), x.visible[b, None]
        out = F.scaled_dot_product_attention(
            q, k, k[..., :32], attn_mask=mask, scale=SCALE, enable_gqa=True
        )
        outs.append(out.transpose(1, 2))
    return up(torch.cat(outs), x)


def requests_by_slot_with_lse(x: Inputs) -> tuple[Tensor, Tensor]:
    """AITER's reference: slots of all requests in one index_select, split, causal, with the lse."""
    Sq, Skv = x.q_nope.shape[1], x.kv_c.shape[1]
    tokens = x.pool.view(-1, 1, 40).index_select(0, slots(x).flatten())
    hidden = x.keep.new_ones(Sq, Skv).tril(Skv - Sq).logical_not()
    bias = x.kv_c.new_zeros(Sq, Skv, dtype=torch.float32).masked_fill_(hidden, float("-inf"))
    outs, lses = [], []
    for q, k in zip(latent_queries(x), tokens.split(Skv), strict=True):
        k = k.expand(-1, x.N, -1)
        s = torch.einsum("qhd,khd->hqk", wide(q), wide(k)) * SCALE + bias
        lses.append(s.logsumexp(-1))
        out = torch.einsum("hqk,khd->qhd", s.softmax(-1), wide(k[..., :32]))
        outs.append(out.to(q.dtype))
    return up(torch.stack(outs), x), torch.stack(lses)
