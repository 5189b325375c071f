"""One structural rule: is an attention in normal form multi-head latent attention?

It is when every score term has one cache-side leaf, the value leaf is the latent part of the key
leaves (same tensor, same positions), and the rows have labels (heads, queries) that the cache does
not depend on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from math import isfinite

import torch
from torch.fx import Graph, Node

from mla_compile.passes.graph import (
    CASTS,
    CONTRACTIONS,
    FLOATS,
    RENAMES,
    aten,
    dtype,
    is_tensor,
    reached,
    readers,
    shape,
)
from mla_compile.passes.indexing import (
    Index,
    Label,
    Leaf,
    Split,
    broadcast,
    every_label,
    splitting,
    whole,
)
from mla_compile.passes.normal_form import Capped, Evaluator, Softmax, Term
from mla_compile.passes.paging import find_paging
from mla_compile.passes.score import cache_term, is_constant, split_keys, split_masks, split_score
from mla_compile.passes.site import Miss, MLASite, Reason, Refusal, span
from mla_compile.passes.sizes import Size, divides, equal, true
from mla_compile.passes.softmax import (
    Attention,
    Normalised,
    attention_of,
    cropped,
    escape,
    find_softmaxes,
    has_queries,
    is_attention,
)

# In the names of operators that multiply by a quantised weight.
QUANTISED = ("scaled_mm", "int_mm", "int4", "int8", "quant", "packed")


def recognise(graph: Graph) -> Iterator[MLASite | Miss]:
    """What each attention of the graph is.  One may be rewritten before the next is asked for."""
    training = any(n.name.startswith("tangents") for n in graph.find_nodes(op="placeholder"))
    softmaxes = [x for x in find_softmaxes(graph) if is_attention(x)]
    others = {x.node for x in softmaxes if not has_queries(x)}
    for verdict in judge_all(softmaxes, training):
        if isinstance(verdict, Miss) and verdict.attention in others:
            verdict = replace(verdict, reason=Reason.NO_QUERY)
        yield verdict


def judge_all(softmaxes: list[Normalised], training: bool) -> Iterator[MLASite | Miss]:
    sharing = []
    for softmax in softmaxes:
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
    verdicts = {attention: judge(attention, roots) for attention in attentions}
    refused = {a: verdict for a, verdict in verdicts.items() if isinstance(verdict, Miss)}
    yield from (refused or verdicts).values()
    if refused:
        yield from judge_together([a for a in attentions if a not in refused])


def judge(attention: Attention, beside: Collection[Node] = ()) -> MLASite | Miss:
    """The verdict on one attention, where the nodes `beside` are replaced as well."""
    try:
        return weigh(site(attention, beside))
    except Split as split:
        detail = f"a view splits {split.label} in a way that no index follows"
        miss = Refusal(Reason.LAYOUT, detail).miss(attention.node)
    except Refusal as refusal:
        miss = refusal.miss(attention.node)
    part = cropped(attention)
    verdict = judge(part, beside) if part else miss
    return verdict if isinstance(verdict, MLASite) else miss


def site(attention: Attention, beside: Collection[Node]) -> MLASite:
    """The attention as an MLASite; raises Refusal if it is not one, or not one to rewrite.

    Read to the end, the terms tell which rows the cache does not depend on.  Read again, they stop
    at the first tensor without these rows: the cache.  One head has no row to tell by.
    """

    def read(index: Index) -> list[tuple[Index, Evaluator, list[Term]]]:
        evaluator = Evaluator(attention, None)
        return [(index, evaluator, evaluator.evaluate(root, index))]

    root, scores = attention.root, attention.scores
    keys, dim = (scores, attention.axis) if scores else (attention.node.args[1], 2)
    if any(equal(n, 0) for n in (*shape(root), *shape(keys))):
        raise Refusal(Reason.PREFILL, "there are no queries or no cached tokens")
    if equal(shape(keys)[dim], 1):
        raise Refusal(Reason.PREFILL, "there is only one cached token")
    labels = (Label(f"x{d}", n) for d, n in enumerate(shape(root)))
    ((index, evaluator, terms),) = splitting(broadcast(root, tuple(map(whole, labels))), read)
    softmax, value, _ = split_value(terms, attention)
    of_cache = list(cache_leaves((value, *softmax.score), softmax))
    shared = frozenset(softmax.rows).difference(*(leaf.labels for leaf in of_cache))
    try:
        if not shared:
            raise why_no_latent(of_cache, span(softmax.time))
        stopping = Evaluator(attention, shared)
        found = described(attention, index, stopping.evaluate(root, index), shared)
        check_private(stopping.expanded, attention, beside)
        return found
    except Refusal as why:
        if why.reason is Reason.DTYPE or evaluator.rounded:  # read to the end, casts do not round
            raise
        refusal = why
    try:
        found = described(attention, index, terms, shared)
    except Refusal:
        raise refusal from None
    check_private(evaluator.expanded, attention, beside)
    return found


def weigh(found: MLASite) -> MLASite | Miss:
    """The site, or a Miss where expanding the cache is the cheaper way.

    Counted in multiply-adds per head of one sequence.  Expanded, every cached token is multiplied
    by W_UK [Lkv, P] and W_UV [Lkv, V] and attended to over P + R and V; absorbed, every query is,
    and cached tokens are attended to over Lkv + R and Lkv.
    """
    Sq, Skv, Lkv, P, V = (found.dims[name] for name in ("Sq", "Skv", "Lkv", "P", "V"))
    saved = Lkv * (P + V) - Sq * (Lkv + Lkv - P - V)  # by a cached token
    spent = Sq * Lkv * (P + V)
    pays = Skv * saved > spent if isinstance(Skv, int) else saved > 0  # at any long length
    if not found.expanded or true(pays):
        return found
    return Refusal(Reason.PREFILL, f"{Sq} queries over {Skv} cached tokens").miss(found.root)


def described(
    attention: Attention, index: Index, terms: list[Term], shared: frozenset[Label]
) -> MLASite:
    """The one structural rule."""
    softmax, value, biases = split_value(terms, attention)
    batch = tuple(x for x in softmax.rows if x not in shared)
    around = frozenset(batch + softmax.time)
    scores, masks, logit_cap = split_score(softmax, around, bool(attention.lse))
    values = cache_term(value, softmax, around)
    latent, rope = split_keys(scores, values, around, attention.root)
    projected = len(latent.factors) > 1 or bool(values.factors)
    heads = weight_rows(latent.factors + values.factors, shared) if projected else frozenset()
    masked = frozenset().union(*(m.leaf.labels for m in masks))
    queries = shared - heads if heads else shared & masked
    tokens = tuple(x for x in softmax.rows if x in queries)
    lengths, causal, masks = split_masks(masks, softmax, batch, tokens)
    found = MLASite(
        root=attention.root,
        out=tuple(d.label for entry in index for d in entry),
        rows=softmax.rows,
        batch=batch,
        queries=tokens,
        heads=tuple(x for x in softmax.rows if x in shared - queries),
        time=softmax.time,
        latent=latent,
        rope=rope,
        values=values,
        biases=biases,
        masks=masks,
        lengths=lengths,
        causal=causal,
        logit_cap=logit_cap,
        paging=None,
        lse=attention.lse,
        softmax=attention.node,
    )
    check(found, value)
    return replace(found, paging=find_paging(found))


def split_value(terms: list[Term], attention: Attention) -> tuple[Softmax, Term, tuple[Leaf, ...]]:
    """The softmax, the term of the values, and biases: what is added to the value of every token.

    A row's probabilities sum up to one, so that biases are added to the output as they are.
    """
    softmaxes = [f for t in terms for f in t.factors if isinstance(f, Softmax)]
    time = tuple(x for softmax in set(softmaxes) for x in softmax.time)
    biases = {
        t: leaf
        for t in terms
        for leaf in t.factors
        if t.summed == {*time} and len(t.factors) == 2 and is_constant(leaf, time)
    }
    values = [t for t in terms if t not in biases]
    alike = len({(t.scale, t.scalars) for t in terms}) == len(set(softmaxes)) == len(values) == 1
    if not alike or len(softmaxes) != len(terms):
        counts = f"{len(terms)} terms with {len(softmaxes)} softmaxes in all"
        detail = f"the output is a sum of {counts}, not one and one"
        raise Refusal(Reason.SOFTMAX, detail, attention.root)
    return softmaxes[0], values[0], tuple(biases.values())


def cache_leaves(terms: tuple[Term, ...], softmax: Softmax) -> Iterator[Leaf]:
    """All that is contracted and depends on the cached token."""
    for term in terms:
        for factor in term.factors:
            if isinstance(factor, Capped):
                yield from cache_leaves(factor.terms, softmax)
            elif term.summed and isinstance(factor, Leaf) and factor.labels & {*softmax.time}:
                yield factor


def why_no_latent(leaves: list[Leaf], tokens: Size) -> Refusal:
    """Keys and values have a row for every head: does the cache, or what is made of it?"""

    def sources(node: Node) -> list[Node]:
        """What it is computed from for each of the tokens."""
        written = node.target is aten.index_put.default  # into the cache, of new tokens only
        inputs = [node.args[0]] if written else node.all_input_nodes
        return [x for x in inputs if not is_tensor(x) or any(divides(tokens, n) for n in shape(x))]

    for leaf in leaves:
        for node in reached(leaf.node, sources):
            if any(word in str(node.target) for word in QUANTISED):
                detail = f"{leaf.node.name} comes from {node.name} ({node.target})"
                return Refusal(Reason.QUANTISED, detail, node)
            if node.target in CONTRACTIONS:
                detail = f"{leaf.node.name} ({leaf.node.target}) is between the projection and them"
                return Refusal(Reason.BETWEEN, detail, leaf.node)
    detail = "keys and values have a row for every head and query"
    return Refusal(Reason.NO_LATENT, detail, leaves[0].node if leaves else None)


def weight_rows(leaves: tuple[Leaf, ...], shared: frozenset[Label]) -> frozenset[Label]:
    """The heads: the row labels of the factors that do not run over all rows, the weights."""
    partial = [f.labels & shared for f in leaves if not shared <= f.labels]
    return frozenset().union(*partial) if partial else shared


def check(found: MLASite, value: Term) -> None:
    """What must hold beyond the shape of the formula.

    No factor is a diagonal, and the output has rows, value dimensions, and nothing else.
    """
    leaves = [leaf for term in found.terms for leaf in (*term.factors, term.key)]
    for leaf in (*leaves, *found.values.factors, *found.biases, *(m.leaf for m in found.masks)):
        labels = every_label(leaf.index)
        if len(set(labels)) != len(labels):
            raise Refusal(Reason.LAYOUT, f"{leaf} is read along a diagonal", leaf.node)
    of_values = (*found.values.factors, *found.biases, *found.values.scalars)
    if own := {*found.lse} & {x.node for x in of_values}:
        raise Refusal(Reason.ESCAPE, f"the values depend on their own lse, {own.pop().name}")
    values = frozenset({found.values.feature}).union(*(w.labels for w in found.values.factors))
    if not frozenset(found.out) <= values.union(found.batch, found.queries, found.heads):
        detail = "the output has a dimension that neither queries nor values have"
        raise Refusal(Reason.LAYOUT, detail, found.root)
    if not value.summed <= values.union(found.time):
        detail = "the output is a sum over a dimension that nothing depends on"
        raise Refusal(Reason.LAYOUT, detail, found.root)
    for term in found.terms:
        if not (isfinite(term.scale) and term.scale > 0):
            raise Refusal(Reason.SCALE, f"the softmax scale is {term.scale}")
    caches = [term.key.node for term in found.terms]
    types = {dtype(n) for n in caches}
    if len(types) != 1 or not types <= FLOATS:
        raise Refusal(Reason.DTYPE, f"the caches are {[str(dtype(n)) for n in caches]}", caches[0])
    check_lse(found, *types)
    if user := read_wider(found.root, *types):
        detail = f"{user.name} needs more of the output than the caches' type, {types.pop()}"
        raise Refusal(Reason.DTYPE, detail, user)
    symbolic = [n for n in ("N", "Lkv", "R", "P", "V") if not isinstance(found.dims[n], int)]
    if symbolic:
        sizes = ", ".join(f"{n} = {found.dims[n]}" for n in symbolic)
        raise Refusal(Reason.DYNAMIC, f"symbolic sizes: {sizes}")


def check_lse(found: MLASite, type_: torch.dtype) -> None:
    """The op's is in float32, of queries in the caches' type."""
    queries = [query.node for term in found.terms for query in term.factors]
    rounded = any(torch.promote_types(dtype(q), type_) is not type_ for q in queries)
    for log in found.lse:
        if dtype(log) is torch.float64 or (rounded and dtype(log) is not type_):
            detail = f"{log.name} needs more of the lse than queries in {type_} give"
            raise Refusal(Reason.DTYPE, detail, log)


def read_wider(root: Node, type_: torch.dtype) -> Node | None:
    """Who reads an output that is wider than this type, other than to cast it down."""

    def fits(node: Node) -> bool:
        return dtype(node) in FLOATS and torch.promote_types(dtype(node), type_) is type_

    if fits(root):
        return None
    views = reached(root, lambda n: [user for user in n.users if user.target in RENAMES])
    users = (user for view in views for user in readers(view) if user.target not in RENAMES)
    return next((u for u in users if u.target not in CASTS or not fits(u)), None)


def check_private(expanded: set[Node], attention: Attention, beside: Collection[Node]) -> None:
    """Nobody else needs the scores or what is expanded for them."""
    replaced = {attention.root, attention.node, *attention.lse, *beside}
    private = expanded - {attention.root} | ({attention.scores} if attention.scores else set())
    for node in sorted(private, key=str):
        if thief := escape(node, replaced):
            raise Refusal(Reason.ESCAPE, f"{node.name} is also used by {thief.name}", thief)
