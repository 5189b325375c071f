"""Attention that looks like MLA and must be left alone, each for its own reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from mla_compile.passes.site import Reason
from tests.spellings import SCALE, Inputs, absorbed_scores, expand
from tests.spellings.expanded import biased


def attend(p: Tensor, x: Inputs, values: Tensor | None = None) -> Tensor:
    return torch.einsum("bsht,btc->bshc", p, x.kv_c if values is None else values)


def cache_of_expanded_heads(x: Inputs) -> Tensor:
    B, Skv, _ = x.kv_c.shape
    heads = x.fused.repeat(1, 1, x.N).view(B, Skv, x.N, -1).sin()
    q = torch.cat([x.q_nope, x.q_pe], -1)
    s = torch.einsum("bshd,bthd->bsht", q, heads[..., :24]) * SCALE
    return torch.einsum("bsht,bthd->bshd", s.softmax(-1), heads[..., 24:])


def grouped_query_cache(x: Inputs) -> Tensor:
    B, Skv, _ = x.kv_c.shape
    k, v = x.fused[..., :32].reshape(B, Skv, 2, 16).repeat_interleave(2, dim=2).chunk(2, -1)
    s = torch.einsum("bshd,bthd->bsht", x.q_pe, k) * SCALE
    return torch.einsum("bsht,bthd->bshd", s.softmax(-1), v)


def grouped_query_cache_of_keys_that_are_values(x: Inputs) -> Tensor:
    """A latent for each group of heads, side by side in memory: only a copy could be read."""
    B, Skv, _ = x.kv_c.shape
    k = x.fused[..., :16].reshape(B, Skv, 2, 8).repeat_interleave(2, dim=2)
    s = torch.einsum("bshd,bthd->bsht", x.q_pe, k) * SCALE
    return torch.einsum("bsht,bthd->bshd", s.softmax(-1), k)


def grouped_query_cache_by_sdpa(x: Inputs) -> Tensor:
    B, Skv, _ = x.kv_c.shape
    k, v = x.fused[..., :32].reshape(B, Skv, 2, 16).transpose(1, 2).chunk(2, -1)
    return F.scaled_dot_product_attention(x.q_pe.transpose(1, 2), k, v, enable_gqa=True)


def cache_of_transposed_features(x: Inputs) -> Tensor:
    kv_c = x.kv_c.mT.contiguous().mT.sin()
    return attend(absorbed_scores(replace(x, kv_c=kv_c)).softmax(-1), x, kv_c)


def values_of_another_cache(x: Inputs) -> Tensor:
    return attend(absorbed_scores(x).softmax(-1), x, x.fused[..., :32])


def keys_rounded_where_they_are_written(x: Inputs) -> Tensor:
    """slice_scatter writes in the type of what it writes into."""
    rounded = torch.zeros_like(x.kv_c, dtype=torch.bfloat16)
    keys = torch.slice_scatter(rounded, x.kv_c, 1).to(x.kv_c.dtype)
    return attend(absorbed_scores(replace(x, kv_c=keys)).softmax(-1), x)


def values_of_another_function(x: Inputs) -> Tensor:
    return attend(absorbed_scores(x).softmax(-1), x, x.kv_c.sin())


def values_of_other_columns(x: Inputs) -> Tensor:
    s = torch.einsum("bshr,btr->bsht", x.q_nope, x.kv_c[..., :16]) * SCALE
    return attend(s.softmax(-1), x, x.kv_c[..., 16:])


def values_overlap_the_keys(x: Inputs) -> Tensor:
    s = torch.einsum("bshr,btr->bsht", x.q_nope, x.kv_c[..., :16]) * SCALE
    return attend(s.softmax(-1), x, x.kv_c[..., 8:24])


def values_wider_than_the_keys(x: Inputs) -> Tensor:
    q = torch.einsum("bshd,hdc->bshc", x.q_nope, x.W_UK)
    s = torch.einsum("bshc,btc->bsht", q, x.fused[..., :32]) * SCALE
    return attend(s.softmax(-1), x, x.fused)


def values_in_reverse_order(x: Inputs) -> Tensor:
    return attend(absorbed_scores(x).softmax(-1), x, x.kv_c.flip(1))


def values_one_token_late(x: Inputs) -> Tensor:
    early = replace(x, kv_c=x.kv_c[:, :-1], k_pe=x.k_pe[:, :-1])
    return attend(absorbed_scores(early).softmax(-1), x, x.kv_c[:, 1:])


def values_shifted_by_padding(x: Inputs) -> Tensor:
    return attend(absorbed_scores(x).softmax(-1), x, F.pad(x.kv_c, [0, 0, 1, -1]))


def values_of_half_the_tokens_repeated(x: Inputs) -> Tensor:
    return attend(absorbed_scores(x).softmax(-1), x, x.kv_c[:, :24].repeat(1, 2, 1))


def values_unbound_from_another_layer(x: Inputs) -> Tensor:
    keys, values = torch.stack([x.kv_c, x.kv_c + 1]).unbind(0)
    return attend(absorbed_scores(replace(x, kv_c=keys)).softmax(-1), x, values)


def values_from_the_other_half_of_a_batch(x: Inputs) -> Tensor:
    B = x.kv_c.shape[0]
    layers = torch.stack([x.kv_c + 1, x.kv_c]).flatten(0, 1)
    return attend(absorbed_scores(replace(x, kv_c=layers[B:])).softmax(-1), x, layers[:B])


def values_of_another_sequence(x: Inputs) -> Tensor:
    return attend(absorbed_scores(x).softmax(-1), x, x.kv_c[:1].expand_as(x.kv_c))


def values_from_before_the_cache_write(x: Inputs) -> Tensor:
    written = x.kv_c.index_copy(1, x.lens[:1], x.kv_c[:, :1] * 2)
    return attend(absorbed_scores(replace(x, kv_c=written)).softmax(-1), x)


def score_squared(x: Inputs) -> Tensor:
    return attend(absorbed_scores(x).square().softmax(-1), x)


def negative_scale(x: Inputs) -> Tensor:
    return attend((absorbed_scores(x) * -1).softmax(-1), x)


def three_score_terms(x: Inputs) -> Tensor:
    s = absorbed_scores(x) + torch.einsum("bshr,btr->bsht", x.q_pe, x.k_pe.sin())
    return attend(s.softmax(-1), x)


def keys_that_no_query_meets(x: Inputs) -> Tensor:
    return attend((absorbed_scores(x) + x.k_pe.sum(-1)[:, None, None]).softmax(-1), x)


def probabilities_returned(x: Inputs) -> tuple[Tensor, Tensor]:
    p = absorbed_scores(x).softmax(-1)
    return attend(p, x), p


def scores_returned(x: Inputs) -> tuple[Tensor, Tensor]:
    s = absorbed_scores(x)
    return attend(s.softmax(-1), x), s


def expanded_keys_returned(x: Inputs) -> tuple[Tensor, Tensor]:
    q, k, v = expand(x)
    return ((q @ k.mT) * SCALE).softmax(-1) @ v, k


def expanded_values_used_again(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    return ((q @ k.mT) * SCALE).softmax(-1) @ v + v.mean(2, keepdim=True)


def softmax_over_heads(x: Inputs) -> Tensor:
    return attend(absorbed_scores(x).softmax(2), x)


def probabilities_without_a_sink(x: Inputs) -> Tensor:
    s = absorbed_scores(x)
    s = torch.cat([s, torch.zeros_like(s[..., :1])], -1)
    return attend(s.softmax(-1)[..., :-1], x)


def scores_padded_by_a_sink(x: Inputs) -> Tensor:
    return attend(F.pad(absorbed_scores(x), (0, 1)).softmax(-1)[..., :-1], x)


def mask_made_of_the_scores(x: Inputs) -> Tensor:
    s = absorbed_scores(x)
    return attend(s.masked_fill(s.abs() < 1e-3, float("-inf")).softmax(-1), x)


def mask_made_of_the_expanded_keys(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    empty = (k[..., :16] == 0).all(-1)[:, :, None]
    return (q @ k.mT * SCALE).masked_fill(empty, float("-inf")).softmax(-1) @ v


def sinks_under_a_shift(x: Inputs) -> Tensor:
    s = absorbed_scores(x)
    s = torch.cat([s, torch.zeros_like(s[..., :1])], -1)
    s = s - s.max(dim=-1, keepdim=True).values
    return attend(s.softmax(-1)[..., :-1], x)


def probabilities_of_hidden_tokens_zeroed(x: Inputs) -> Tensor:
    p = absorbed_scores(x).softmax(-1)
    return attend(p.masked_fill(~x.visible[:, None, None], 0.0), x)


def rows_of_probabilities_set_to_one(x: Inputs) -> Tensor:
    p = absorbed_scores(x).softmax(-1)
    return attend(p.masked_fill((x.lens > 30)[:, None, None, None], 1.0), x)


def unseen(s: Tensor) -> Tensor:
    """Rows that see nothing, as a safe softmax tells them."""
    return (s == -torch.inf).logical_not().any(-1, keepdim=True).logical_not()


def rows_that_see_something_zeroed(x: Inputs) -> Tensor:
    s = absorbed_scores(x).masked_fill(~x.visible[:, None, None], -torch.inf)
    return attend(torch.where(unseen(s), s.softmax(-1), 0.0), x)


def rows_zeroed_where_another_sees_nothing(x: Inputs) -> Tensor:
    """As many heads as sequences: the condition is read transposed."""
    heads = len(x.lens)
    x = replace(x, q_nope=x.q_nope[:, :, :heads], q_pe=x.q_pe[:, :, :heads], w=x.w[: heads * 32])
    s = absorbed_scores(x).masked_fill(~x.visible[:, None, None], -torch.inf)
    p = torch.where(unseen(s), 0.0, s.softmax(-1).transpose(0, 2))
    return torch.einsum("hsbt,btc->bshc", p, x.kv_c)


def exponentials_beside_their_lse(x: Inputs) -> tuple[Tensor, Tensor]:
    """What flash decoding merges."""
    s = absorbed_scores(x)
    top = s.amax(-1, keepdim=True)
    e = (s - top).exp()
    return attend(e, x), e.sum(-1, keepdim=True).log() + top


def probabilities_head_by_head(x: Inputs) -> Tensor:
    p = absorbed_scores(x).softmax(-1)
    return torch.stack([p[:, :, n] @ x.kv_c for n in range(x.N)], 2)


def scores_written_head_by_head(x: Inputs) -> Tensor:
    s = absorbed_scores(x)
    scores = torch.zeros_like(s)
    for n in range(x.N):
        scores[:, :, n] = s[:, :, n]
    return attend(scores.softmax(-1), x)


def probabilities_renormalised(x: Inputs) -> Tensor:
    p = absorbed_scores(x).softmax(-1)
    return attend(p * x.visible[:, None, None], x)


def probabilities_sharpened(x: Inputs) -> Tensor:
    return attend(absorbed_scores(x).softmax(-1).square(), x)


def two_fills(x: Inputs) -> Tensor:
    s = absorbed_scores(x).masked_fill(~x.visible[:, None, None], -5.0)
    return attend(s.masked_fill(~x.keep.transpose(1, 2), float("-inf")).softmax(-1), x)


def fill_of_infinity(x: Inputs) -> Tensor:
    return attend(
        absorbed_scores(x).masked_fill(~x.keep.transpose(1, 2), float("inf")).softmax(-1), x
    )


def length_and_another_fill(x: Inputs) -> Tensor:
    """A row that `keep` hides averages over all tokens, those past the length as well."""
    s = absorbed_scores(x).masked_fill(~x.visible[:, None, None], float("-inf"))
    low = torch.finfo(s.dtype).min
    return attend(s.masked_fill(~x.keep.transpose(1, 2), low).softmax(-1), x)


def two_fills_added(x: Inputs) -> Tensor:
    """A row that one of them hides averages over what the other one does not hide."""
    masks = x.visible[:, None, None], x.keep.transpose(1, 2)
    return attend(
        (absorbed_scores(x) + sum(torch.where(m, 0.0, -1e30) for m in masks)).softmax(-1), x
    )


def fill_scaled_down(x: Inputs) -> Tensor:
    mask = torch.where(x.visible[:, None, None], 0.0, -1e30) * 1e-30
    return attend((absorbed_scores(x) + mask).softmax(-1), x)


def fill_that_rope_is_added_to(x: Inputs) -> Tensor:
    q = torch.einsum("bshd,hdc->bshc", x.q_nope, x.W_UK)
    s = torch.einsum("bshc,btc->bsht", q, x.kv_c).masked_fill(~x.visible[:, None, None], -5.0)
    return attend((s + torch.einsum("bshr,btr->bsht", x.q_pe, x.k_pe)).softmax(-1), x)


def dropout(x: Inputs) -> Tensor:
    return attend(F.dropout(absorbed_scores(x).softmax(-1), 0.5, training=True), x)


def prefill(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


def positions_between_latent_and_keys(x: Inputs) -> Tensor:
    """A rotation of the expanded keys by position: W_UK cannot move past it."""
    q, k, v = expand(x)
    angle = torch.arange(k.shape[2], dtype=k.dtype)[:, None]
    k = k * angle.cos() + k.roll(1, -1) * angle.sin()
    return ((q @ k.mT) * SCALE).softmax(-1) @ v


def nonlinear_expansion(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    return ((q @ F.silu(k).mT) * SCALE).softmax(-1) @ v


def adapter_beside_the_projection(x: Inputs) -> Tensor:
    """LoRA that is not merged."""
    B, Skv, _ = x.kv_c.shape
    kv = F.linear(x.kv_c, x.w) + 2 * F.linear(F.linear(x.kv_c, x.w[:4]), x.w[:, :4])
    k, v = kv.view(B, Skv, x.N, 32).transpose(1, 2).split([16, 16], -1)
    out: Tensor = (x.q_nope.transpose(1, 2) @ k.mT * SCALE).softmax(-1) @ v
    return out


def expansion_with_a_bias_for_each_token(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    return ((q @ k.mT) * SCALE).softmax(-1) @ (v + x.kv_c[:, None, :, :16])


def biased_keys_under_a_soft_cap(x: Inputs) -> Tensor:
    q, k, v = biased(x)
    return ((q @ k.mT * SCALE).tanh() * 5).softmax(-1) @ v


def biased_keys_beside_a_finite_fill(x: Inputs) -> Tensor:
    q, k, v = biased(x)
    return (q @ k.mT * SCALE).masked_fill(~x.keep, -5.0).softmax(-1) @ v


def biased_keys_in_the_lse(x: Inputs) -> tuple[Tensor, Tensor]:
    q, k, v = biased(x)
    s = q @ k.mT * SCALE
    return s.softmax(-1) @ v, s.logsumexp(-1)


def biased_values_weighed_by_less_than_one(x: Inputs) -> Tensor:
    q, k, v = biased(x)
    return (q @ k.mT * SCALE).softmax(-1) * x.keep @ v


def bias_scaled_apart_from_the_values(x: Inputs) -> Tensor:
    B, Skv, _ = x.kv_c.shape
    v = torch.addmm(x.w[:16, 0], x.kv_c.flatten(0, 1), x.w[:16].mT, beta=0.5).view(B, Skv, 16)
    return attend(absorbed_scores(x).softmax(-1), x, v)


def quantised_latent(x: Inputs) -> Tensor:
    return attend(
        absorbed_scores(x).softmax(-1), x, x.kv_c.mul(8).round().to(torch.int8).float() / 8
    )


def output_wider_than_the_cache(x: Inputs) -> Tensor:
    kv_c, k_pe = (t.bfloat16().float() for t in (x.kv_c, x.k_pe))
    narrow = replace(x, kv_c=kv_c, k_pe=k_pe)
    return attend(absorbed_scores(narrow).softmax(-1), narrow)


def scale_of_every_query(x: Inputs) -> Tensor:
    return attend((absorbed_scores(x) * x.q_pe.mean(-1, keepdim=True)).softmax(-1), x)


def scale_of_every_head(x: Inputs) -> Tensor:
    return attend((absorbed_scores(x) * x.w[: x.N, :1]).softmax(-1), x)


def top_left_causal_sdpa(x: Inputs) -> Tensor:
    q = torch.einsum("bshd,hdc->bhsc", x.q_nope, x.W_UK)
    k = x.kv_c[:, None].expand(-1, x.N, -1, -1)
    return F.scaled_dot_product_attention(q, k, k, is_causal=True, scale=SCALE)


def scores_by_flex_attention(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    out: Tensor = flex_attention(q, k, F.pad(v, (0, x.P)))
    return out


def sum_of_the_weights_returned(x: Inputs) -> tuple[Tensor, Tensor]:
    e = absorbed_scores(x).exp()
    total = e.sum(-1, keepdim=True)
    return attend(e, x) / total, total


def late_division_by_the_sum_of_another_row(x: Inputs) -> Tensor:
    e = absorbed_scores(x).exp()
    return attend(e, x) / e.sum(-1, keepdim=True).roll(1, 2)


def late_division_by_the_sum_over_heads(x: Inputs) -> Tensor:
    e = absorbed_scores(x).exp()
    return attend(e, x) / e.sum(2, keepdim=True).mean(-1, keepdim=True)


def late_division_by_a_sum_cut_to_integers(x: Inputs) -> Tensor:
    e = absorbed_scores(x).exp()
    return attend(e, x) / e.sum(-1, keepdim=True).long()


def late_product_with_the_reciprocal_of_another_row(x: Inputs) -> Tensor:
    e = absorbed_scores(x).exp()
    return attend(e, x) * (1 / e.sum(-1, keepdim=True)).roll(1, 2)


def late_division_by_a_reciprocal(x: Inputs) -> Tensor:
    e = absorbed_scores(x).exp()
    return attend(e, x) / (1 / e.sum(-1, keepdim=True))


def product_with_a_reciprocal_twice_as_large(x: Inputs) -> Tensor:
    e = absorbed_scores(x).exp()
    return attend(e * (2 / e.sum(-1, keepdim=True)), x)


def values_divided_by_their_weights(x: Inputs) -> tuple[Tensor, Tensor]:
    e = absorbed_scores(x)[:, 0].exp()
    return e @ (x.kv_c[:, None, :, 0] / e).mT, e.sum(-1).log()


def values_zeroed_by_their_weights(x: Inputs) -> tuple[Tensor, Tensor]:
    e = absorbed_scores(x)[:, 0].exp()
    return e @ torch.where(e > 1, 0, x.kv_c[:, None, :, 0]).mT, e.sum(-1).log()


def sink_in_the_denominator(x: Inputs) -> Tensor:
    e = absorbed_scores(x).exp()
    return attend(e / (e.sum(-1, keepdim=True) + 1), x)


def sink_in_a_late_denominator(x: Inputs) -> Tensor:
    e = absorbed_scores(x).exp()
    return attend(e, x) / (e.sum(-1, keepdim=True) + 1)


def exponentials_cut_to_integers(x: Inputs) -> Tensor:
    e = absorbed_scores(x).exp()
    return attend(e.long() / e.sum(-1, keepdim=True), x)


def exponentials_returned(x: Inputs) -> tuple[Tensor, Tensor]:
    e = absorbed_scores(x).exp()
    return attend(e, x) / e.sum(-1, keepdim=True), e


def fill_of_every_sequence(x: Inputs) -> Tensor:
    fill = torch.tensor([-1e9, -3.0, 0.0]).view(-1, 1, 1, 1)
    return attend(torch.where(x.visible[:, None, None], absorbed_scores(x), fill).softmax(-1), x)


def lse_of_scores_without_the_mask(x: Inputs) -> tuple[Tensor, Tensor]:
    s = absorbed_scores(x)
    masked = s.masked_fill(~x.visible[:, None, None], float("-inf"))
    return attend(masked.softmax(-1), x), s.logsumexp(-1)


def maximum_returned(x: Inputs) -> tuple[Tensor, Tensor]:
    s = absorbed_scores(x)
    return attend(s.softmax(-1), x), s.amax(-1)


def negative_soft_cap(x: Inputs) -> Tensor:
    return attend((absorbed_scores(x).tanh() * -5).softmax(-1), x)


def soft_cap_of_one_term_only(x: Inputs) -> Tensor:
    rope = torch.einsum("bshr,btr->bsht", x.q_pe, x.k_pe)
    return attend((absorbed_scores(x).tanh() + rope).softmax(-1), x)


def mask_under_the_soft_cap(x: Inputs) -> Tensor:
    s = absorbed_scores(x).masked_fill(~x.visible[:, None, None], float("-inf"))
    return attend(s.tanh().softmax(-1), x)


def values_of_other_pages(x: Inputs) -> Tensor:
    keys = x.pool[x.table].view(len(x.table), -1, 40)
    values = x.pool[x.table.flip(1)].view(len(x.table), -1, 40)[..., :32]
    return attend(absorbed_scores(replace(x, kv_c=keys[..., :32])).softmax(-1), x, values)


def values_of_slots_in_another_order(x: Inputs) -> Tensor:
    pages = x.pool[x.table]
    keys, values = pages.flatten(1, 2), pages.transpose(1, 2).flatten(1, 2)[..., :32]
    return attend(absorbed_scores(replace(x, kv_c=keys[..., :32])).softmax(-1), x, values)


def quantised_projection(x: Inputs) -> Tensor:
    """An int8 kv_b_proj, as PyTorch's own weight-only operator applies it."""
    B, Skv, _ = x.kv_c.shape
    weight, scale = (x.w * 32).round().to(torch.int8), torch.full((len(x.w),), 1 / 32.0)
    flat = x.kv_c.flatten(0, 1).bfloat16()
    kv = torch._weight_int8pack_mm(flat, weight, scale.bfloat16())
    k, v = kv.to(x.kv_c.dtype).view(B, Skv, x.N, 32).transpose(1, 2).split([16, 16], -1)
    out: Tensor = (x.q_nope.transpose(1, 2) @ k.mT * SCALE).softmax(-1) @ v
    return out


