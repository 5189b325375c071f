"""From an MLASite to nodes: absorb the projections, call the op, put the output where it was."""

from __future__ import annotations

import functools
import operator
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from math import inf
from typing import Any

import torch
from sympy import Integer, sympify
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_utils import get_node_storage, get_storage
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._subclasses.fake_tensor import disable_fake_tensor_cache
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

from mla_compile.passes.graph import FLOATS, aten, dtype, is_tensor, shape
from mla_compile.passes.indexing import Digit, Group, Label, Leaf
from mla_compile.passes.site import CacheTerm, Mask, Miss, MLASite, Reason, Refusal, Scalar, span
from mla_compile.passes.sizes import Size, equal, expression, same_sizes

DECODE = torch.ops.mla_compile.mla_decode.default
Labelled = tuple[Tensor, Group]  # one label per dimension
MANY = 2**40  # more tokens than any cache has, and sums of it fit an int64


class Rewriter:
    """Replaces attentions of one graph by the op.

    A model has the same attention in every layer: what replaces it is traced once, then copied.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.replaced: set[Node] = set()
        self.results: dict[Node, Node] = {}  # what one attention gives may be what the next reads
        self.bodies: dict[Hashable, Graph] = {}
        self.symbols = measured(graph)

    def rewrite(self, site: MLASite) -> MLASite | Miss:
        """Replace the attention, or say why not."""
        seen: dict[Any, int] = {}
        kind = structure(replace(site, softmax=site.root), seen)
        results = (site.root, *site.lse)
        inputs = [x for x in seen if isinstance(x, Node) and x not in results]
        symbols = [n for s, n in self.symbols.items() if s in seen and n < site.root]
        mode = inputs[0].meta["val"].fake_mode
        with mode, torch.no_grad(), disable_fake_tensor_cache(mode):  # 30 ms less
            inputs += symbols
            try:
                if (kind, *symbols) not in self.bodies:
                    self.bodies[kind, *symbols] = traced(site, inputs)
            except Refusal as refusal:
                return refusal.miss(site.root)
            given = [self.results.get(x, x) for x in inputs]
            replacements = self.copy(self.bodies[kind, *symbols], given, site.root)
        for old, new in zip(results, replacements, strict=True):
            old.replace_all_uses_with(new)
            self.results[old] = new
        if site.lse:  # may be read before the attention's output
            stable_topological_sort(self.graph)
        self.replaced.add(site.softmax)
        return site

    def remove_dead_code(self) -> None:
        """Fused calls count as random: no one else removes those that were replaced."""
        self.graph.eliminate_dead_code(lambda n: n.is_impure() and n not in self.replaced)

    def copy(self, body: Graph, inputs: list[Node], before: Node) -> tuple[Node, ...]:
        """Copy `body` into the graph, with the user's source lines of the node it stands in for.

        The copies' values are the body's, but for views of other inputs than the body's own.
        """
        kept = {k: before.meta[k] for k in ("stack_trace", "nn_module_stack") if k in before.meta}
        copies = dict(zip(body.find_nodes(op="placeholder"), inputs, strict=True))
        moved = {x for x, own in copies.items() if get_node_storage(x) != get_node_storage(own)}
        with self.graph.inserting_before(before):
            replacements = self.graph.graph_copy(body, copies)
        for node in (n for n in body.nodes if n.op == "call_function"):
            copy = copies[node]
            copy.meta |= kept
            if getattr(node.target, "is_view", False) and node.args[0] in moved:
                moved.add(node)
                copy.meta["val"] = copy.target(*map_arg(copy.args, lambda n: n.meta["val"]))
        return replacements


def measured(graph: Graph) -> dict[Any, Node]:
    """The node that holds each symbolic size, now the only one that asks a tensor for it.

    Inputs are asked for those that they have: nothing is kept for its size alone.
    """
    inputs = graph.find_nodes(op="placeholder")
    sizes = [n for n in inputs if isinstance(n.meta.get("val"), torch.SymInt)]
    holders = {n.meta["val"].node.expr: n for n in sizes}
    with graph.inserting_after(inputs[-1] if inputs else None):
        for node in filter(is_tensor, inputs):
            for dim, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt) and size.node.expr not in holders:
                    holders[size.node.expr] = graph.call_function(aten.sym_size.int, (node, dim))
                    holders[size.node.expr].meta["val"] = size
    for node in graph.nodes:
        if isinstance(size := node.meta.get("val"), torch.SymInt):
            holder = holders.setdefault(size.node.expr, node)
            if node.target is aten.sym_size.int and node is not holder:
                node.replace_all_uses_with(holder)
    return holders


def structure(value: Any, seen: dict[Any, int]) -> Hashable:
    """Equal for two sites if the same nodes can replace both, reading other tensors.

    Notes the symbols that it comes across, and numbers the nodes and labels.
    """
    if isinstance(value, torch.SymInt):
        seen.update(dict.fromkeys(value.node.expr.free_symbols, 0))
        return value.node.expr
    if isinstance(value, tuple):
        return tuple(structure(x, seen) for x in value)
    if isinstance(value, Node):
        t = value.meta["val"]
        layout = structure((*t.shape, *t.stride()), seen)
        return seen.setdefault(value, len(seen)), t.dtype, t.device, layout
    if isinstance(value, Label):
        return seen.setdefault(value, len(seen)), structure(value.size, seen)
    if is_dataclass(value):
        return tuple(structure(getattr(value, f.name), seen) for f in fields(value))
    return value


def traced(site: MLASite, inputs: list[Node]) -> Graph:
    """What replaces the attention, as a function of these nodes."""

    def attention(*values: Tensor) -> tuple[Tensor, ...]:
        return Emitter(dict(zip(inputs, values, strict=True))).attention(site)

    try:
        body = make_fx(attention, select_decomp_table())(*(n.meta["val"] for n in inputs)).graph
    except RuntimeError as error:
        size, untracked, _ = str(error).partition(" (<class 'torch.SymInt'>")
        if not untracked:
            raise
        raise Refusal(Reason.DYNAMIC, f"PyTorch cannot trace the size {size}") from None
    for call in body.find_nodes(op="call_function", target=DECODE):
        # Tracing drops what is at its default; AOTInductor miscounts such ints (pytorch#194261).
        call.kwargs = {"max_seqlen_q": 1} | call.kwargs
    return body


@dataclass(frozen=True)
class Emitter:
    """Builds the replacement out of `tensors`, the values of the graph's nodes."""

    tensors: dict[Node, Tensor]

    def attention(self, site: MLASite) -> tuple[Tensor, ...]:
        """The values of the root and of the site's lse nodes."""
        rows = (*site.batch, *site.queries), site.heads
        kv_c, k_pe = self.caches(site)
        sm_scale = max(term.scale for term in site.terms)  # none of the queries grows
        q_nope = self.query(site.latent, rows, sm_scale)
        q_pe = self.query(site.rope, rows, sm_scale) if site.rope else q_nope[..., :0]
        attn_mask, mask_fill = self.mask(site)
        options = attn_mask, self.block_table(site), self.seq_lens(site)
        # PyTorch also takes scalars and indices from the host.
        mask, table, lens = (x if x is None else x.to(kv_c.device) for x in options)
        out, lse = DECODE(
            unit_stride(q_nope.to(kv_c.dtype)),
            unit_stride(q_pe.to(kv_c.dtype)),
            kv_c,
            k_pe,
            sm_scale,
            block_table=table,
            seq_lens=lens,
            max_seqlen_q=span(site.queries),
            causal=site.causal,
            attn_mask=mask,
            mask_fill=None if mask_fill == -inf else mask_fill,
            logit_cap=site.logit_cap,
        )
        return self.output(out, lse, site), *(self.lse(lse, node, site) for node in site.lse)

    def query(self, term: CacheTerm, rows: tuple[Group, Group], sm_scale: float) -> Tensor:
        """[T, N, width]: the product of the queries and, where the keys are expanded, W_UK."""
        q = product([*map(self.spread, term.factors)], [*rows, (term.feature,)])
        return self.scaled(q, term.scale / sm_scale, term.scalars)

    def caches(self, site: MLASite) -> tuple[Tensor, Tensor]:
        """[B, Skv, width] each, one page a sequence, or the pools [pages, page_size, width]."""
        keys, groups = [term.key for term in site.terms], (site.batch, site.time)
        if site.paging:
            keys, groups = site.paging.keys, ((site.paging.page,), site.paging.slots)
        pairs = zip(keys, site.terms, strict=True)
        kv_c, *k_pe = (self.cache(key, (*groups, (term.feature,))) for key, term in pairs)
        return kv_c, k_pe[0] if k_pe else kv_c[..., :0]

    def cache(self, key: Leaf, groups: tuple[Group, ...]) -> Tensor:
        view = self.view(key, groups)
        if not equal(view.stride(-1), 1):
            raise Refusal(Reason.LAYOUT, f"the features of {key} are not consecutive", key.node)
        if get_storage(view) != get_storage(self.tensors[key.node]) and not key.tables:
            raise Refusal(Reason.LAYOUT, f"{key} cannot be read in place", key.node)
        return view

    def block_table(self, site: MLASite) -> Tensor | None:
        """[B, pages of a sequence].  Like an index, the op's table does not count from the end."""
        if site.paging is None:
            return None
        table = self.view(site.paging.table, (site.batch, site.paging.pages))
        table = torch.where(table < 0, table + site.paging.page.size, table)
        return unit_stride(table).expand(span(site.batch), -1)

    def mask(self, site: MLASite) -> tuple[Tensor | None, float]:
        """One mask, broadcastable to [B, N, Sq, Skv], and what a False in it stands for."""
        groups = (site.batch, site.heads, site.queries, site.time)
        views = [(mask, self.view(mask.leaf, groups)) for mask in site.masks]
        keeps = [x if mask.keep else ~x for mask, x in views if mask.fill is not None]
        keep = functools.reduce(operator.and_, keeps) if keeps else None
        wide = torch.promote_types(dtype(site.latent.key.node), torch.float32)
        bias = self.bias([(mask, x) for mask, x in views if mask.fill is None], wide)
        fill = next((mask.fill for mask in site.masks if mask.fill is not None), -inf)
        if keep is None or bias is None:
            return (bias if keep is None else keep), fill
        lowest = fill if fill == -inf else max(fill, torch.finfo(wide).min)
        hidden = bias.new_full((), lowest, dtype=wide)
        return torch.where(keep, bias.to(wide), hidden), -inf

    def bias(self, added: list[tuple[Mask, Tensor]], wide: torch.dtype) -> Tensor | None:
        """The sum of additive masks, at least in fp32; one alone in a type that the op adds."""
        types = FLOATS - {torch.float64} | {wide}
        if len(added) == 1 and added[0][0].scale == 1 and added[0][1].dtype in types:
            return added[0][1]
        widest = functools.reduce(torch.promote_types, [x.dtype for _, x in added], wide)
        biases = [self.scaled(x.to(widest), mask.scale, ()) for mask, x in added]
        return in_type(functools.reduce(operator.add, biases), wide) if biases else None

    def seq_lens(self, site: MLASite) -> Tensor | None:
        if site.lengths is None and site.paging is None:
            return None
        Skv = span(site.time)
        lengths: Tensor | Size = Skv
        if site.lengths:
            terms = (self.view(t, (site.batch,)).long() for t in site.lengths.terms)
            lengths = sum((t.clamp(-MANY, MANY) for t in terms), start=0) + site.lengths.constant
        if not isinstance(lengths, Tensor):
            device = self.tensors[site.latent.key.node].device
            lengths = torch.full((1,), lengths, dtype=torch.int64, device=device)
        lengths = lengths.expand(span(site.batch)).contiguous()
        if site.lengths is None:
            return lengths
        if site.lengths.fill == -inf:
            return lengths.clamp(min=0, max=Skv)
        return torch.where(lengths > 0, lengths.clamp(max=Skv), Skv)

    def lse(self, lse: Tensor, node: Node, site: MLASite) -> Tensor:
        """From [T, N] to the shape and type of the graph's own log of the sum."""
        rows = (*site.batch, *site.queries, *site.heads)
        value = reshape(lse, [x.size for x in rows]), rows
        return like(node, arrange(value, [(x,) for x in site.rows]))

    def output(self, out: Tensor, lse: Tensor, site: MLASite) -> Tensor:
        """From [T, N, Lkv] to the root's shape and type, through W_UV where there is one."""
        rows = (*site.batch, *site.queries, *site.heads)
        sizes, groups = [x.size for x in rows], [(x,) for x in site.out]
        values = site.values
        latent = reshape(out, [*sizes, values.feature.size]), (*rows, values.feature)
        result = product([latent, *map(self.spread, values.factors)], groups)
        for bias in site.biases:  # a row that sees nothing stays zero
            seen = arrange((reshape(lse > -inf, sizes), rows), groups)
            result = result + arrange(self.spread(bias), groups) * seen
        for mask in site.zeroed:
            kept = arrange(self.spread(mask.leaf), groups)
            result = torch.where(kept if mask.keep else ~kept, result, 0)
        return like(site.root, self.scaled(result, values.scale, values.scalars))

    def scaled(self, tensor: Tensor, scale: float, scalars: tuple[Scalar, ...]) -> Tensor:
        tensor = tensor * scale if scale != 1 else tensor
        for scalar in scalars:
            factor = reshape(self.tensors[scalar.node], [])
            tensor = tensor / factor if scalar.inverse else tensor * factor
        return tensor

    def view(self, leaf: Leaf, groups: Sequence[Group]) -> Tensor:
        """A leaf with one dimension per group, of size one where it has no label of the group."""
        value = self.spread(leaf)
        return arrange(value, [g if set(g) & set(value[1]) else () for g in groups])

    def spread(self, leaf: Leaf) -> Labelled:
        """A leaf as a tensor with one dimension per label."""
        tensor, labels = self.tensors[leaf.node], ()
        for entry in leaf.index:
            if len(entry) > 1:
                tensor = tensor.unflatten(len(labels), [d.base for d in entry])
            for d in entry or [Digit(None, 0, 1)]:
                dim = len(labels)
                if d.label is None:
                    tensor = tensor.select(dim, d.offset)
                elif isinstance(d.label, Leaf):
                    table, inner = self.spread(d.label)
                    tensor = aten.index(tensor, [*[None] * dim, table])
                    labels += inner
                else:
                    tensor = tensor if d.full else tensor.narrow(dim, d.offset, d.label.size)
                    labels += (d.label,)
        return tensor, labels


