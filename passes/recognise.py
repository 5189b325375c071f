"""One structural rule: is an attention in normal form multi-head latent attention?

It is when every score term has one cache-side leaf, the value leaf is the latent part of the key
leaves (same tensor, same positions), and the rows have labels (heads, queries) that the cache does
not depend on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import accumulate, pairwise
from math import isfinite

from torch.fx import Graph, Node

from mla_compile.passes.graph import CONTRACTIONS, FLOATS, divides, dtype, equal, shape, true
from mla_compile.passes.indexing import (
    Digit,
    Index,
    Label,
    Leaf,
    Refine,
    Segment,
    squeeze,
    whole,
)
from mla_compile.passes.labels import refined
from mla_compile.passes.masks import check_masks, split_lengths
from mla_compile.passes.normal_form import Capped, Evaluator, Softmax, Term
from mla_compile.passes.paging import find_paging
from mla_compile.passes.site import (
    Mask,
    Miss,
    MLASite,
    Reason,
    Refusal,
    ScoreTerm,
    source_line,
    span,
)
from mla_compile.passes.softmax import (
    Attention,
    attention_of,
    escape,
    find_softmaxes,
    is_attention,
)
from mla_compile.passes.views import relabel

# In the names of operators that multiply by a quantised weight.
QUANTISED = ("scaled_mm", "int_mm", "int4", "int8", "quant", "packed")


def recognise(graph: Graph) -> Iterator[MLASite | Miss]:
    """What each attention of the graph is.  One may be rewritten before the next is asked for."""
    training = any(n.name.startswith("tangents") for n in graph.find_nodes(op="placeholder"))
    sharing = []
    for softmax in list(filter(is_attention, find_softmaxes(graph))):
        try:
            if training:
                raise Refusal(Reason.TRAINING, "the graph also computes gradients")
            attention = attention_of(softmax)
        except Refusal as refusal:
            yield refusal.miss(softmax.node)
            continue
        verdict = judge(attention)
        if isinstance(verdict, Miss) and verdict.reason is Reason.ESCAPE:
            sharing.append(attention)
        else:
            yield verdict
    yield from judge_together(sharing)


def judge_together(attentions: list[Attention]) -> Iterator[MLASite | Miss]:
    """Attentions that share what is expanded: nobody needs it once all of them are rewritten."""
    roots = {attention.root for attention in attentions}
    verdicts = [judge(attention, roots) for attention in attentions]
    refused = [v for v in verdicts if isinstance(v, Miss)]
    if not refused:
        yield from verdicts
        return
    yield from refused
    pairs = zip(attentions, verdicts, strict=True)
    yield from judge_together([a for a, v in pairs if not isinstance(v, Miss)])


def judge(attention: Attention, beside: Collection[Node] = ()) -> MLASite | Miss:
    """The verdict on one attention, where the nodes `beside` are replaced as well."""
    try:
        return site(attention, beside)
    except (Refine, Segment) as request:
        detail = f"a view splits {request.label} in a way that no index follows"
        return Refusal(Reason.LAYOUT, detail).miss(attention.softmax)
    except Refusal as refusal:
        return refusal.miss(attention.softmax)


def site(attention: Attention, beside: Collection[Node]) -> MLASite:
    """The attention as an MLASite; raises Refusal if it is not one, or not one to rewrite.

    Read to the end, the terms tell which rows the cache does not depend on.  Read again, they stop at
    the first tensor without these rows: the cache.  One head has no row to tell by.
    """
    index, evaluator, terms = read_to_the_end(attention)
    softmax, value = split_value(terms, attention)
    shared = frozenset(softmax.rows) - cache_labels((value, *softmax.score), softmax)
    if not shared:
        refusal = why_no_latent((value, *softmax.score), softmax, attention)
    else:
        stopping = Evaluator(attention, shared)
        try:
            stopped = stopping.evaluate(attention.root, index)
            found = described(attention, index, stopped, shared)
            check_private(stopping.expanded, attention, beside)
            return found
        except Refusal as why:
            refusal = why
    try:
        found = described(attention, index, terms, shared)
    except Refusal:
        raise refusal from None
    check_private(evaluator.expanded, attention, beside)
    return found


def described(
    attention: Attention,
    index: Index,
    terms: list[Term],
    shared: frozenset[Label],
) -> MLASite:
    """The one structural rule."""
    softmax, value = split_value(terms, attention)
    score, logit_cap = uncapped(softmax, attention)
    scores, masks = split_score(score, softmax, attention)
    kv_c = cached(value, softmax, attention.root)
    batch = tuple(x for x in softmax.rows if x not in shared)
    latent, rope, feature = split_keys(scores, kv_c, softmax, batch, attention)
    weights = tuple(f for f in value.factors if f is not kv_c and isinstance(f, Leaf))
    projected = len(latent.query) > 1 or bool(weights)
    heads = weight_rows((*latent.query, *weights), shared) if projected else frozenset()
    masked = frozenset().union(*(m.leaf.labels for m in masks))
    queries = shared - heads if heads else shared & masked
    lengths, masks = split_lengths(masks, softmax, batch)
    found = MLASite(
        root=attention.root,
        out=tuple(d.label for entry in index for d in entry),
        rows=softmax.rows,
        batch=batch,
        queries=tuple(x for x in softmax.rows if x in queries),
        heads=tuple(x for x in softmax.rows if x in shared - queries),
        time=softmax.time,
        latent=latent,
        rope=rope,
        value_feature=feature,
        weights=weights,
        value_scale=value.scale,
        value_scalars=value.scalars,
        masks=masks,
        lengths=lengths,
        logit_cap=logit_cap,
        paging=find_paging(latent, rope, batch, softmax.time, masks),
        lse=attention.lse,
        where=source_line(attention.softmax),
    )
    check_labels(found, value, attention)
    check(found, attention)
    return found


def read_to_the_end(attention: Attention) -> tuple[Index, Evaluator, list[Term]]:
    """The output's index, refined as its views ask for, and its terms read down to the graph's inputs."""
    root = attention.root
    index = squeeze(root, tuple(whole(Label(f"x{d}", n)) for d, n in enumerate(shape(root))))
    while True:
        evaluator = Evaluator(attention, None)
        try:
            return index, evaluator, evaluator.evaluate(root, index)
        except Refine as refine:
            outer, inner = evaluator.split(refine)
            index = tuple(refined(entry, refine, outer, inner) for entry in index)


def split_value(terms: list[Term], attention: Attention) -> tuple[Softmax, Term]:
    softmaxes = [f for t in terms for f in t.factors if isinstance(f, Softmax)]
    if len(terms) != 1 or len(softmaxes) != 1:
        detail = f"the output is a sum of {len(terms)} terms with {len(softmaxes)} softmaxes in all, not one and one"
        raise Refusal(Reason.SOFTMAX, detail, attention.root)
    return softmaxes[0], terms[0]


def cache_labels(terms: tuple[Term, ...], softmax: Softmax) -> frozenset[Label]:
    """The labels of all that is contracted and depends on the cached token."""
    return frozenset().union(*(leaf.labels for leaf in cache_leaves(terms, softmax)))


def cache_leaves(terms: tuple[Term, ...], softmax: Softmax) -> Iterator[Leaf]:
    for term in terms:
        for factor in term.factors:
            if isinstance(factor, Capped):
                yield from cache_leaves(factor.terms, softmax)
            elif term.summed and isinstance(factor, Leaf) and factor.labels & {*softmax.time}:
                yield factor


def why_no_latent(terms: tuple[Term, ...], softmax: Softmax, attention: Attention) -> Refusal:
    """Keys and values have a row for every head: is it the cache that has, or what is made of it?"""
    tokens = span(softmax.time)
    for leaf in cache_leaves(terms, softmax):
        for node in ancestors(leaf.node):
            if any(word in str(node.target) for word in QUANTISED):
                detail = f"{leaf.node.name} comes from {node.name} ({node.target})"
                return Refusal(Reason.QUANTISED, detail, node)
            if node.target in CONTRACTIONS and any(divides(tokens, n) for n in shape(node)):
                detail = f"{leaf.node.name} ({leaf.node.target}) is between the projection and them"
                return Refusal(Reason.BETWEEN, detail, leaf.node)
    detail = "keys and values have a row for every head and query"
    return Refusal(Reason.NO_LATENT, detail, attention.softmax)


def ancestors(node: Node) -> Iterator[Node]:
    todo, seen = [node], {node}
    while todo:
        yield (node := todo.pop())
        todo += [x for x in node.all_input_nodes if x not in seen]
        seen |= {*todo}


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
        detail = f"the scores are {score[0].factors[0]}, no contraction of queries with a cache"
        raise Refusal(Reason.SCORE, detail, attention.softmax)
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
    if feature not in term.summed or not all(isinstance(f, Leaf) for f in query):
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
    """One contraction over a cache row as several, so that one of them is over the values' features."""
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
                parts = [narrowed(term, *p) for p in zip(begins, segment.sizes, strict=False)]
                pieces = [q for p in parts for q in cut_at_value(p, kv_c, value)]
    return pieces if any(is_latent(p, kv_c, value) for p in pieces) else [term]


