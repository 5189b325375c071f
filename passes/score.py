"""Reading the score of an attention: soft cap, masks, and the contractions with latent and rope."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, isfinite, isnan
from typing import Any

import torch
from torch.fx import Node

from mla_compile.passes.graph import (
    CASTS,
    INTEGERS,
    SCALINGS,
    argument,
    aten,
    dtype,
    is_tensor,
    prims,
)
from mla_compile.passes.indexing import Digit, Group, Index, Label, Leaf, settle, substitute
from mla_compile.passes.site import (
    CacheTerm,
    Capped,
    Factor,
    Lengths,
    Mask,
    Reason,
    Refusal,
    Softmax,
    Term,
    span,
)
from mla_compile.passes.sizes import Size, equal, true
from mla_compile.reference import ABSORBING

NOT = frozenset({aten.bitwise_not.default, aten.logical_not.default})
# What hides a token that any of its operands hides, by whether True keeps a token.
AND = {
    True: frozenset({aten.bitwise_and.Tensor, aten.logical_and.default}),
    False: frozenset({aten.bitwise_or.Tensor, aten.logical_or.default}),
}
# token < bound: which side the token is on, and whether the bound itself is visible.
COMPARISONS = {aten.lt: (0, 0), aten.le: (0, 1), aten.gt: (1, 0), aten.ge: (1, 1)}


def cache_term(term: Term, softmax: Softmax, around: frozenset[Label]) -> CacheTerm:
    """A term by its one factor that depends on the cached token.

    A row of a cache has a feature, beside the labels `around` it.
    """
    leaves = [f for f in term.factors if isinstance(f, Leaf) and f.labels & frozenset(softmax.time)]
    if len(leaves) != 1:
        many = f"{len(leaves)} factors of a product depend on the cached token, not one: {leaves}"
        raise Refusal(Reason.SCORE, many)
    (key,) = leaves
    features = key.labels - around
    if len(features) != 1:
        raise Refusal(Reason.LAYOUT, f"{key} has {len(features)} feature dimensions, not one")
    factors = tuple(f for f in term.factors if f is not key and f is not softmax)
    return CacheTerm(factors, key, next(iter(features)), term.scale, term.scalars)


def uncapped(score: tuple[Term, ...]) -> tuple[tuple[Term, ...], float]:
    """The terms of the score, those under a soft cap times the cap, and the cap or 0."""
    capped = [t for t in score if any(isinstance(f, Capped) for f in t.factors)]
    if not capped:
        return score, 0.0
    term, factor = capped[0], capped[0].factors[0]
    if len(capped) > 1 or len(term.factors) > 1 or any(t.summed for t in score):
        raise Refusal(Reason.SCORE, "the scores are a sum or product of tanh and other terms")
    if term.scalars or not (isfinite(term.scale) and term.scale > 0):
        cap = "a number of run time, not a constant" if term.scalars else term.scale
        raise Refusal(Reason.SCALE, f"the soft cap is {cap}")
    if not all(t.summed for t in factor.terms):
        raise Refusal(Reason.MASK, "a mask is under the soft cap")
    inner = (replace(t, scale=t.scale * term.scale) for t in factor.terms)
    return (*inner, *(t for t in score if t is not term)), term.scale


def is_constant(factor: Factor, time: Group) -> bool:
    """The same for every cached token."""
    return isinstance(factor, Leaf) and not factor.labels & frozenset(time)


def split_score(
    softmax: Softmax, around: frozenset[Label], lse: bool
) -> tuple[list[CacheTerm], tuple[Mask, ...], float]:
    """The contractions with the cache, what is added or put in their place, and the soft cap.

    Queries times the bias of the keys shift all scores of a row, which no softmax sees, but for
    those that a mask fills.
    """
    score, logit_cap = uncapped(softmax.score)
    contractions, masks, shifts = [], [], []
    for term in score:
        factor = term.factors[0]
        if term.summed and all(is_constant(f, softmax.time) for f in term.factors):
            shifts.append(term)
        elif term.summed:
            contractions.append(score_term(term, softmax, around))
        elif term.scalars or len(term.factors) != 1 or not isinstance(factor, (Mask, Leaf)):
            raise Refusal(Reason.MASK, f"a mask is a product: {term.factors}")
        elif isinstance(factor, Mask):
            masks.append(replace(factor, fill=factor.fill * term.scale))
        else:
            masks.append(Mask(factor, scale=term.scale))
    filled = any(m.fill is not None and m.fill > ABSORBING for m in masks)
    if shifts and (filled or logit_cap or lse):
        detail = "a bias of the keys does not shift a soft cap, a finite fill or the lse"
        raise Refusal(Reason.SCORE, detail)
    if not contractions:
        leaf = score[0].factors[0]
        node = leaf.node if isinstance(leaf, Leaf) else None
        detail = f"the scores are {leaf}, no contraction of queries with a cache times a number"
        scaled = node is not None and node.target in SCALINGS
        raise Refusal(Reason.SCALE if scaled else Reason.SCORE, detail, node)
    check_masks(masks)
    return contractions, tuple(masks), logit_cap


def score_term(term: Term, softmax: Softmax, around: frozenset[Label]) -> CacheTerm:
    found = cache_term(term, softmax, around)
    key, query = found.key, found.factors
    contracted = found.feature in term.summed and all(isinstance(f, Leaf) for f in query)
    if not (contracted and query):
        raise Refusal(Reason.SCORE, f"the key {key} is not contracted over {found.feature}")
    if not term.summed <= key.labels.union(*(f.labels for f in query)):
        detail = "the scores are a sum over a dimension that nothing depends on"
        raise Refusal(Reason.SCORE, detail)
    return found


def split_masks(
    masks: tuple[Mask, ...], softmax: Softmax, batch: Group, queries: Group
) -> tuple[Lengths | None, bool, tuple[Mask, ...]]:
    """Take out the mask that says only `token < length`, or only `token <= query + Skv - Sq`.

    With a finite fill a length stays a mask as well: a sequence of length zero then averages over
    all.  Under a causal mask with a finite fill each query must see a token.  If only the device
    knows where the queries start, nobody can say whether the cache ends with them.
    """
    masks = tuple(part for mask in masks for part in conjuncts(mask))
    clear = [mask for mask in masks if mask.fill == -inf or len(masks) == 1]
    bounds = [(m, b) for m in clear if (b := upper_bound(m, softmax.time, queries))]
    for mask, bound in bounds:
        if bound.rows == 0 and all(t.labels <= frozenset(batch) for t in bound.terms):
            rest = tuple(m for m in masks if m is not mask or isfinite(mask.fill))
            return Lengths(bound.terms, bound.constant, mask.fill), False, rest
    for mask, bound in bounds:
        at_end = equal(bound.constant + span(queries) - 1, span(softmax.time))
        none_empty = mask.fill == -inf or true(bound.constant >= 1)
        if bound.rows == 1 and not bound.terms and at_end and none_empty:
            return None, True, tuple(m for m in masks if m is not mask)
    return None, False, masks


def conjuncts(mask: Mask) -> list[Mask]:
    """Masks that together hide what `mask` hides, if its fill is beyond the reach of any score."""
    node = mask.leaf.node
    if mask.fill is not None and node.target is aten.full.default and node.args[1] is mask.keep:
        return []  # hides nothing
    negated = node.target in NOT
    splits = negated or node.target in AND[mask.keep]
    splits = splits and all(dtype(x) is torch.bool for x in node.args)
    if mask.fill is None or mask.fill > ABSORBING or not splits:
        return [mask]
    leaves = (settle(x, mask.leaf.index) for x in node.args)
    parts = (replace(mask, leaf=leaf, keep=mask.keep != negated) for leaf in leaves)
    return [conjunct for part in parts for conjunct in conjuncts(part)]


def upper_bound(mask: Mask, time: Group, queries: Group) -> Affine | None:
    """What the tokens that a mask keeps are below, if it compares nothing else."""
    node, index = mask.leaf.node, mask.leaf.index
    comparison = COMPARISONS.get(getattr(node.target, "overloadpacket", None))
    if mask.fill is None or mask.fill > ABSORBING or comparison is None:
        return None
    token_side, closed = comparison if mask.keep else (1 - comparison[0], 1 - comparison[1])
    sides = [affine(side, index, (time, queries)) for side in node.args]
    token, bound = sides[token_side], sides[1 - token_side]
    if token is None or bound is None or token.terms or (token.tokens, bound.tokens) != (1, 0):
        return None
    return Affine(0, bound.rows - token.rows, bound.terms, bound.constant - token.constant + closed)


@dataclass(frozen=True)
class Affine:
    """tokens · token + rows · query + Σ terms + constant"""

    tokens: int
    rows: int
    terms: tuple[Leaf, ...]
    constant: Size


def affine(value: Any, index: Index, axes: tuple[Group, Group]) -> Affine | None:
    """value[index] as a sum of iotas over tokens and queries, integers and integer tensors."""
    if not is_tensor(value):
        number = value.meta["val"] if isinstance(value, Node) else value
        return Affine(0, 0, (), number) if isinstance(number, (int, torch.SymInt)) else None
    leaf = settle(value, index)
    node = leaf.node
    if dtype(node) not in INTEGERS:
        return None
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
        a, b = (affine(x, leaf.index, axes) for x in node.args)
        sign = -1 if node.target is aten.sub.Tensor else 1
        if a and b and (sign > 0 or not b.terms):
            counts = a.tokens + sign * b.tokens, a.rows + sign * b.rows
            return Affine(*counts, a.terms + b.terms, a.constant + sign * b.constant)
    if node.target is prims.iota.default and equal(argument(node, "step"), 1):
        start, entry = argument(node, "start"), leaf.index[0]
        if not entry:
            return Affine(0, 0, (), start)
        labels = tuple(d.label for d in entry)
        if labels in axes and (len(labels) == 1 or all(d.full for d in entry)):
            over = [int(labels == axis) for axis in axes]
            return Affine(*over, (), start + entry[0].offset)
    return None if leaf.labels & {*axes[0], *axes[1]} else Affine(0, 0, (leaf,), 0)


def check_masks(masks: list[Mask]) -> None:
    """Several masks compose if each boolean one hides beyond the reach of any score.

    Rows that a finite fill hides, in a part of the scores, are told apart by all that is added.
    """
    fills = {m.fill for m in masks if m.fill is not None}
    high = [f for f in fills if f > ABSORBING]
    parts = {m.addend for m in masks if m.addend and m.fill != -inf}
    biases = sum(m.fill is None for m in masks)
    if parts and (high or len(parts) + biases > 1):
        raise Refusal(Reason.MASK, f"to a mask that fills with {sorted(fills)} others are added")
    if len(masks) > 1 and (len(fills) > 1 or high):
        raise Refusal(Reason.MASK, f"{len(masks)} masks with the fills {sorted(fills)}")
    if any(f == inf or isnan(f) for f in fills):
        raise Refusal(Reason.MASK, f"a mask fills with {sorted(fills)}")


def split_keys(
    scores: list[CacheTerm], values: CacheTerm, around: frozenset[Label], root: Node
) -> tuple[CacheTerm, CacheTerm | None]:
    """The latent and the rope contraction."""
    pieces = [piece for term in scores for piece in cut_at_value(term, values)]
    latents = [p for p in pieces if element(p.key) == element(values.key)]
    ropes = [p for p in pieces if p not in latents]
    if len(latents) != 1:
        keys = ", ".join(str(p.key) for p in pieces)
        detail = f"the values are {values.key}, which is {len(latents)} times among the keys {keys}"
        raise Refusal(Reason.VALUE, detail, root)
    if len(ropes) > 1:
        detail = f"{len(ropes)} contractions beside the latent one, rope is at most one"
        raise Refusal(Reason.SCORE, detail)
    for term in (values, *ropes):
        if term.key.labels - {term.feature} != around:
            detail = f"{term.key} does not run over every sequence and token"
            raise Refusal(Reason.LAYOUT, detail, term.key.node)
    return latents[0], ropes[0] if ropes else None


def cut_at_value(term: CacheTerm, values: CacheTerm) -> list[CacheTerm]:
    """A contraction over the values' features and, before or after them in a row, over others."""
    width, own = term.feature.size, values.feature.size
    for begin, end in ((0, own), (width - own, 0)) if true(width >= own) else ():
        latent = part_of(term, Digit(values.feature, begin, width))
        if element(latent.key) == element(values.key):
            rest = Label(f"{term.feature}'", width - own)
            others = [] if equal(rest.size, 0) else [part_of(term, Digit(rest, end, width))]
            return [latent, *others]
    return [term]


def part_of(term: CacheTerm, way: Digit) -> CacheTerm:
    """A contraction over a part of its features."""
    key, *factors = (
        settle(x.node, substitute(x.index, term.feature, (way,))) for x in (term.key, *term.factors)
    )
    return replace(term, factors=tuple(factors), key=key, feature=way.label)


def element(leaf: Leaf) -> tuple[Leaf, torch.dtype]:
    """What is read before it is cast, and to which type: autocast casts each view of a cache."""
    cast = leaf.node.target in CASTS
    return settle(leaf.node.args[0], leaf.index) if cast else leaf, dtype(leaf.node)