def projection_dequantised_after_the_product(x: Inputs) -> Tensor:
    """Weight-only int8 as torchao and gpt-fast apply it."""
    B, Skv, _ = x.kv_c.shape
    scale = x.w.abs().amax(1) / 127
    kv = F.linear(x.kv_c, (x.w / scale[:, None]).round().to(torch.int8).to(x.w.dtype)) * scale
    k, v = kv.view(B, Skv, x.N, 32).transpose(1, 2).split([16, 16], -1)
    out: Tensor = (x.q_nope.transpose(1, 2) @ k.mT * SCALE).softmax(-1) @ v
    return out


def padded(x: Inputs, fill: float) -> Tensor:
    q, k, v = expand(x)
    return ((q @ k.mT) * SCALE).softmax(-1) @ F.pad(v, [0, 8], value=fill)


def padded_values_cropped_to_other_columns(x: Inputs) -> Tensor:
    return padded(x, 0.0)[..., 8:]


def values_padded_by_ones_and_not_cropped(x: Inputs) -> Tensor:
    return padded(x, 1.0)


def values_padded_by_ones_and_cropped_too_late(x: Inputs) -> Tensor:
    return padded(x, 1.0)[..., :17]


def padded_values_strided_past_the_crop(x: Inputs) -> Tensor:
    out = padded(x, 1.0)[..., :16]
    return out.as_strided(out.shape, out.stride(), 8)


