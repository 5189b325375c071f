"""Softmax in other words: late division, logsumexp, and the lse as a second result."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.spellings.common import SCALE, Inputs, absorbed_scores, expand, up, wide


def scores(x: Inputs) -> Tensor:
    return wide(absorbed_scores(x)).masked_fill(~x.visible[:, None, None], float("-inf"))


def weighed(p: Tensor, x: Inputs) -> Tensor:
    return torch.einsum("bsht,btc->bshc", p.to(x.kv_c.dtype), x.kv_c)


def softmax_by_logsumexp(x: Inputs) -> Tensor:
    s = scores(x)
    return up(weighed((s - s.logsumexp(-1, keepdim=True)).exp(), x), x)


def softmax_by_log_softmax(x: Inputs) -> Tensor:
    return up(weighed(scores(x).log_softmax(-1).exp(), x), x)


def softmax_without_a_maximum(x: Inputs) -> Tensor:
    e = scores(x).exp()
    return up(weighed(e / e.sum(-1, keepdim=True), x), x)


def softmax_with_the_sum_unsqueezed(x: Inputs) -> Tensor:
    s = scores(x)
    e = (s - s.max(-1).values.unsqueeze(-1)).exp()
    return up(weighed(e / e.sum(-1).unsqueeze(-1), x), x)


def softmax_of_shifted_scores(x: Inputs) -> Tensor:
    """gpt-oss subtracts the maximum, then calls softmax, which does it again."""
    s = absorbed_scores(x)
    s = s - s.max(dim=-1, keepdim=True).values
    return up(weighed(s.softmax(-1, dtype=torch.float32), x), x)


def softmax_by_the_maximum_of_all(x: Inputs) -> Tensor:
    s = absorbed_scores(x)
    e = (s - s.max()).exp()
    return up(weighed(e / e.sum(-1, keepdim=True), x), x)


def softmax_by_a_reciprocal(x: Inputs) -> Tensor:
    s = scores(x)
    e = (s - s.amax(-1, keepdim=True)).exp()
    return up(weighed(e * (1 / e.sum(-1))[..., None], x), x)


def softmax_zeroed_where_nothing_is_seen(x: Inputs) -> Tensor:
    """FlashAttention's reference: a row that sees no token is zero."""
    hidden = ~(x.visible & (x.lens > 30)[:, None])[:, None, None]
    p = wide(absorbed_scores(x)).masked_fill(hidden, float("-inf")).softmax(-1)
    return up(weighed(p.masked_fill(hidden.all(-1, keepdim=True), 0.0), x), x)


def softmax_zeroed_for_finished_sequences(x: Inputs) -> Tensor:
    running = (x.lens > 30)[:, None, None, None]
    return up(weighed(torch.where(running, scores(x).softmax(-1), 0.0), x), x)


def lse_by_a_sum_of_its_own(x: Inputs) -> tuple[Tensor, Tensor]:
    s = scores(x)
    top = s.amax(-1, keepdim=True)
    e = (s - top).exp()
    out = weighed(e, x) / e.sum(-1, keepdim=True)
    return up(out.to(x.kv_c.dtype), x), e.sum(-1).log() + top.squeeze(-1)


def divided_after_the_values(x: Inputs) -> Tensor:
    s = scores(x)
    e = (s - s.amax(-1, keepdim=True)).exp()
    out = weighed(e, x) / e.sum(-1, keepdim=True)
    return up(out.to(x.kv_c.dtype), x)


def multiplied_by_a_reciprocal_after_the_values(x: Inputs) -> Tensor:
    s = scores(x)
    e = (s - s.amax(-1, keepdim=True)).exp()
    out = e.sum(-1, keepdim=True).reciprocal() * weighed(e, x)
    return up(out.to(x.kv_c.dtype), x)


def divided_after_the_expanded_values(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    s = wide(q @ k.mT) * SCALE
    e = (s - s.amax(-1, keepdim=True)).exp()
    out = (e.to(v.dtype) @ v) / e.sum(-1, keepdim=True)
    return out.to(v.dtype).transpose(1, 2)


def lse_beside_a_softmax(x: Inputs) -> tuple[Tensor, Tensor]:
    """AITER's reference: both are computed from the scores."""
    s = scores(x)
    return up(weighed(s.softmax(-1), x), x), s.logsumexp(-1)


def lse_that_the_probabilities_are_made_of(x: Inputs) -> tuple[Tensor, Tensor]:
    """FlashMLA's reference."""
    s = scores(x)
    lse = s.logsumexp(-1)
    return up(weighed((s - lse.unsqueeze(-1)).exp(), x), x), lse


def lse_of_a_late_division(x: Inputs) -> tuple[Tensor, Tensor]:
    s = scores(x)
    top = s.amax(-1, keepdim=True)
    e = (s - top).exp()
    total = e.sum(-1, keepdim=True)
    out = weighed(e, x) / total
    return up(out.to(x.kv_c.dtype), x), (top + total.log()).squeeze(-1)


def lse_of_expanded_heads_first(x: Inputs) -> tuple[Tensor, Tensor]:
    q, k, v = expand(x)
    s = wide(q @ k.mT) * SCALE
    return (s.softmax(-1).to(v.dtype) @ v).transpose(1, 2), s.logsumexp(-1) / 0.6931
