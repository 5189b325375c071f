"""One structural rule: is an attention in normal form multi-head latent attention?

It is when every score term has one cache-side leaf, the value leaf is the latent part of the key
leaves (same tensor, same positions), and the rows have labels (heads, queries) that the cache does
not depend on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from math import isfinite

from torch.fx import Graph, Node

from mla_compile.passes.graph import FLOATS, dtype, equal, shape, true
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
from mla_compile.passes.normal_form import Evaluator, Softmax, Term
from mla_compile.passes.site import Mask, Miss, MLASite, Reason, Refusal, ScoreTerm, source_line
from mla_compile.passes.softmax import Attention, attention_of, find_softmaxes, is_attention


def recognise(graph: Graph) -> Iterator[MLASite | Miss]:
    """What each attention of the graph is.  One may be rewritten before the next is asked for."""
    training = any(n.name.startswith("tangents") for n in graph.find_nodes(op="placeholder"))
    for softmax in list(filter(is_attention, find_softmaxes(graph))):
        try:
            if training:
                raise Refusal(Reason.TRAINING, "the graph also computes gradients")
            yield site(attention_of(softmax))
        except (Refine, Segment) as request:
            detail = f"a view splits {request.label} in a way that no index follows"
            yield Refusal(Reason.LAYOUT, detail).miss(softmax.node)
        except Refusal as refusal:
            yield refusal.miss(softmax.node)


def site(attention: Attention) -> MLASite:
    """The attention as an MLASite; raises Refusal if it is not one, or not one to rewrite."""
    index, terms = read_to_the_end(attention)
    softmax, value = split_value(terms, attention)
    shared = frozenset(softmax.rows) - cache_labels((value, *softmax.score), softmax)
    if not shared:
        raise Refusal(
            Reason.NO_LATENT,
            "keys and values have a row for every head and query",
            attention.softmax,
        )

    evaluator = Evaluator(attention, shared)
    softmax, value = split_value(evaluator.evaluate(attention.root, index), attention)
    scores, masks = split_score(softmax, attention)
    kv_c = cached(value, softmax, attention.root)
    batch = tuple(x for x in softmax.rows if x not in shared)
    latent, rope, feature = split_keys(scores, kv_c, softmax, batch, attention)
    weights = tuple(f for f in value.factors if f is not kv_c and isinstance(f, Leaf))
    heads = (
        weight_rows((*latent.query, *weights), shared)
        if len(latent.query) > 1 or weights
        else frozenset()
    )
    grouped = bool(heads)
    masked = frozenset().union(*(m.leaf.labels for m in masks)) if masks else frozenset()
    lengths, masks = split_lengths(masks, softmax, batch)
    found = MLASite(
        root=attention.root,
        out=tuple(d.label for entry in index for d in entry),  # type: ignore[misc]
        batch=batch,
        queries=tuple(
            x for x in softmax.rows if x in shared and x not in heads and (x in masked or grouped)
        ),
        heads=tuple(
            x for x in softmax.rows if x in shared and (x in heads or not (x in masked or grouped))
        ),
        time=softmax.time,
        latent=latent,
        rope=rope,
        value_feature=feature,
        weights=weights,
        value_scale=value.scale,
        value_scalars=value.scalars,
        masks=masks,
        lengths=lengths,
        where=source_line(attention.softmax),
    )
    check_labels(found, value, attention)
    check(found, evaluator.expanded, attention)
    return found


def read_to_the_end(attention: Attention) -> tuple[Index, list[Term]]:
    """The output's index, refined as its views ask for, and its terms read down to the graph's inputs."""
    root = attention.root
    index = squeeze(root, tuple(whole(Label(f"x{d}", n)) for d, n in enumerate(shape(root))))
    while True:
        evaluator = Evaluator(attention, None)
        try:
            return index, evaluator.evaluate(root, index)
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
    time = frozenset(softmax.time)
    leaves = [
        f for t in terms if t.summed for f in t.factors if isinstance(f, Leaf) and f.labels & time
    ]
    return frozenset().union(*(leaf.labels for leaf in leaves))


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


def split_score(
    softmax: Softmax, attention: Attention
) -> tuple[list[tuple[Term, Leaf]], tuple[Mask, ...]]:
    """The contractions with the cache, and what is added to them or put in their place."""
    contractions, masks = [], []
    for term in softmax.score:
        factor = term.factors[0]
        if term.summed:
            contractions.append((term, cached(term, softmax, attention.softmax)))
        elif term.scalars or len(term.factors) != 1:
            raise Refusal(Reason.MASK, f"a mask is a product: {term.factors}", attention.softmax)
        elif isinstance(factor, Mask):
            masks.append(replace(factor, fill=factor.fill * term.scale))  # type: ignore[operator]
        elif isinstance(factor, Leaf):
            masks.append(Mask(factor, scale=term.scale))
    if not contractions:
        leaf = softmax.score[0].factors[0]
        raise Refusal(
            Reason.SCORE,
            f"the scores are {leaf}, no contraction of queries with a cache",
            attention.softmax,
        )
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
    name = {value: "feature"}
    latents = [p for p in pieces if p.key.key({p.feature: "feature"}) == kv_c.key(name)]
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
    return ScoreTerm(query, key, feature, term.scale, term.scalars)  # type: ignore[arg-type]


def cut_at_value(term: ScoreTerm, kv_c: Leaf, value: Label) -> list[ScoreTerm]:
    """One contraction over a fused cache row as two or three, so that one of them is over the values' columns."""
    at, here = digit_of(kv_c, value), digit_of(term.key, term.feature)
    if (
        term.key.node is not kv_c.node
        or at is None
        or here is None
        or not equal(at.base, here.base)
    ):
        return [term]
    begin, end = at.offset - here.offset, at.offset - here.offset + value.size
    bounds = [0, begin, end, term.feature.size]
    sizes = [b - a for a, b in pairwise(bounds)]
    if not all(true(n >= 0) for n in sizes) or equal(sizes[1], term.feature.size):
        return [term]
    return [
        narrowed(term, start, n) for start, n in zip(bounds, sizes, strict=False) if not equal(n, 0)
    ]


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


def check(found: MLASite, expanded: set[Node], attention: Attention) -> None:
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
    private = expanded - {attention.root} | ({attention.scores} if attention.scores else set())
    for node in sorted(private, key=str):
        if thief := escape(node, attention):
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


def escape(node: Node, attention: Attention) -> Node | None:
    """A node beyond the attention that needs `node` even when the root is computed in another way."""
    seen, todo = {node}, [node]
    while todo:
        for user in todo.pop().users:
            if user in seen or user is attention.root or user is attention.softmax:
                continue
            if user.op == "output" or user.is_impure():
                return user
            seen.add(user)
            todo.append(user)
    return None