def is_latent(term: ScoreTerm, kv_c: Leaf, value: Label) -> bool:
    return term.key.key({term.feature: "feature"}) == kv_c.key({value: "feature"})


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
    return [narrowed(term, *p) for p in zip(bounds, sizes, strict=False) if not equal(p[1], 0)]


def digit_of(leaf: Leaf, label: Label) -> Digit | None:
    return next((d for entry in leaf.index for d in entry if d.label is label), None)


def narrowed(term: ScoreTerm, start: int, size: int) -> ScoreTerm:
    """A contraction over `size` features from `start` only."""
    feature = Label(f"{term.feature}@{start}", size)

    def digit(d: Digit) -> Digit:
        return Digit(feature, d.offset + start, d.base) if d.label is term.feature else d

    def leaf(x: Leaf) -> Leaf:
        return Leaf(x.node, tuple(tuple(map(digit, entry)) for entry in x.index))

    return replace(term, query=tuple(map(leaf, term.query)), key=leaf(term.key), feature=feature)


def weight_rows(leaves: tuple[Leaf, ...], shared: frozenset[Label]) -> frozenset[Label]:
    """The heads: the row labels of the factors that do not run over all rows, the weights."""
    partial = [f.labels & shared for f in leaves if not shared <= f.labels]
    return frozenset().union(*partial) if partial else shared


