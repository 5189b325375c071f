"""MLA decode from a grammar: a `Program` is one choice for each thing people write differently.

`program(x)` runs it on `Inputs`.  A mutation changes its meaning at one place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fuzz_inputs import PAGE, Inputs, Sizes


def halves(fused: Tensor, x: Inputs) -> tuple[Tensor, Tensor]:
    width = x.w.shape[-1]
    return fused[..., :width], fused[..., width:]


def written(x: Inputs) -> tuple[Tensor, Tensor]:
    """A static cache: one token is written in place, then all of it is read."""
    kv_c, k_pe = x.kv_c.clone(), x.k_pe.clone()
    kv_c.index_copy_(1, x.lens[:1] - 1, x.kv_c[:, :1] * 2)
    k_pe.index_copy_(1, x.lens[:1] - 1, x.k_pe[:, :1] * 2)
    return kv_c, k_pe


def scattered(x: Inputs) -> tuple[Tensor, Tensor]:
    """Every sequence writes its token at its own position."""
    fused = x.fused.clone()
    fused[torch.arange(fused.shape[0]), x.lens - 1] = x.other[:, 0]
    return halves(fused, x)


def appended(x: Inputs) -> tuple[Tensor, Tensor]:
    """A dynamic cache: the last token comes from the step."""
    kv_c = torch.cat([x.kv_c[:, :-1], x.other[:, -1:, : x.kv_c.shape[-1]]], 1)
    return kv_c, torch.cat([x.k_pe[:, :-1], x.k_pe[:, -1:] * 2], 1)


def normalised(x: Inputs) -> tuple[Tensor, Tensor]:
    """The cache holds the latent before its norm."""
    kv_c = x.kv_c.float() if x.kv_c.dtype != torch.float64 else x.kv_c
    kv_c = (kv_c * kv_c.square().mean(-1, keepdim=True).add(1e-6).rsqrt()).to(x.kv_c.dtype)
    return kv_c * x.norm, x.k_pe


def by_pages(x: Inputs) -> tuple[Tensor, Tensor]:
    return halves(x.pool[x.table].flatten(1, 2), x)


def by_index_select(x: Inputs) -> tuple[Tensor, Tensor]:
    rows = x.pool.index_select(0, x.table.flatten())
    return halves(rows.view(x.table.shape[0], -1, rows.shape[-1]), x)


def by_slots(x: Inputs) -> tuple[Tensor, Tensor]:
    return halves(x.pool.flatten(0, 1)[x.slots], x)


CACHES: dict[str, Callable[[Inputs], tuple[Tensor, Tensor]]] = {
    "two": lambda x: (x.kv_c, x.k_pe),
    "fused": lambda x: halves(x.fused, x),
    "split": lambda x: x.fused.split([x.w.shape[-1], x.k_pe.shape[-1]], -1),
    "sliced": lambda x: (x.kv_c[:, PAGE:], x.k_pe[:, PAGE:]),
    "written": written,
    "scattered": scattered,
    "appended": appended,
    "normalised": normalised,
    "pages": by_pages,
    "index_select": by_index_select,
    "slots": by_slots,
}


def by_bmm(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """One matrix product over all that is shared: heads and queries are flattened into rows."""
    (left, right), out = equation.split("->")[0].split(","), equation.split("->")[1]
    size = dict(zip(left + right, (*a.shape, *b.shape), strict=True))
    batch = [i for i in out if i in left and i in right]
    rows = [i for i in out if i not in right]
    columns = [i for i in out if i not in left]
    inner = [i for i in left if i not in out]

    def fold(t: Tensor, names: str, *groups: list[str]) -> Tensor:
        t = t.permute([names.index(i) for group in groups for i in group])
        return t.reshape([prod([size[i] for i in group]) for group in groups])

    product = torch.bmm(fold(a, left, batch, rows, inner), fold(b, right, batch, inner, columns))
    order = [*batch, *rows, *columns]
    return product.reshape([size[i] for i in order]).permute([order.index(i) for i in out])


def aligned(t: Tensor, names: str, order: str) -> Tensor:
    """`t` with its dimensions in `order`, of size one where it has none."""
    t = t.permute([names.index(i) for i in order if i in names])
    return t[tuple(slice(None) if i in names else None for i in order)]


def by_sum(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """Broadcast, multiply, sum."""
    (left, right), out = equation.split("->")[0].split(","), equation.split("->")[1]
    order = out + "".join(i for i in left if i not in out)
    return (aligned(a, left, order) * aligned(b, right, order)).sum(-1)


def by_matmul(equation: str, a: Tensor, b: Tensor) -> Tensor:
    """`@` with broadcast batch dimensions, where the result ends in a row and a column."""
    (left, right), out = equation.split("->")[0].split(","), equation.split("->")[1]
    inner = next(i for i in left if i not in out)
    if out[-2] in right or out[-1] in left:
        return by_bmm(equation, a, b)
    return aligned(a, left, out[:-1] + inner) @ aligned(b, right, out[:-2] + inner + out[-1])


CONTRACTIONS: dict[str, Callable[[str, Tensor, Tensor], Tensor]] = {
    "einsum": torch.einsum,
    "matmul": by_matmul,
    "bmm": by_bmm,
    "sum": by_sum,
}


def low(s: Tensor) -> float:
    return torch.finfo(s.dtype).min


MASKS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "where": lambda s, keep: torch.where(keep, s, float("-inf")),
    "masked_fill": lambda s, keep: s.masked_fill(~keep, float("-inf")),
    "finfo.min": lambda s, keep: s.masked_fill(keep.logical_not(), low(s)),
    "added": lambda s, keep: s + torch.zeros((), dtype=s.dtype).masked_fill(~keep, low(s)),
    "added -inf": lambda s, keep: s + torch.where(keep, 0.0, float("-inf")).to(s.dtype),
}


def by_hand(s: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
    e = (s - s.amax(t, keepdim=True)).exp()
    return e / e.sum(t, keepdim=True), None


def by_a_reciprocal(s: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
    e = (s - s.amax(t, keepdim=True)).exp()
    return (1 / e.sum(t, keepdim=True)) * e, None


def divided_late(s: Tensor, t: int) -> tuple[Tensor, Tensor | None]:
    e = (s - s.amax(t, keepdim=True)).exp()
    return e, e.sum(t, keepdim=True)


def wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


# Probabilities, and what is left to divide the output by.
SOFTMAXES: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor | None]]] = {
    "softmax": lambda s, t: (s.softmax(t), None),
    "fp32": lambda s, t: (wide(s).softmax(t).to(s.dtype), None),
    "by hand": by_hand,
    "by a reciprocal": by_a_reciprocal,
    "logsumexp": lambda s, t: ((s - s.logsumexp(t, keepdim=True)).exp(), None),
    "divided late": divided_late,
}


def visible(kind: str, x: Inputs, Skv: int) -> Tensor:
    """[B or 1, 1, Sq or 1, Skv] bool"""
    Sq = x.q_nope.shape[1]
    token, row = torch.arange(Skv), torch.arange(Sq)[:, None]
    length = x.lens[:, None, None, None]
    if kind == "lengths":
        return token < length
    if kind == "all but a length":
        return token >= Skv - length
    if kind == "causal":
        return (token <= row + (Skv - Sq))[None, None]
    if kind == "lengths, causal":
        return token < length - Sq + 1 + row
    return x.keep[..., :Skv]


# The same masks without a finite fill.
INFINITE = {"finfo.min": "masked_fill", "added": "added -inf"}


def over_heads(k: Tensor, N: int, how: str) -> Tensor:
    """[B, Skv, D] as [B, N, Skv, D]"""
    k = k[:, None]
    return k.expand(-1, N, -1, -1) if how == "expand" else k.repeat_interleave(N, 1)


@dataclass(frozen=True)
class Mutation:
    """A change to the tensor that a program has at `place`; or only another use of it."""

    name: str
    place: str
    change: Callable[[Tensor, Inputs], Tensor] = lambda t, x: t
    returned: bool = False

    def __repr__(self) -> str:
        return repr(self.name)


CHOICES: dict[str, list[Any]] = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "dynamic": [False, False, False, True],
    "absorbed": [False, True],
    "cache": list(CACHES),
    "contraction": list(CONTRACTIONS),
    "layout": ["bhst", "bsht", "btsh"],
    "keys": ["two sums", "concatenated", "copied"],
    "heads": ["expand", "repeat", "broadcast"],
    "weights": ["one linear", "two linears", "einsum"],
    "rope": [True, True, True, False],
    "scale": ["after", "divided", "queries", "square roots", "after the mask", "tensor"],
    "hide": ["nothing", "lengths", "all but a length", "causal", "lengths, causal", "input"],
    "mask": list(MASKS),
    "softmax": list(SOFTMAXES),
    "zeroed": ["nothing", "nothing", "short sequences", "rows that see nothing"],
    "sdpa": [False, False, True],
    "loop": ["none", "none", "none", "heads", "sequences"],
    "out": ["bshv", "bhsv", "rows"],
}


@dataclass(frozen=True)
class Program:
    """One way to write MLA decode; a choice that says nothing beside another one is ignored."""

    sizes: Sizes
    dtype: torch.dtype
    dynamic: bool
    absorbed: bool
    cache: str
    contraction: str
    layout: str
    keys: str
    heads: str
    weights: str
    rope: bool
    scale: str
    hide: str
    mask: str
    softmax: str
    zeroed: str
    sdpa: bool
    loop: str
    out: str
    mutation: Mutation | None = None

    @property
    def places(self) -> set[str]:
        """Where a mutation can be."""
        found = {"latent", "keys", "values", "W_UK", "W_UV", "q_nope"}
        found |= {"rope", "q_pe"} if self.rope else set()
        found |= set() if self.sdpa else {"scores", "probabilities"}
        found |= {"late sum"} if self.softmax == "divided late" and not self.sdpa else set()
        found |= set() if self.absorbed else {"expanded keys", "expanded values"}
        found |= set() if self.hide == "nothing" else {"mask"}
        return found

    @property
    def honest(self) -> Program:
        """Where a row sees no token and what plain PyTorch makes of it is rounding: rather NaN.

        Beside a finite fill the log of logsumexp is rounded away, and so are the scores to which
        fp16 adds its lowest number.
        """
        added = self.dtype is torch.float16 and self.mask == "added"
        rounded = not self.sdpa and (self.softmax == "logsumexp" or added)
        return replace(self, mask=INFINITE.get(self.mask, self.mask)) if rounded else self

    def __call__(self, x: Inputs) -> tuple[Tensor, ...]:
        """The output and, if a mutation uses something again, that."""
        run = Run(self)
        if self.loop == "heads":
            out = torch.cat([run.attend(x.of_head(h)) for h in range(x.q_nope.shape[2])], 2)
        elif self.loop == "sequences":
            out = torch.cat([run.attend(x.of_sequence(b)) for b in range(self.sizes.B)])
        else:
            out = run.attend(x)
        out = out.transpose(1, 2).contiguous() if self.out == "bhsv" else out
        return (out.flatten(2) if self.out == "rows" else out, *run.returned)


@dataclass
class Run:
    """A program at work: `at` is where its mutation gets in."""

    program: Program
    returned: list[Tensor] = field(default_factory=list)

    def at(self, place: str, t: Tensor, x: Inputs, order: str = "") -> Tensor:
        """`t`, mutated if this is the place; mutations see scores and probabilities as bhst."""
        mutation = self.program.mutation
        if mutation is None or mutation.place != place:
            return t
        if order:
            t = t.permute([order.index(i) for i in "bhst"])
        t = mutation.change(t, x)
        if mutation.returned:
            self.returned.append(t)
        return t.permute(["bhst".index(i) for i in order]) if order else t

    def attend(self, x: Inputs) -> Tensor:
        """[B, Sq, N, V]"""
        p = self.program
        latent, k_pe = CACHES[p.cache](x)
        latent, k_pe = self.at("latent", latent, x), self.at("rope", k_pe, x)
        keys, values = self.at("keys", latent, x), self.at("values", latent, x)
        q_nope, q_pe = self.at("q_nope", x.q_nope, x), self.at("q_pe", x.q_pe, x)
        N, P = q_nope.shape[2:]
        W_UK, W_UV = x.w.view(N, -1, x.w.shape[-1]).tensor_split([P], 1)
        W_UK, W_UV = self.at("W_UK", W_UK, x), self.at("W_UV", W_UV, x)
        if p.absorbed:
            q = CONTRACTIONS[p.contraction]("bshp,hpc->bshc", q_nope, W_UK)
            out = self.weigh(q, q_pe, keys, k_pe, values, x)
            return CONTRACTIONS[p.contraction]("bshc,hvc->bshv", out, W_UV)
        k, v = self.expand(keys, values, W_UK, W_UV)
        k, v = self.at("expanded keys", k, x), self.at("expanded values", v, x)
        return self.weigh(q_nope, q_pe, k, k_pe, v, x)

    def expand(
        self, keys: Tensor, values: Tensor, W_UK: Tensor, W_UV: Tensor
    ) -> tuple[Tensor, Tensor]:
        """K [B, N, Skv, P] and V [B, N, Skv, V]"""
        N, P, _ = W_UK.shape
        if self.program.weights == "einsum":
            k = torch.einsum("btc,hpc->bhtp", keys, W_UK)
            return k, torch.einsum("btc,hvc->bhtv", values, W_UV)

        def linear(latent: Tensor, w: Tensor) -> Tensor:
            heads: Tensor = F.linear(latent, w.flatten(0, 1)).unflatten(-1, (N, -1))
            return heads.transpose(1, 2)

        if self.program.weights == "two linears":
            return linear(keys, W_UK), linear(values, W_UV)
        w = torch.cat([W_UK, W_UV], 1)
        k = linear(keys, w)
        v = k if values is keys else linear(values, w)
        return k[..., :P], v[..., P:]

    def weigh(
        self, q: Tensor, q_pe: Tensor, k: Tensor, k_pe: Tensor, v: Tensor, x: Inputs
    ) -> Tensor:
        """[B, Sq, N, width of v]; k and v are [B, Skv, width] or [B, N, Skv, width]."""
        p = self.program
        scale = (q.shape[-1] + p.rope * q_pe.shape[-1]) ** -0.5
        if p.scale == "queries":
            q, q_pe, scale = q * scale, q_pe * scale, 1.0
        elif p.scale == "square roots":
            q, q_pe, k, k_pe = (t * scale**0.5 for t in (q, q_pe, k, k_pe))
            scale = 1.0
        if p.sdpa:
            return self.fused(q, q_pe, k, k_pe, v, scale, x).transpose(1, 2)

        contract, layout = CONTRACTIONS[p.contraction], p.layout
        if p.rope and p.keys == "two sums":
            s = contract(f"bshd,{named(k, 'd')}->{layout}", q, k)
            s = s + contract(f"bshd,btd->{layout}", q_pe, k_pe)
        else:
            q, k = self.joined(q, q_pe, k, k_pe)
            s = contract(f"bshd,{named(k, 'd')}->{layout}", q, k)
        t = layout.index("t")
        if p.scale == "divided":
            s = s / (1 / scale)
        elif p.scale != "after the mask":
            s = s * scale
        if p.scale == "tensor":
            s = s * x.temperature
        s = self.at("scores", s, x, layout)
        zeroed = x.lens[:, None, None, None] * 2 < s.shape[t]
        if p.hide != "nothing":
            keep = self.at("mask", visible(p.hide, x, s.shape[t]), x)
            if p.zeroed == "rows that see nothing":
                zeroed = ~keep.any(-1, keepdim=True)
            s = MASKS[p.mask](s, keep.permute(["bhst".index(i) for i in layout]))
        if p.scale == "after the mask":
            s = s * scale
        probabilities, total = SOFTMAXES[p.softmax](s, t)
        if p.zeroed != "nothing":
            zeroed = zeroed.permute(["bhst".index(i) for i in layout])
            probabilities = probabilities.masked_fill(zeroed, 0.0)
        probabilities = self.at("probabilities", probabilities, x, layout)
        rows = layout.replace("t", "")
        out = contract(f"{layout},{named(v, 'v')}->{rows}v", probabilities, v)
        if total is not None:
            total = self.at("late sum", total, x, layout)
            out = out / total.squeeze(t)[..., None]
        return out.permute([*(rows.index(i) for i in "bsh"), 3])

    def joined(self, q: Tensor, q_pe: Tensor, k: Tensor, k_pe: Tensor) -> tuple[Tensor, Tensor]:
        """q [B, Sq, N, D] and k [B, Skv, D] or [B, N, Skv, D] of the latent and the rope part."""
        p, N = self.program, q.shape[2]
        if k.dim() == 4:
            k_pe = over_heads(k_pe, N, "repeat" if p.heads == "repeat" else "expand")
        elif p.heads != "broadcast":
            k, k_pe = over_heads(k, N, p.heads), over_heads(k_pe, N, p.heads)
        if not p.rope:
            return q, k
        q = torch.cat([q, q_pe], -1)
        if p.keys != "copied":
            return q, torch.cat([k, k_pe], -1)
        width = k.shape[-1]
        both = k.new_empty(*k.shape[:-1], q.shape[-1])
        both[..., :width] = k
        both[..., width:] = k_pe
        return q, both

    def fused(
        self, q: Tensor, q_pe: Tensor, k: Tensor, k_pe: Tensor, v: Tensor, scale: float, x: Inputs
    ) -> Tensor:
        """scaled_dot_product_attention; the result is [B, N, Sq, width of v]."""
        p, N = self.program, q.shape[2]
        q, k = self.joined(q, q_pe, k, k_pe)
        k = k if k.dim() == 4 else k[:, None]
        if v.dim() == 3:
            v = over_heads(v, N, p.heads) if p.heads != "broadcast" else v[:, None]
        q = q.transpose(1, 2)
        mask = None
        if p.hide != "nothing":
            mask = self.at("mask", visible(p.hide, x, k.shape[2]), x)
            if p.mask.startswith("added"):
                mask = MASKS[p.mask](torch.zeros(mask.shape, dtype=q.dtype), mask)
        gqa = k.shape[1] != N
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=gqa)


def named(t: Tensor, last: str) -> str:
    return ("bht" if t.dim() == 4 else "bt") + last