def arrange(value: Labelled, groups: Sequence[Group]) -> Tensor:
    """A tensor with one dimension per group of labels, expanded over those that it lacks."""
    tensor, labels = value
    wanted = [x for group in groups for x in group]
    order = [labels.index(x) for x in wanted if x in labels]
    if order != sorted(order):
        tensor = tensor.permute(order)
    for dim, x in enumerate(wanted):
        if x not in labels:
            tensor = tensor.unsqueeze(dim)
    if len(order) < len(wanted):
        tensor = tensor.expand([x.size for x in wanted])
    return reshape(tensor, [span(group) for group in groups])


def product(factors: Sequence[Labelled], groups: Sequence[Group]) -> Tensor:
    """The product in the widest type of all, summed over the labels that are in no group."""
    wide = functools.reduce(torch.promote_types, [t.dtype for t, _ in factors])
    wide = wide if wide.is_floating_point else torch.float32
    value, labels = factors[0][0].to(wide), factors[0][1]
    for i, (factor, others) in enumerate(factors[1:], start=2):
        later = {x for _, found in factors[i:] for x in found}.union(*groups)
        batch = tuple(x for x in labels if x in others and x in later)
        summed = tuple(x for x in labels if x in others and x not in later)
        rows = tuple(x for x in labels if x not in others)
        columns = tuple(x for x in others if x not in labels)
        left = arrange((value, labels), (batch, rows, summed))
        right = arrange((factor.to(wide), others), (batch, summed, columns))
        labels = batch + rows + columns
        value = reshape(torch.bmm(left, right), [x.size for x in labels])
    wanted = frozenset().union(*groups)
    if alone := [dim for dim, x in enumerate(labels) if x not in wanted]:
        value, labels = value.sum(alone), tuple(x for x in labels if x in wanted)
    return arrange((value, labels), groups)