def check(found: MLASite, attention: Attention) -> None:
    """What must hold beyond the shape of the formula."""
    for term in (found.latent, found.rope):
        if term and not (isfinite(term.scale) and term.scale > 0):
            raise Refusal(Reason.SCALE, f"the softmax scale is {term.scale}", attention.softmax)
    caches = [found.latent.key.node] + ([found.rope.key.node] if found.rope else [])
    if any(dtype(n) not in FLOATS for n in caches) or len({dtype(n) for n in caches}) != 1:
        raise Refusal(Reason.DTYPE, f"the caches are {[str(dtype(n)) for n in caches]}", caches[0])
    symbolic = [n for n in ("N", "Lkv", "R", "P", "V") if not isinstance(found.dims[n], int)]
    if symbolic:
        sizes = ", ".join(f"{n} = {found.dims[n]}" for n in symbolic)
        raise Refusal(Reason.DYNAMIC, f"symbolic sizes: {sizes}", attention.softmax)
    if equal(found.dims["Skv"], 1):
        raise Refusal(Reason.PREFILL, "there is only one cached token", attention.softmax)
    check_masks(found.masks, attention.softmax)


def check_private(expanded: set[Node], attention: Attention, beside: Collection[Node]) -> None:
    """Nobody else needs the scores or what is expanded for them."""
    replaced = {attention.root, attention.softmax, *attention.lse, *beside}
    private = expanded - {attention.root} | ({attention.scores} if attention.scores else set())
    for node in sorted(private, key=str):
        if thief := escape(node, replaced):
            raise Refusal(Reason.ESCAPE, f"{node.name} is also used by {thief.name}", thief)


def check_labels(found: MLASite, value: Term, attention: Attention) -> None:
    """No factor is a diagonal, and the output has the rows, the value dimensions, and nothing else."""
    leaves = [*found.latent.query, found.latent.key, *found.weights, *(m.leaf for m in found.masks)]
    leaves += [*found.rope.query, found.rope.key] if found.rope else []
    for leaf in leaves:
        labels = every_label(leaf)
        if len(set(labels)) != len(labels):
            raise Refusal(Reason.LAYOUT, f"{leaf} is read along a diagonal", leaf.node)
    values = frozenset({found.value_feature}).union(*(w.labels for w in found.weights))
    if not frozenset(found.out) <= frozenset(found.batch + found.queries + found.heads) | values:
        raise Refusal(
            Reason.LAYOUT,
            "the output has a dimension that neither queries nor values have",
            attention.root,
        )
    if not value.summed <= values | frozenset(found.time):
        raise Refusal(
            Reason.LAYOUT,
            "the output is a sum over a dimension that nothing depends on",
            attention.root,
        )


def every_label(leaf: Leaf) -> list[Label]:
    """The labels of a leaf, as often as it reads them."""
    found: list[Label] = []
    for d in (d for entry in leaf.index for d in entry):
        if isinstance(d.label, Label):
            found.append(d.label)
        elif d.label is not None:
            found += every_label(d.label)
    return found
