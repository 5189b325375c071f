"""One structural rule: is an attention in normal form multi-head latent attention?

It is when every score term has one cache-side leaf, the value leaf is the latent part of the key
leaves (same tensor, same positions), and the rows have labels (heads, queries) that the cache does
not depend on.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import suppress
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
    holds,
    is_tensor,
    reached,
    readers,
    rounds,
    shape,
    strip,
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
from mla_compile.passes.normal_form import Evaluator, softmaxes
from mla_compile.passes.paging import find_paging
from mla_compile.passes.score import cache_term, is_constant, split_keys, split_masks, split_score
from mla_compile.passes.site import (
    Capped,
    Mask,
    Miss,
    MLASite,
    Reason,
    Refusal,
    Softmax,
    Term,
    span,
)
from mla_compile.passes.sizes import Size, divides, equal, true
from mla_compile.passes.softmax import (
    Attention,
    attentions,
    escape,
    find_softmaxes,
    has_queries,
    weighing,
)

# In the names of operators that multiply by a quantised weight.
QUANTISED = ("scaled_mm", "int_mm", "int4", "int8", "quant", "packed")

Sites = dict[Attention, tuple[MLASite, Set[Node]]]  # and the nodes that are expanded for each


def recognise(graph: Graph) -> list[MLASite | Miss]:
    """What each attention of the graph is.

    Several may share what is expanded for them: nobody needs it once all of them are rewritten.
    """
    training = any(n.name.startswith("tangents") for n in graph.find_nodes(op="placeholder"))
    softmaxes = [x for x in find_softmaxes(graph) if weighing(x)]
    misses: dict[Attention, Miss] = {}
    sites: Sites = {}
    for softmax in softmaxes:
        try:
            if training:
                raise Refusal(Reason.TRAINING, "the graph also computes gradients")
            sites[softmax] = judge(softmax)
        except Refusal as refusal:
            if not has_queries(softmax):
                refusal.reason = Reason.NO_QUERY
            misses[softmax] = refusal.miss(softmax.node)
    while refused := dict(objections(sites)):
        misses |= refused
        sites = {x: found for x, found in sites.items() if x not in refused}
    return [sites[x][0] if x in sites else misses[x] for x in softmaxes]


def objections(sites: Sites) -> Iterator[tuple[Attention, Miss]]:
    """Others need the scores or what is expanded for them, or to expand it is the cheaper way."""
    all_found = [found for found, _ in sites.values()]
    replaced = {node for x in all_found for node in (x.softmax, x.root, *x.lse)}
    kept = {node for found in all_found for node in found.inputs}
    for softmax, (found, expanded) in sites.items():
        private = {*expanded, softmax.scores or softmax.node} - {found.root}
        for node in sorted(private, key=str):
            if thief := escape(node, replaced, kept):
                detail = f"{node.name} is also used by {thief.name}"
                yield softmax, Refusal(Reason.ESCAPE, detail, thief).miss(softmax.node)
                break
        else:
            if found.expanded and not pays(**found.dims):
                queries, tokens = found.dims["Sq"], found.dims["Skv"]
                reason = Reason.PREFILL if isinstance(queries, int) else Reason.DYNAMIC
                detail = f"{queries} queries over {tokens} cached tokens"
                yield softmax, Refusal(reason, detail).miss(found.root)


def pays(Sq: Size, Skv: Size, Lkv: Size, P: Size, V: Size, **others: Size) -> bool:
    """Absorbing takes fewer multiply-adds per head of one sequence than expanding.

    Expanded, every cached token is multiplied by W_UK [Lkv, P] and W_UV [Lkv, V] and attended to
    over P + R and V; absorbed, every query is, and cached tokens are attended to over Lkv + R and
    Lkv.
    """
    saved = Lkv * (P + V) - Sq * (Lkv + Lkv - P - V)  # by a cached token
    spent = Sq * Lkv * (P + V)
    return true(Skv * saved > spent if isinstance(Skv, int) else saved > 0)  # at any long length


def judge(softmax: Attention) -> tuple[MLASite, Set[Node]]:
    """The first attention that ends in an MLASite, as that, and what is expanded for it.

    Raises the first Refusal if none of them does.
    """
    refusals = []
    for part in attentions(softmax):
        try:
            return site(part)
        except Split as split:
            detail = f"a view splits {split.label} in a way that no index follows"
            refusals.append(Refusal(Reason.LAYOUT, detail))
        except Refusal as refusal:
            refusals.append(refusal)
    raise refusals[0]


def site(attention: Attention) -> tuple[MLASite, Set[Node]]:
    """The attention as an MLASite, and what is expanded for it.

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
        return found, stopping.expanded
    except Refusal as refusal:
        if refusal.reason is Reason.DTYPE:
            raise
        with suppress(Refusal):
            return described(attention, index, terms, shared), evaluator.expanded
        raise


def described(
    attention: Attention, index: Index, terms: list[Term], shared: frozenset[Label]
) -> MLASite:
    """The one structural rule."""
    softmax, value, biases = split_value(terms, attention)
    lse = attention.lse
    batch = tuple(x for x in softmax.rows if x not in shared)
    around = frozenset(batch + softmax.time)
    scores, masks, logit_cap = split_score(softmax, around, bool(lse))
    zeroed = tuple(f for f in value.factors if isinstance(f, Mask))
    value = replace(value, factors=tuple(f for f in value.factors if f not in zeroed))
    values = cache_term(value, softmax, around)
    latent, rope = split_keys(scores, values, around, attention.root)
    projected = len(latent.factors) > 1 or bool(values.factors)
    heads = weight_rows(latent.factors + values.factors, shared) if projected else frozenset()
    varying = {x for x in shared if not isinstance(x.size, int)}
    masked = varying.union(*(m.leaf.labels for m in masks))
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
        zeroed=zeroed,
        masks=masks,
        lengths=lengths,
        causal=causal,
        logit_cap=logit_cap,
        paging=None,
        lse=lse,
        softmax=attention.node,
    )
    check(found, value)
    check_casts(found, attention.twins)
    return replace(found, paging=find_paging(found))


