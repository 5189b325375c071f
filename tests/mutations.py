"""What must not be taken for the unmutated MLA: a change of meaning at one place of a program.

Latents are [B, Skv, Lkv], weights [N, P or V, Lkv], scores and probabilities [B, N, Sq, Skv],
sums [B, N, Sq, 1], expanded keys and values [B, N, Skv, width], masks [B or 1, 1, Sq or 1, Skv].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fuzz_inputs import Inputs
from tests.grammar import Mutation


def ramp(t: Tensor, dim: int, below: float = 2.0) -> Tensor:
    """From 1 to almost `below` along `dim`, broadcastable to `t`: what differs by position."""
    n = t.shape[dim]
    steps = 1 + torch.arange(n) * (below - 1) / n
    return steps.view([n if d == dim else 1 for d in range(t.dim())]).to(t.dtype)


def other(t: Tensor, x: Inputs) -> Tensor:
    return x.other[:, : t.shape[1], : t.shape[2]]


def unwritten(t: Tensor, x: Inputs) -> Tensor:
    return x.kv_c[:, : t.shape[1]]


def late_columns(t: Tensor, x: Inputs) -> Tensor:
    return x.fused[:, : t.shape[1], 1 : t.shape[2] + 1]


def other_pages(t: Tensor, x: Inputs) -> Tensor:
    return x.pool[x.table.roll(1, 1)].flatten(1, 2)[:, : t.shape[1], : t.shape[2]]


def third_product(t: Tensor, x: Inputs) -> Tensor:
    return t + torch.einsum(
        "bshr,btr->bhst", x.q_pe, other(t[:, 0].mT, x)[..., :1].expand(-1, -1, x.q_pe.shape[-1])
    )


def sink(t: Tensor, x: Inputs) -> Tensor:
    return t / (1 + t.sum(-1, keepdim=True))


def head_mask(t: Tensor, x: Inputs) -> Tensor:
    """Each head misses another token."""
    heads, tokens = torch.arange(t.shape[1])[:, None, None], torch.arange(t.shape[3])
    return torch.where(heads == tokens, -1e30, 0.0).to(t.dtype)


def rotated(t: Tensor, x: Inputs) -> Tensor:
    angle = ramp(t, 2, 9)
    return t * angle.cos() + t.roll(1, -1) * angle.sin()


def narrowed(t: Tensor, x: Inputs) -> Tensor:
    """Of a bf16 program this is nothing."""
    return t.bfloat16().to(t.dtype)


def early(t: Tensor) -> Tensor:
    return torch.arange(t.shape[-1]) < 3


PRECISE = (
    *("values", "keys", "rope", "scores", "probabilities", "late sum"),
    *("expanded keys", "expanded values"),
)
MUTATIONS = [
    *[Mutation("narrowed", place, narrowed) for place in PRECISE],
    Mutation("from another cache", "values", other),
    Mutation("from before the write", "values", unwritten),
    Mutation("one column late", "values", late_columns),
    Mutation("from other pages", "values", other_pages),
    Mutation("columns shifted", "values", lambda t, x: t.roll(1, -1)),
    Mutation("tokens reversed", "values", lambda t, x: t.flip(1)),
    Mutation("one token late", "values", lambda t, x: torch.cat([t[:, 1:], t[:, :1]], 1)),
    Mutation("of the first sequence", "values", lambda t, x: t[:1].expand_as(t)),
    Mutation("of the next sequence", "values", lambda t, x: t.roll(1, 0)),
    Mutation("scaled by position", "values", lambda t, x: t * ramp(t, 1)),
    Mutation("scaled by sequence", "values", lambda t, x: t * x.lens[:, None, None].to(t.dtype)),
    Mutation("bent", "values", lambda t, x: t.sin()),
    Mutation("rounded", "values", lambda t, x: t.mul(4).round() / 4),
    Mutation("from another cache", "keys", other),
    Mutation("columns shifted", "keys", lambda t, x: torch.cat([t[..., 1:], t[..., :1]], -1)),
    Mutation("tokens reversed", "keys", lambda t, x: t.flip(1)),
    Mutation("scaled by position", "keys", lambda t, x: t * ramp(t, 1)),
    Mutation("scaled by column", "keys", lambda t, x: t * ramp(t, 2)),
    Mutation("of the last token", "keys", lambda t, x: t[:, -1:].expand_as(t)),
    Mutation("moved", "keys", lambda t, x: t + ramp(t, 1)),
    Mutation("scaled by position", "latent", lambda t, x: t * ramp(t, 1)),
    Mutation("tokens reversed", "latent", lambda t, x: t.flip(1)),
    Mutation("columns shifted", "latent", lambda t, x: t.roll(1, -1)),
    Mutation("of the first sequence", "latent", lambda t, x: t[:1].expand_as(t)),
    Mutation("tokens reversed", "rope", lambda t, x: t.flip(1)),
    Mutation("scaled by position", "rope", lambda t, x: t * ramp(t, 1)),
    Mutation("squared", "rope", lambda t, x: t * t),
    Mutation("of the first token", "rope", lambda t, x: t[:, :1].expand_as(t)),
    Mutation("of the next sequence", "rope", lambda t, x: t.roll(1, 0)),
    Mutation("heads reversed", "W_UK", lambda t, x: t.flip(0)),
    Mutation("turned", "W_UK", lambda t, x: t.flatten(1).roll(1, 1).view_as(t)),
    Mutation("transposed", "W_UK", lambda t, x: t.mT.reshape(t.shape)),
    Mutation("of the first head", "W_UK", lambda t, x: 2 * t[:1].expand_as(t)),
    Mutation("heads reversed", "W_UV", lambda t, x: t.flip(0)),
    Mutation("transposed", "W_UV", lambda t, x: t.mT.reshape(t.shape)),
    Mutation("scaled by row", "q_nope", lambda t, x: t * ramp(t, 1) * ramp(t, 2) * 2),
    Mutation("multiplied twice", "q_nope", lambda t, x: t * t),
    Mutation("heads reversed", "q_pe", lambda t, x: t.flip(2) * 2),
    Mutation("of the next row", "q_pe", lambda t, x: t.roll(1, 1) * 2),
    Mutation("capped", "scores", lambda t, x: t.tanh()),
    Mutation("squared", "scores", lambda t, x: t.square()),
    Mutation("negated", "scores", lambda t, x: -t),
    Mutation("scaled by row", "scores", lambda t, x: t * x.q_pe.mean(-1).mT[..., None]),
    Mutation(
        "scaled by sequence", "scores", lambda t, x: t * x.lens[:, None, None, None].to(t.dtype)
    ),
    Mutation("scaled by token", "scores", lambda t, x: t * ramp(t, 3)),
    Mutation("scaled by a tensor", "scores", lambda t, x: t * x.temperature),
    Mutation("with alibi", "scores", lambda t, x: t + ramp(t, 1, 9) * ramp(t, 3)),
    Mutation("with a bias of tokens", "scores", lambda t, x: t + ramp(t, 3)),
    Mutation("with a third product", "scores", third_product),
    Mutation("tokens reversed", "scores", lambda t, x: t.flip(-1)),
    Mutation("one token late", "scores", lambda t, x: t.roll(1, -1)),
    Mutation("heads reversed", "scores", lambda t, x: t.flip(1) * 2),
    Mutation("rows reversed", "scores", lambda t, x: t.flip(2)),
    Mutation("in a window", "scores", lambda t, x: t.masked_fill(early(t), float("-inf"))),
    Mutation("softly hidden", "scores", lambda t, x: t.masked_fill(early(t), -2.0)),
    Mutation("hidden by head", "scores", lambda t, x: t + head_mask(t, x)),
    Mutation("hidden by sign", "scores", lambda t, x: t.masked_fill(t > 1, float("-inf"))),
    Mutation("mean over heads", "scores", lambda t, x: t.mean(1, keepdim=True).expand_as(t) * 3),
    Mutation("returned", "scores", returned=True),
    Mutation("returned", "probabilities", returned=True),
    Mutation("squared", "probabilities", lambda t, x: t * t),
    Mutation("weighed by token", "probabilities", lambda t, x: t * ramp(t, 3)),
    Mutation("weighed by head", "probabilities", lambda t, x: t * ramp(t, 1) * 2),
    Mutation("weighed by row", "probabilities", lambda t, x: t * ramp(t, 2) * 2),
    Mutation("weighed by mask", "probabilities", lambda t, x: t * x.keep[..., : t.shape[3]]),
    Mutation("tokens reversed", "probabilities", lambda t, x: t.flip(-1)),
    Mutation("cut", "probabilities", lambda t, x: F.pad(t[..., :-1], (0, 1))),
    Mutation("doubled", "probabilities", lambda t, x: t * 2),
    Mutation("beside a sink", "probabilities", sink),
    Mutation("thresholded", "probabilities", lambda t, x: torch.where(t > 0.05, t, 0)),
    Mutation("plus a mean", "probabilities", lambda t, x: t + 1 / t.shape[3]),
    Mutation("cut to integers", "late sum", lambda t, x: t.long().to(t.dtype)),
    Mutation("of the next sequence", "late sum", lambda t, x: t.roll(1, 0)),
    Mutation("heads reversed", "late sum", lambda t, x: t.flip(1)),
    Mutation("inverted", "late sum", lambda t, x: 1 / t),
    Mutation("plus one", "late sum", lambda t, x: t + 1),
    Mutation("rotated by position", "expanded keys", rotated),
    Mutation("scaled by position", "expanded keys", lambda t, x: t * ramp(t, 2)),
    Mutation("scaled by head", "expanded keys", lambda t, x: t * ramp(t, 1) * 2),
    Mutation("bent", "expanded keys", lambda t, x: F.silu(t)),
    Mutation("with a bias", "expanded keys", lambda t, x: t + ramp(t, 1) * ramp(t, 2)),
    Mutation("of the next head", "expanded keys", lambda t, x: 2 * t.roll(1, 1)),
    Mutation("of the next sequence", "expanded keys", lambda t, x: 2 * t.roll(1, 0)),
    Mutation("returned", "expanded keys", returned=True),
    Mutation("with a bias", "expanded values", lambda t, x: t + ramp(t, 1) * ramp(t, 3)),
    Mutation("of the next head", "expanded values", lambda t, x: 2 * t.roll(1, 1)),
    Mutation("scaled by position", "expanded values", lambda t, x: t * ramp(t, 2)),
    Mutation("normalised", "expanded values", lambda t, x: F.normalize(t, dim=-1)),
    Mutation("centred", "expanded values", lambda t, x: t - t.mean(2, keepdim=True)),
    Mutation("returned", "expanded values", returned=True),
    Mutation("negated", "mask", lambda t, x: ~t),
    Mutation("tokens reversed", "mask", lambda t, x: t.flip(-1)),
    Mutation("one token late", "mask", lambda t, x: t.roll(1, -1)),
    Mutation("of the next sequence", "mask", lambda t, x: t.roll(1, 0)),
    Mutation("rows reversed", "mask", lambda t, x: t.flip(2)),
]
