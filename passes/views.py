"""What each view of ATen reads: one rule an operator, from (node, index) to (source, index)."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from mla_compile.passes.graph import Size, argument, aten, divides, dtype, equal, shape, true
from mla_compile.passes.indexing import (
    Digit,
    Entry,
    Index,
    Label,
    Leaf,
    Refine,
    Segment,
    broadcast,
    outermost,
    regroup,
    shift,
    squeeze,
)

Part = tuple[Size, Size, Node, Size]  # begins at, length, tensor, offset in the tensor
Read = tuple[Node, Index] | None


def pick_part(index: Index, dim: int, parts: list[Part]) -> Read:
    """Read a tensor made of consecutive `parts` along `dim` from the one the index is in."""
    if not index[dim]:
        return None
    first, span = outermost(index[dim])
    if isinstance(first.label, Leaf) or not all(
        divides(span, n) for begin, length, _, _ in parts for n in (begin, length)
    ):
        return None
    low = first.offset
    high = low + (first.label.size if first.label else 1)
    cuts = []
    for begin, length, source, offset in parts:
        end = begin + length
        if not equal(span, 1):
            begin, end = begin // span, end // span
        if true(low >= begin) and true(high <= end):
            local = Digit(first.label, low - begin, end - begin), *index[dim][1:]
            entry = shift(
                tuple(d for d in local if not equal(d.base, 1)), offset, shape(source)[dim]
            )
            return None if entry is None else (source, (*index[:dim], entry, *index[dim + 1 :]))
        inside = (end if true(end <= high) else high) - (begin if true(begin >= low) else low)
        if true(inside > 0):
            cuts.append(inside)
    if isinstance(first.label, Label) and len(cuts) > 1 and equal(sum(cuts), first.label.size):
        raise Segment(first.label, tuple(cuts))
    return None


def shifted(source: Node, index: Index, dim: int, start: Size) -> Read:
    """Read a slice of `source` that begins at `start` along `dim`."""
    entry = shift(index[dim], start, shape(source)[dim])
    return None if entry is None else (source, (*index[:dim], entry, *index[dim + 1 :]))


def _axis(node: Node, rank: int) -> int:
    return int(argument(node, "dim", 0)) % rank


def _same(node: Node, index: Index) -> Read:
    return node.args[0], index


def _copy(node: Node, index: Index) -> Read:
    source = node.args[1]
    return (source, broadcast(source, index)) if dtype(source) == dtype(node) else None


def _view(node: Node, index: Index) -> Read:
    source: Node = node.args[0]
    entries = regroup(index, shape(source), shape(node))
    return None if entries is None else (source, entries)


def _expand(node: Node, index: Index) -> Read:
    return node.args[0], broadcast(node.args[0], index)


def _permute(node: Node, index: Index) -> Read:
    entries: list[Entry] = [()] * len(index)
    for out, dim in enumerate(node.args[1]):
        entries[dim] = index[out]
    return node.args[0], tuple(entries)


def _unsqueeze(node: Node, index: Index) -> Read:
    dim = _axis(node, len(index))
    return node.args[0], index[:dim] + index[dim + 1 :]


def _slice(node: Node, index: Index) -> Read:
    source: Node = node.args[0]
    dim = _axis(node, len(index))
    size, start = shape(source)[dim], argument(node, "start", 0)
    if argument(node, "step", 1) != 1:
        return None
    if isinstance(start, int) and start < 0:
        start = start + size
    if not (true(start >= 0) and true(start <= size)):
        return None
    return shifted(source, index, dim, start)


def _select(node: Node, index: Index) -> Read:
    source: Node = node.args[0]
    dim, at = _axis(node, len(shape(source))), argument(node, "index")
    size = shape(source)[dim]
    entry = (Digit(None, at + size if isinstance(at, int) and at < 0 else at, size),)
    return source, (*index[:dim], entry, *index[dim:])


def _getitem(node: Node, index: Index) -> Read:
    pieces, which = node.args
    if not isinstance(pieces, Node) or pieces.target not in (
        aten.split_with_sizes.default,
        aten.split.Tensor,
    ):
        return None
    source: Node = pieces.args[0]
    dim = _axis(pieces, len(index))
    start = sum((v.shape[dim] for v in pieces.meta["val"][:which]), start=0)
    return shifted(source, index, dim, start)


def _cat(node: Node, index: Index) -> Read:
    dim, parts, begin = _axis(node, len(index)), [], 0
    for source in node.args[0]:
        if len(shape(source)) != len(index):
            return None
        length = shape(source)[dim]
        parts.append((begin, length, source, 0))
        begin = begin + length
    return pick_part(index, dim, parts)


def _slice_scatter(node: Node, index: Index) -> Read:
    base, source = node.args[:2]
    dim, start = _axis(node, len(index)), argument(node, "start", 0)
    if argument(node, "step", 1) != 1 or not true(start >= 0):
        return None
    size, length = shape(node)[dim], shape(source)[dim]
    end = start + length
    parts = [(0, start, base, 0), (start, length, source, 0), (end, size - end, base, end)]
    return pick_part(index, dim, [p for p in parts if not equal(p[1], 0)])


def _pad(node: Node, index: Index) -> Read:
    """Padding, where the index never reaches it."""
    source: Node = node.args[0]
    read: Read = source, index
    for i, before in enumerate(node.args[1][::2]):
        dim = len(index) - 1 - i
        size = shape(source)[dim]
        if read and not equal(size, shape(node)[dim]):
            read = pick_part(read[1], dim, [(before, size, source, 0)])
    return read


def _gather(node: Node, index: Index) -> Read:
    """`source[..., table, ...]` with one integer tensor: read where the table says."""
    source: Node = node.args[0]
    tables = [(dim, t) for dim, t in enumerate(node.args[1]) if t is not None]
    if len(tables) != 1:
        return None
    dim, table = tables[0]
    if dtype(table) not in (torch.int32, torch.int64):
        return None
    rank = len(shape(table))
    where = settle(table, index[dim : dim + rank])
    entry = (Digit(where, 0, shape(source)[dim]),)
    return source, (*index[:dim], entry, *index[dim + rank :])


_RULES: dict[Any, Callable[[Node, Index], Read]] = {
    aten.clone.default: _same,
    aten.alias.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.copy.default: _copy,
    aten.view.default: _view,
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _view,
    aten.squeeze.dim: _view,
    aten.squeeze.dims: _view,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    operator.getitem: _getitem,
    aten.cat.default: _cat,
    aten.slice_scatter.default: _slice_scatter,
    aten.constant_pad_nd.default: _pad,
    aten.index.Tensor: _gather,
}


def relabel(node: Node, index: Index) -> Read:
    """Where `node[index]` really reads: (tensor, index), or None if `node` is no known view.

    Raises Refine or Segment when the answer is different for different parts of a label.
    """
    rule = _RULES.get(node.target)
    return rule(node, squeeze(node, index)) if rule else None


def settle(node: Node, index: Index) -> Leaf:
    """Follow `node[index]` through views as far as no label needs to be split."""
    index = squeeze(node, index)
    try:
        read = relabel(node, index)
    except (Refine, Segment):
        read = None
    return settle(*read) if read else Leaf(node, index)