def split_value(terms: list[Term], attention: Attention) -> tuple[Softmax, Term, tuple[Leaf, ...]]:
    """The softmax, the term of the values, and biases: what is added to the value of every token.

    A row's probabilities sum up to one, so that biases are added to the output as they are.
    """
    found = softmaxes(terms)
    time = tuple(x for softmax in set(found) for x in softmax.time)
    biases = {
        t: leaf
        for t in terms
        for leaf in t.factors
        if t.summed == {*time} and len(t.factors) == 2 and is_constant(leaf, time)
    }
    values = [t for t in terms if t not in biases]
    alike = {(t.scale, t.scalars, t.divided) for t in terms}
    if not len(alike) == len(set(found)) == len(values) == 1 or len(found) != len(terms):
        counts = f"{len(terms)} terms with {len(found)} softmaxes in all"
        detail = f"the output is a sum of {counts}, not one and one"
        raise Refusal(Reason.SOFTMAX, detail, attention.root)
    if values[0].divided != bool(attention.totals):
        detail = f"the weights are divided by their sum {values[0].divided} times"
        raise Refusal(Reason.SOFTMAX, detail, attention.root)
    return found[0], values[0], tuple(biases.values())


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
            of_product = node.target in CONTRACTIONS
            operands = [strip(x, RENAMES) for x in node.args if of_product and is_tensor(x)]
            integers = any(dtype(x) not in FLOATS for x in operands)
            if integers or any(word in str(node.target) for word in QUANTISED):
                detail = f"{leaf.node.name} comes from {node.name} ({node.target})"
                return Refusal(Reason.QUANTISED, detail, node)
            if operands:
                detail = f"{leaf.node.name} ({leaf.node.target}) is between the projection and them"
                return Refusal(Reason.BETWEEN, detail, leaf.node)
    detail = "keys or values have a row for every head and query"
    return Refusal(Reason.NO_LATENT, detail, leaves[0].node if leaves else None)


def weight_rows(leaves: tuple[Leaf, ...], shared: frozenset[Label]) -> frozenset[Label]:
    """The heads: the row labels of the factors that do not run over all rows, the weights."""
    partial = [f.labels & shared for f in leaves if not shared <= f.labels]
    return frozenset().union(*partial) if partial else shared


def check(found: MLASite, value: Term) -> None:
    """What must hold beyond the shape of the formula.

    No factor is a diagonal, and the output has rows, value dimensions, and nothing else.
    """
    masks = found.masks + found.zeroed
    leaves = [leaf for term in found.terms for leaf in (*term.factors, term.key)]
    for leaf in (*leaves, *found.values.factors, *found.biases, *(m.leaf for m in masks)):
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
    check_types(found)
    names = (n for n in ("N", "Lkv", "R", "P", "V") if not isinstance(found.dims[n], int))
    if symbolic := ", ".join(f"{n} = {found.dims[n]}" for n in names):
        raise Refusal(Reason.DYNAMIC, f"symbolic sizes: {symbolic}")


def check_types(found: MLASite) -> None:
    """The caches are of one type, and nobody needs more than the op gives.

    Its output is of queries in the caches' type, and in that; its lse is in float32.
    """
    caches = [term.key.node for term in found.terms]
    type_ = dtype(caches[0])
    if type_ not in FLOATS or any(dtype(n) is not type_ for n in caches):
        raise Refusal(Reason.DTYPE, f"the caches are {[str(dtype(n)) for n in caches]}", caches[0])

    def fits(node: Node) -> bool:
        return dtype(node) in FLOATS and holds(type_, dtype(node))

    rounded = not all(fits(query.node) for term in found.terms for query in term.factors)
    for log in found.lse:
        if dtype(log) is torch.float64 or (rounded and dtype(log) is not type_):
            detail = f"{log.name} needs more of the lse than queries in {type_} give"
            raise Refusal(Reason.DTYPE, detail, log)
    views = reached(found.root, lambda n: [user for user in n.users if user.target in RENAMES])
    users = (user for view in views for user in readers(view) if user.target not in RENAMES)
    for user in users if not fits(found.root) else ():
        if user.target not in CASTS or not fits(user):
            detail = f"{user.name} needs more of the output than the caches' type, {type_}"
            raise Refusal(Reason.DTYPE, detail, user)


def check_casts(found: MLASite, twins: dict[Node, Node]) -> None:
    """Nothing that is replaced rounds to less than the caches or an lse have, or fp32 if less."""

    read = found.inputs

    def replaced(node: Node) -> list[Node]:
        inputs = (twins.get(x, x) for x in node.all_input_nodes)
        return [x for x in inputs if x not in read]

    needed = {found.root: dtype(found.latent.key.node)} | {log: dtype(log) for log in found.lse}
    for result, type_ in needed.items():
        for node in filter(rounds, reached(result, replaced)):
            if not (dtype(node) is torch.float32 or holds(dtype(node), type_)):
                detail = f"{node.name} rounds to {dtype(node)} what is to be {type_}"
                raise Refusal(Reason.DTYPE, detail, node)
