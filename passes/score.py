"""Reading the score of an attention: soft cap, masks, and the contractions with latent and rope."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise
from math import isfinite

from torch.fx import Node

from mla_compile.passes.graph import equal, true
from mla_compile.passes.indexing import Digit, Label, Leaf, Refine, Segment, narrowed
from mla_compile.passes.normal_form import SCALINGS, Capped, Softmax, Term
from mla_compile.passes.site import Mask, Reason, Refusal, ScoreTerm
from mla_compile.passes.softmax import Attention
from mla_compile.passes.views import relabel


def cached(term: Term, softmax: Softmax, node: Node) -> Leaf:
    """The one factor of a term that depends on the cached token."""
    leaves = [f for f in term.factors if isinstance(f, Leaf) and f.labels & frozenset(softmax.time)]
    if len(leaves) != 1:
        raise Refusal(
            Reason.SCORE,
            f"{len(leaves)} factors of a product depend on the cached token, not one: {leaves}",
            node,
        )
    return leaves[0]


def uncapped(softmax: Softmax, attention: Attention) -> tuple[tuple[Term, ...], float]:
    """The terms of the score, those under a soft cap times the cap, and the cap or 0."""
    capped = [t for t in softmax.score if any(isinstance(f, Capped) for f in t.factors)]
    if not capped:
        return softmax.score, 0.0
    beside = [t for t in softmax.score if t.summed]
    term, factor = capped[0], capped[0].factors[0]
    if len(capped) > 1 or len(term.factors) > 1 or beside or not isinstance(factor, Capped):
        detail = "the scores are a sum or product of tanh and other terms"
        raise Refusal(Reason.SCORE, detail, attention.softmax)
    if term.scalars or not (isfinite(term.scale) and term.scale > 0):
        raise Refusal(Reason.SCALE, f"the soft cap is {term.scale}", attention.softmax)
    if not all(t.summed for t in factor.terms):
        raise Refusal(Reason.MASK, "a mask is under the soft cap", attention.softmax)
    inner = [replace(t, scale=t.scale * term.scale) for t in factor.terms]
    return (*inner, *(t for t in softmax.score if t is not term)), term.scale


def split_score(
    score: tuple[Term, ...], softmax: Softmax, attention: Attention
) -> tuple[list[tuple[Term, Leaf]], tuple[Mask, ...]]:
    """The contractions with the cache, and what is added to them or put in their place."""
    contractions, masks = [], []
    for term in score:
        factor = term.factors[0]
        if term.summed:
            contractions.append((term, cached(term, softmax, attention.softmax)))
        elif term.scalars or len(term.factors) != 1:
            raise Refusal(Reason.MASK, f"a mask is a product: {term.factors}", attention.softmax)
        elif isinstance(factor, Mask):
            masks.append(replace(factor, fill=factor.fill * term.scale))
        elif isinstance(factor, Leaf):
            masks.append(Mask(factor, scale=term.scale))
    if not contractions:
        leaf = score[0].factors[0]
        node = leaf.node if isinstance(leaf, Leaf) else attention.softmax
        detail = f"the scores are {leaf}, no contraction of queries with a cache times a number"
        raise Refusal(Reason.SCALE if node.target in SCALINGS else Reason.SCORE, detail, node)
    return contractions, tuple(masks)


def split_keys(
    scores: list[tuple[Term, Leaf]],
    kv_c: Leaf,
    softmax: Softmax,
    batch: tuple[Label, ...],
    attention: Attention,
) -> tuple[ScoreTerm, ScoreTerm | None, Label]:
    """The latent and the rope contraction, and the feature label of the values."""
    around = frozenset(batch + softmax.time)
    value = feature_of(kv_c, around, attention.root)
    pieces = [
        p
        for term, key in scores
        for p in cut_at_value(score_term(term, key, around, attention), kv_c, value)
    ]
    latents = [p for p in pieces if is_latent(p, kv_c, value)]
    ropes = [p for p in pieces if p not in latents]
    if len(latents) != 1:
        keys = ", ".join(str(p.key) for p in pieces)
        raise Refusal(
            Reason.VALUE,
            f"the values are {kv_c}, which is {len(latents)} times among the keys {keys}",
            attention.root,
        )
    if len(ropes) > 1:
        raise Refusal(
            Reason.SCORE,
            f"{len(ropes)} contractions beside the latent one, rope is at most one",
            attention.softmax,
        )
    for leaf in (kv_c, *(p.key for p in ropes)):
        if leaf.labels - {value} - {p.feature for p in ropes} != around:
            raise Refusal(
                Reason.LAYOUT, f"{leaf} does not run over every sequence and token", leaf.node
            )
    return latents[0], ropes[0] if ropes else None, value


def feature_of(leaf: Leaf, around: frozenset[Label], node: Node) -> Label:
    features = leaf.labels - around
    if len(features) != 1:
        raise Refusal(
            Reason.LAYOUT, f"{leaf} has {len(features)} feature dimensions, not one", node
        )
    return next(iter(features))


def score_term(term: Term, key: Leaf, around: frozenset[Label], attention: Attention) -> ScoreTerm:
    feature = feature_of(key, around, attention.softmax)
    query = tuple(f for f in term.factors if f is not key)
    if feature not in term.summed or not query or not all(isinstance(f, Leaf) for f in query):
        raise Refusal(
            Reason.SCORE, f"the key {key} is not contracted over {feature}", attention.softmax
        )
    if not term.summed <= key.labels.union(*(f.labels for f in query)):
        raise Refusal(
            Reason.SCORE,
            "the scores are a sum over a dimension that nothing depends on",
            attention.softmax,
        )
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
                begins = accumulate(segment.sizes, initial=0)
                parts = [columns_of(term, *p) for p in zip(begins, segment.sizes, strict=False)]
                pieces = [q for p in parts for q in cut_at_value(p, kv_c, value)]
    return pieces if any(is_latent(p, kv_c, value) for p in pieces) else [term]


def is_latent(term: ScoreTerm, kv_c: Leaf, value: Label) -> bool:
    same = term.key.key({term.feature: "feature"}) == kv_c.key({value: "feature"})
    return same and equal(term.feature.size, value.size)


def columns(term: ScoreTerm, kv_c: Leaf, value: Label) -> list[ScoreTerm]:
    """Before, in and after the values' columns of a fused cache row."""
    at, here = digit_of(kv_c, value), digit_of(term.key, term.feature)
    if at is None or here is None or not equal(at.base, here.base):
        return [term]
    begin, end = at.offset - here.offset, at.offset - here.offset + value.size
    bounds = [0, begin, end, term.feature.size]
    sizes = [b - a for a, b in pairwise(bounds)]
    if not all(true(n >= 0) for n in sizes) or equal(sizes[1], term.feature.size):
        return [term]
    return [columns_of(term, *p) for p in zip(bounds, sizes, strict=False) if not equal(p[1], 0)]


def digit_of(leaf: Leaf, label: Label) -> Digit | None:
    return next((d for entry in leaf.index for d in entry if d.label is label), None)


def columns_of(term: ScoreTerm, start: int, size: int) -> ScoreTerm:
    """A contraction over `size` features from `start` only."""
    feature = Label(f"{term.feature}@{start}", size)
    query, key = (
        tuple(Leaf(x.node, narrowed(x.index, term.feature, feature, start)) for x in leaves)
        for leaves in (term.query, (term.key,))
    )
    return replace(term, query=query, key=key[0], feature=feature)
