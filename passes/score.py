"""Reading the score of an attention: soft cap, masks, and the contractions with latent and rope."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import isfinite

from torch.fx import Node

from mla_compile.passes.graph import equal, true
from mla_compile.passes.indexing import Digit, Label, Leaf, Refine, Segment, narrowed, relabel
from mla_compile.passes.normal_form import SCALINGS, Capped, Softmax, Term
from mla_compile.passes.site import Mask, Reason, Refusal, ScoreTerm


def cached(term: Term, softmax: Softmax) -> Leaf:
    """The one factor of a term that depends on the cached token."""
    leaves = [f for f in term.factors if isinstance(f, Leaf) and f.labels & frozenset(softmax.time)]
    if len(leaves) != 1:
        many = f"{len(leaves)} factors of a product depend on the cached token, not one: {leaves}"
        raise Refusal(Reason.SCORE, many)
    return leaves[0]


def uncapped(score: tuple[Term, ...]) -> tuple[tuple[Term, ...], float]:
    """The terms of the score, those under a soft cap times the cap, and the cap or 0."""
    capped = [t for t in score if any(isinstance(f, Capped) for f in t.factors)]
    if not capped:
        return score, 0.0
    term, factor = capped[0], capped[0].factors[0]
    if len(capped) > 1 or len(term.factors) > 1 or any(t.summed for t in score):
        raise Refusal(Reason.SCORE, "the scores are a sum or product of tanh and other terms")
    if term.scalars or not (isfinite(term.scale) and term.scale > 0):
        raise Refusal(Reason.SCALE, f"the soft cap is {term.scale}")
    if not all(t.summed for t in factor.terms):
        raise Refusal(Reason.MASK, "a mask is under the soft cap")
    inner = (replace(t, scale=t.scale * term.scale) for t in factor.terms)
    return (*inner, *(t for t in score if t is not term)), term.scale


def split_score(
    score: tuple[Term, ...], softmax: Softmax
) -> tuple[list[tuple[Term, Leaf]], tuple[Mask, ...]]:
    """The contractions with the cache, and what is added to them or put in their place."""
    contractions, masks = [], []
    for term in score:
        factor = term.factors[0]
        if term.summed:
            contractions.append((term, cached(term, softmax)))
        elif term.scalars or len(term.factors) != 1:
            raise Refusal(Reason.MASK, f"a mask is a product: {term.factors}")
        elif isinstance(factor, Mask):
            masks.append(replace(factor, fill=factor.fill * term.scale))
        elif isinstance(factor, Leaf):
            masks.append(Mask(factor, scale=term.scale))
    if not contractions:
        leaf = score[0].factors[0]
        node = leaf.node if isinstance(leaf, Leaf) else None
        detail = f"the scores are {leaf}, no contraction of queries with a cache times a number"
        scaled = node is not None and node.target in SCALINGS
        raise Refusal(Reason.SCALE if scaled else Reason.SCORE, detail, node)
    return contractions, tuple(masks)


def split_keys(
    scores: list[tuple[Term, Leaf]], kv_c: Leaf, around: frozenset[Label], root: Node
) -> tuple[ScoreTerm, ScoreTerm | None, Label]:
    """The latent and the rope contraction, and the feature label of the values.

    A row of a cache has a feature, beside the labels `around` it.
    """
    value = feature_of(kv_c, around)
    pieces = [
        piece
        for term, key in scores
        for piece in cut_at_value(score_term(term, key, around), kv_c, value)
    ]
    latents = [p for p in pieces if is_latent(p, kv_c, value)]
    ropes = [p for p in pieces if p not in latents]
    if len(latents) != 1:
        keys = ", ".join(str(p.key) for p in pieces)
        detail = f"the values are {kv_c}, which is {len(latents)} times among the keys {keys}"
        raise Refusal(Reason.VALUE, detail, root)
    if len(ropes) > 1:
        detail = f"{len(ropes)} contractions beside the latent one, rope is at most one"
        raise Refusal(Reason.SCORE, detail)
    for leaf in (kv_c, *(p.key for p in ropes)):
        if leaf.labels - {value} - {p.feature for p in ropes} != around:
            detail = f"{leaf} does not run over every sequence and token"
            raise Refusal(Reason.LAYOUT, detail, leaf.node)
    return latents[0], ropes[0] if ropes else None, value


def feature_of(leaf: Leaf, around: frozenset[Label]) -> Label:
    features = leaf.labels - around
    if len(features) != 1:
        raise Refusal(Reason.LAYOUT, f"{leaf} has {len(features)} feature dimensions, not one")
    return next(iter(features))


def score_term(term: Term, key: Leaf, around: frozenset[Label]) -> ScoreTerm:
    feature = feature_of(key, around)
    query = tuple(f for f in term.factors if f is not key)
    if feature not in term.summed or not query or not all(isinstance(f, Leaf) for f in query):
        raise Refusal(Reason.SCORE, f"the key {key} is not contracted over {feature}")
    if not term.summed <= key.labels.union(*(f.labels for f in query)):
        detail = "the scores are a sum over a dimension that nothing depends on"
        raise Refusal(Reason.SCORE, detail)
    return ScoreTerm(query, key, feature, term.scale, term.scalars)


def cut_at_value(term: ScoreTerm, kv_c: Leaf, value: Label) -> list[ScoreTerm]:
    """A contraction over a cache row as several, one of them over the values' features."""
    pieces = [term]
    if term.key.node is kv_c.node:
        pieces = columns(term, kv_c, value)
    else:
        try:
            if read := relabel(term.key.node, term.key.index):
                pieces = cut_at_value(replace(term, key=Leaf(*read)), kv_c, value)
        except Refine:
            pass
        except Segment as segment:
            if segment.label is term.feature:
                parts = [part_of(term, *part) for part in segment.parts]
                pieces = [piece for part in parts for piece in cut_at_value(part, kv_c, value)]
    return pieces if any(is_latent(p, kv_c, value) for p in pieces) else [term]


def is_latent(term: ScoreTerm, kv_c: Leaf, value: Label) -> bool:
    """Its key is the value: the same element, were their features the same."""
    key = Leaf(term.key.node, narrowed(term.key.index, term.feature, value, 0))
    return key.key == kv_c.key and equal(term.feature.size, value.size)


def columns(term: ScoreTerm, kv_c: Leaf, value: Label) -> list[ScoreTerm]:
    """Before, in and after the values' columns of a fused cache row."""
    at, here = digit_of(kv_c, value), digit_of(term.key, term.feature)
    if at is None or here is None or not equal(at.base, here.base):
        return [term]
    begin = at.offset - here.offset
    sizes = [b - a for a, b in pairwise((0, begin, begin + value.size, term.feature.size))]
    if not all(true(n >= 0) for n in sizes) or equal(sizes[1], term.feature.size):
        return [term]
    parts = Segment(term.feature, sizes).parts
    return [part_of(term, *part) for part in parts if not equal(part[0].size, 0)]


def digit_of(leaf: Leaf, label: Label) -> Digit | None:
    return next((d for entry in leaf.index for d in entry if d.label is label), None)


def part_of(term: ScoreTerm, feature: Label, begin: int) -> ScoreTerm:
    """A contraction over the part of its features that begins there."""
    query, key = (
        tuple(Leaf(x.node, narrowed(x.index, term.feature, feature, begin)) for x in leaves)
        for leaves in (term.query, (term.key,))
    )
    return replace(term, query=query, key=key[0], feature=feature)