def padded_values_used_again(x: Inputs) -> tuple[Tensor, Tensor]:
    out = padded(x, 1.0)
    return out[..., :16], out.sum(-1)


NEGATIVES: list[tuple[Callable[[Inputs], object], Reason]] = [
    (cache_of_expanded_heads, Reason.NO_LATENT),
    (grouped_query_cache, Reason.VALUE),
    (grouped_query_cache_of_keys_that_are_values, Reason.LAYOUT),
    (grouped_query_cache_by_sdpa, Reason.VALUE),
    (cache_of_transposed_features, Reason.LAYOUT),
    (values_of_another_cache, Reason.VALUE),
    (keys_rounded_where_they_are_written, Reason.VALUE),
    (values_of_another_function, Reason.VALUE),
    (values_of_other_columns, Reason.VALUE),
    (values_overlap_the_keys, Reason.VALUE),
    (values_wider_than_the_keys, Reason.VALUE),
    (values_in_reverse_order, Reason.VALUE),
    (values_one_token_late, Reason.VALUE),
    (values_shifted_by_padding, Reason.VALUE),
    (values_of_half_the_tokens_repeated, Reason.VALUE),
    (values_unbound_from_another_layer, Reason.VALUE),
    (values_from_the_other_half_of_a_batch, Reason.VALUE),
    (values_of_another_sequence, Reason.VALUE),
    (values_from_before_the_cache_write, Reason.VALUE),
    (score_squared, Reason.SCORE),
    (negative_scale, Reason.SCALE),
    (three_score_terms, Reason.SCORE),
    (keys_that_no_query_meets, Reason.SCORE),
    (probabilities_returned, Reason.ESCAPE),
    (scores_returned, Reason.ESCAPE),
    (sum_of_the_weights_returned, Reason.ESCAPE),
    (expanded_keys_returned, Reason.ESCAPE),
    (expanded_values_used_again, Reason.ESCAPE),
    (scores_by_flex_attention, Reason.FLEX),
    (softmax_over_heads, Reason.SOFTMAX),
    (probabilities_without_a_sink, Reason.SINKS),
    (scores_padded_by_a_sink, Reason.SINKS),
    (mask_made_of_the_scores, Reason.ESCAPE),
    (mask_made_of_the_expanded_keys, Reason.ESCAPE),
    (sinks_under_a_shift, Reason.SINKS),
    (values_divided_by_their_weights, Reason.SOFTMAX),
    (values_zeroed_by_their_weights, Reason.SOFTMAX),
    (sink_in_the_denominator, Reason.SINKS),
    (sink_in_a_late_denominator, Reason.SINKS),
    (late_division_by_the_sum_of_another_row, Reason.SOFTMAX),
    (late_division_by_the_sum_over_heads, Reason.SOFTMAX),
    (late_division_by_a_sum_cut_to_integers, Reason.SOFTMAX),
    (late_product_with_the_reciprocal_of_another_row, Reason.SOFTMAX),
    (late_division_by_a_reciprocal, Reason.SOFTMAX),
    (product_with_a_reciprocal_twice_as_large, Reason.SOFTMAX),
    (exponentials_cut_to_integers, Reason.SOFTMAX),
    (exponentials_returned, Reason.ESCAPE),
    (fill_of_every_sequence, Reason.SCORE),
    (lse_of_scores_without_the_mask, Reason.ESCAPE),
    (maximum_returned, Reason.ESCAPE),
    (negative_soft_cap, Reason.SCALE),
    (soft_cap_of_one_term_only, Reason.SCORE),
    (mask_under_the_soft_cap, Reason.MASK),
    (values_of_other_pages, Reason.VALUE),
    (values_of_slots_in_another_order, Reason.VALUE),
    (quantised_projection, Reason.QUANTISED),
    (projection_dequantised_after_the_product, Reason.QUANTISED),
    (probabilities_of_hidden_tokens_zeroed, Reason.SOFTMAX),
    (rows_of_probabilities_set_to_one, Reason.ESCAPE),
    (rows_that_see_something_zeroed, Reason.ESCAPE),
    (rows_zeroed_where_another_sees_nothing, Reason.ESCAPE),
    (exponentials_beside_their_lse, Reason.SOFTMAX),
    (probabilities_head_by_head, Reason.SOFTMAX),
    (scores_written_head_by_head, Reason.SCORE),
    (probabilities_renormalised, Reason.SOFTMAX),
    (probabilities_sharpened, Reason.ESCAPE),
    (two_fills, Reason.MASK),
    (fill_of_infinity, Reason.MASK),
    (length_and_another_fill, Reason.MASK),
    (two_fills_added, Reason.MASK),
    (fill_scaled_down, Reason.MASK),
    (fill_that_rope_is_added_to, Reason.VALUE),
    (dropout, Reason.DROPOUT),
    (prefill, Reason.PREFILL),
    (positions_between_latent_and_keys, Reason.BETWEEN),
    (nonlinear_expansion, Reason.BETWEEN),
    (adapter_beside_the_projection, Reason.BETWEEN),
    (expansion_with_a_bias_for_each_token, Reason.BETWEEN),
    (biased_keys_under_a_soft_cap, Reason.SCORE),
    (biased_keys_beside_a_finite_fill, Reason.SCORE),
    (biased_keys_in_the_lse, Reason.SCORE),
    (biased_values_weighed_by_less_than_one, Reason.SOFTMAX),
    (bias_scaled_apart_from_the_values, Reason.SOFTMAX),
    (quantised_latent, Reason.VALUE),
    (output_wider_than_the_cache, Reason.DTYPE),
    (scale_of_every_query, Reason.SCALE),
    (scale_of_every_head, Reason.SCALE),
    (top_left_causal_sdpa, Reason.CAUSAL),
    (padded_values_cropped_to_other_columns, Reason.BETWEEN),
    (values_padded_by_ones_and_not_cropped, Reason.BETWEEN),
    (values_padded_by_ones_and_cropped_too_late, Reason.BETWEEN),
    (padded_values_strided_past_the_crop, Reason.BETWEEN),
    (padded_values_used_again, Reason.BETWEEN),
]