def reshape(tensor: Tensor, sizes: Sequence[Size]) -> Tensor:
    """Without a view that changes nothing: each one costs time in every copy."""
    return tensor if same_sizes(tensor.shape, sizes) else tensor.reshape(sizes)


def like(node: Node, tensor: Tensor) -> Tensor:
    """The tensor in the node's shape and type, and its order in memory: later views rely on it."""
    tensor = reshape(tensor, shape(node)).to(dtype(node))
    # A stride is a product of sizes: their order is that at any size, one not known yet as well.
    strides = [sympify(expression(n)) for n in node.meta["val"].stride()]
    strides = [n.xreplace(dict.fromkeys(n.free_symbols, Integer(4096))) for n in strides]
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    if order == sorted(order):
        return tensor.contiguous()
    back = sorted(range(len(order)), key=order.__getitem__)
    return tensor.permute(order).contiguous().permute(back)


def in_type(tensor: Tensor, type_: torch.dtype) -> Tensor:
    """In this type; what is finite stays so."""
    if tensor.dtype is type_:
        return tensor
    finite = tensor.clamp(min=torch.finfo(type_).min)
    return torch.where(tensor == -inf, tensor, finite).to(type_)


def unit_stride(tensor: Tensor) -> Tensor:
    """The op reads rows of consecutive features."""
    return tensor if equal(tensor.stride(-1), 1) else tensor.contiguous()
