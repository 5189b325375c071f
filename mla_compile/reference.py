"""The meaning of mla_decode in plain torch: the spec, the oracle of the tests, and what CPU runs.

For every query token t, head n and visible key s of its sequence

    score[t,n,s] = (q_nope[t,n]·kv_c[s] + q_pe[t,n]·k_pe[s]) · sm_scale [· q_scale · k_scale]
    score        = logit_cap · tanh(score / logit_cap)                  where logit_cap > 0
    score        = score + attn_mask, or mask_fill where a bool attn_mask is False
                   (attn_mask alone where it is -1e30 or less: whatever the score is, it is gone)
    out[t,n]     = Σ_s softmax(score)[s] · kv_c[s] [· k_scale],  lse[t,n] = log Σ_s exp(score[s])

A key is visible if it lies within the sequence's length and the mask's columns, under the
bottom-right causal diagonal, and its score is not -inf. A row with no visible key gives out = 0 and
lse = -inf. Scores are computed in fp32 (fp64 for fp64 inputs), a block of keys at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mla_compile.validate import Call

KEYS = 4096  # per block: the matmuls are large, a gathered block stays near 10 MB
SCORES = 1 << 24  # per block: bounds the score matrix of many rows to 64 MB
# Finite mask values are clamped to FLOOR, so that adding a score or changing to log2 units cannot
# overflow. At or below HIDDEN a key weighs exactly nothing beside any ordinary score.
# At or below ABSORBING no bit of a score is left beside it: it replaces even a NaN.
FLOOR = -2e38
HIDDEN = -1e37
ABSORBING = -1e30


def floored(value: float) -> float:
    return value if value == -math.inf else max(value, FLOOR)


def mla_decode_reference(call: Call, out: Tensor, lse: Tensor) -> None:
    """Write out [T,N,Lkv] and lse [T,N]."""
    dims, cache = call.dims, call.cache
    compute = torch.float64 if call.q_nope.dtype == torch.float64 else torch.float32
    k_scale = 1.0 if call.k_scale is None else float(call.k_scale)
    q_scale = 1.0 if call.q_scale is None else float(call.q_scale)
    scale = call.sm_scale * q_scale * k_scale
    starts = (
        [b * dims.Sq for b in range(dims.B + 1)]
        if call.qo_indptr is None
        else call.qo_indptr.tolist()
    )
    for b, length in enumerate(cache.lengths()):
        t0, t1 = starts[b], starts[b + 1]
        rows = (t1 - t0) * dims.N
        if rows == 0:
            continue
        q_nope = call.q_nope[t0:t1].reshape(rows, dims.Lkv).to(compute)
        q_pe = call.q_pe[t0:t1].reshape(rows, dims.R).to(compute)
        mask = _Mask.of(call, b, t1 - t0, length)
        pages = cache.pages(b, length)

        top = q_nope.new_full((rows, 1), -math.inf)  # running maximum of the scores
        total = q_nope.new_zeros((rows, 1))  # Σ exp(score - top)
        acc = q_nope.new_zeros((rows, dims.Lkv))  # Σ exp(score - top) · kv_c
        for at in _blocks(mask.keys(length), min(KEYS, max(SCORES // rows, 16))):
            kv_c, k_pe = (k.to(compute) for k in cache.rows(b, pages, at))  # [n,Lkv], [n,R]
            score = (q_nope @ kv_c.T).addmm_(q_pe, k_pe.T).mul_(scale)
            if call.logit_cap > 0:
                score.div_(call.logit_cap).tanh_().mul_(call.logit_cap)
            mask.apply(score.view(t1 - t0, dims.N, score.shape[1]), at)
            new_top = torch.maximum(top, score.amax(1, keepdim=True))
            base = new_top.masked_fill(new_top == -math.inf, 0.0)  # -inf - -inf is NaN
            weight = score.sub_(base).exp_()
            fade = (top - base).exp_()
            total = total * fade + weight.sum(1, keepdim=True)
            acc = acc.mul_(fade).addmm_(weight, kv_c)
            top = new_top
        acc *= k_scale / total.masked_fill(total == 0, 1.0)
        out[t0:t1] = acc.view(-1, dims.N, dims.Lkv)
        lse[t0:t1] = (top + total.log()).view(-1, dims.N)


@dataclass(frozen=True, slots=True)
class _Mask:
    """What hides keys from the rows of one sequence; broadcast dims keep size 1."""

    causal: Tensor | None  # [Sq, 1, keys], True where visible
    values: Tensor | None  # [1 or Sq, 1 or N, columns], bool or additive
    fill: float

    @classmethod
    def of(cls, call: Call, b: int, Sq: int, length: int) -> _Mask:
        causal = values = None
        if call.causal:
            key = torch.arange(length, device=call.q_nope.device)
            token = torch.arange(Sq, device=call.q_nope.device)
            causal = (key <= token[:, None] + (length - Sq))[:, None]
        if call.mask is not None:
            mask = call.mask[b, :, :Sq]  # [N, Sq, columns]
            n, t = (1 if mask.stride(i) == 0 else mask.shape[i] for i in (0, 1))
            values = mask[:n, :t].transpose(0, 1)
            values = values.expand(-1, -1, length) if mask.shape[2] == 1 else values[..., :length]
            if values.dtype != torch.bool:
                floor = max(FLOOR, torch.finfo(values.dtype).min)
                values = values.clamp(min=floor).where(values > -math.inf, -math.inf)
        return cls(causal, values, floored(call.mask_fill))

    def keys(self, length: int) -> Tensor | slice:
        """The keys that weigh something for some row. No other key is read."""
        if self.values is None:
            return slice(0, length)
        bias = self.values
        if bias.dtype == torch.bool:
            bias = bias.new_full(bias.shape, self.fill, dtype=torch.float32).masked_fill_(bias, 0.0)
        visible = bias > -math.inf
        if self.causal is not None:
            visible = visible & self.causal[..., : bias.shape[2]]
        ordinary = visible & (bias > HIDDEN)
        # A row that has nothing but finite fills averages over them.
        read = ordinary if bool(ordinary.any(2).all()) else visible
        seen = read.flatten(0, 1).any(0).nonzero().squeeze(1)
        if seen.numel() == 0:
            return slice(0, 0)
        first, last = int(seen[0]), int(seen[-1])
        return slice(first, last + 1) if last - first + 1 == seen.numel() else seen

    def apply(self, score: Tensor, at: Tensor | slice) -> None:
        """Mask score [Sq, N, n] in place."""
        if self.values is not None:
            values = self.values[..., at]
            if values.dtype == torch.bool:
                score.masked_fill_(~values, self.fill)
            else:
                score.masked_fill_(values <= ABSORBING, 0.0).add_(values)
        if self.causal is not None:
            score.masked_fill_(~self.causal[..., at], -math.inf)


def _blocks(keys: Tensor | slice, size: int) -> list[Tensor | slice]:
    if isinstance(keys, Tensor):
        return list(keys.split(size))
    return [slice(i, min(i + size, keys.stop)) for i in range(keys.start, keys.stop, size)]
