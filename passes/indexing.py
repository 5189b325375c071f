"""Index expressions: which element of which tensor a loop nest reads.

Every loop index is a `Label`.  An index has one entry per tensor dimension, and an entry is a tuple
of mixed-radix `Digit`s, outermost first; a dimension of size one has the empty entry.  A view does
not move data, so it only rewrites the index: `relabel(node, index)` returns the tensor that
`node[index]` really reads and the index it is read at.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.fx import Node

from mla_compile.passes.graph import Size, argument, aten, divides, dtype, equal, plain, shape, true


@dataclass(frozen=True, eq=False)
class Label:
    """One loop index, running from 0 to size - 1.  Compared by identity."""

    name: str
    size: Size

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", plain(self.size))

    def __repr__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Digit:
    """The value `label + offset` in radix `base`.

    Without a label it is the constant `offset`, with a `Leaf` an index read from a tensor.
    """

    label: Label | Leaf | None
    offset: Size
    base: Size

    def __post_init__(self) -> None:
        object.__setattr__(self, "offset", plain(self.offset))
        object.__setattr__(self, "base", plain(self.base))

    @property
    def full(self) -> bool:
        return (
            isinstance(self.label, Label)
            and equal(self.offset, 0)
            and equal(self.label.size, self.base)
        )

    def key(self, rename: dict[Label, str]) -> tuple[object, str, str]:
        name: object = None
        if isinstance(self.label, Label):
            name = rename.get(self.label, self.label)
        elif self.label is not None:
            name = self.label.key(rename)
        return name, str(self.offset), str(self.base)

    def __repr__(self) -> str:
        shift = "" if self.full or equal(self.offset, 0) else f"+{self.offset}"
        return f"{self.label or ''}{shift}" or "0"


Entry = tuple[Digit, ...]
Index = tuple[Entry, ...]


@dataclass(frozen=True, eq=False)
class Leaf:
    """One element of a tensor that the graph provides: `node[index]`."""

    node: Node
    index: Index

    @property
    def labels(self) -> frozenset[Label]:
        return labels_of(self.index)

    def key(self, rename: dict[Label, str]) -> tuple[object, ...]:
        """Equal for reads of the same element, up to the names of labels."""
        return self.node, tuple(tuple(d.key(rename) for d in entry) for entry in self.index)

    def __repr__(self) -> str:
        return f"{self.node.name}[{', '.join('·'.join(map(repr, e)) or '0' for e in self.index)}]"


class Refine(Exception):
    """`label` must be split into an outer and an inner label, the inner one of size `inner`."""

    def __init__(self, label: Label, inner: Size):
        self.label, self.inner = label, inner


class Segment(Exception):
    """`label` must be cut into consecutive ranges of these `sizes`."""

    def __init__(self, label: Label, sizes: tuple[Size, ...]):
        self.label, self.sizes = label, sizes


def labels_of(index: Index) -> frozenset[Label]:
    found: set[Label] = set()
    for digit in (d for entry in index for d in entry):
        if isinstance(digit.label, Label):
            found.add(digit.label)
        elif digit.label is not None:
            found |= digit.label.labels
    return frozenset(found)


def whole(label: Label) -> Entry:
    """The entry that runs over all of a dimension."""
    return (Digit(label, 0, label.size),)


def squeeze(node: Node, index: Index) -> Index:
    """Drop what an index says about dimensions of size one: nothing."""
    return tuple(() if equal(n, 1) else e for n, e in zip(shape(node), index, strict=True))


def broadcast(node: Node, index: Index) -> Index:
    """The index at which `node` is read when it is broadcast to the rank of `index`."""
    return squeeze(node, index[len(index) - len(shape(node)) :])


def outermost(entry: Entry) -> tuple[Digit, Size]:
    """The leading digit of an entry and how many elements one step of it spans."""
    return entry[0], prod((d.base for d in entry[1:]), start=1)


def regroup(index: Index, old: Iterable[Size], new: Iterable[Size]) -> Index | None:
    """The index into shape `old` that reads what `index` reads in the reshaped `new`, if there is one."""
    digits = [d for entry in index for d in entry if not equal(d.base, 1)]
    entries: list[Entry] = []
    for size in reversed(list(old)):
        entry: list[Digit] = []
        span: Size = 1
        while not equal(span, size):
            if not digits:
                return None
            digit = digits.pop()
            if not divides(span * digit.base, size):
                inner = size // span
                if not (equal(span * inner, size) and divides(inner, digit.base)):
                    return None
                parts = split_digit(digit, inner)
                if parts is None:
                    return None
                outer, digit = parts
                digits.append(outer)
            entry.insert(0, digit)
            span = span * digit.base
        entries.append(tuple(entry))
    return tuple(reversed(entries)) if not digits else None


def split_digit(digit: Digit, inner: Size) -> tuple[Digit, Digit] | None:
    """Write a constant as two digits, the inner of radix `inner`; ask for a label to be refined."""
    if digit.label is None:
        return Digit(None, digit.offset // inner, digit.base // inner), Digit(
            None, digit.offset % inner, inner
        )
    if (
        isinstance(digit.label, Label)
        and divides(inner, digit.offset)
        and divides(inner, digit.label.size)
    ):
        raise Refine(digit.label, inner)
    return None


def shift(entry: Entry, start: Size, size: Size) -> Entry | None:
    """The entry into a dimension of `size` for an entry into its slice that begins at `start`."""
    if not entry:
        return () if equal(size, 1) else (Digit(None, start, size),)
    first, span = outermost(entry)
    if equal(start, 0) and equal(span * first.base, size):
        return entry
    if isinstance(first.label, Leaf) or not (divides(span, start) and divides(span, size)):
        return None
    return Digit(first.label, first.offset + start // span, size // span), *entry[1:]


Part = tuple[Size, Size, Node, Size]  # begins at, length, tensor, offset in the tensor
Read = tuple[Node, Index] | None


def pick_part(index: Index, dim: int, parts: list[Part]) -> Read:
    """Read a tensor made of consecutive `parts` along `dim` from the one that the index stays in."""
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
        begin, end = begin // span, (begin + length) // span
        if true(low >= begin) and true(high <= end):
            local = Digit(first.label, low - begin, end - begin), *index[dim][1:]
            entry = shift(local, offset, shape(source)[dim])
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
    return node.args[0], index  # type: ignore[return-value]


def _copy(node: Node, index: Index) -> Read:
    source = node.args[1]
    return (source, broadcast(source, index)) if dtype(source) == dtype(node) else None  # type: ignore[arg-type,return-value]


def _view(node: Node, index: Index) -> Read:
    source: Node = node.args[0]  # type: ignore[assignment]
    entries = regroup(index, shape(source), shape(node))
    return None if entries is None else (source, entries)


def _expand(node: Node, index: Index) -> Read:
    return node.args[0], broadcast(node.args[0], index)  # type: ignore[arg-type,return-value]


def _permute(node: Node, index: Index) -> Read:
    entries: list[Entry] = [()] * len(index)
    for out, dim in enumerate(node.args[1]):  # type: ignore[arg-type]
        entries[dim] = index[out]  # type: ignore[index]
    return node.args[0], tuple(entries)  # type: ignore[return-value]


def _unsqueeze(node: Node, index: Index) -> Read:
    dim = _axis(node, len(index))
    return node.args[0], index[:dim] + index[dim + 1 :]  # type: ignore[return-value]


def _squeeze(node: Node, index: Index) -> Read:
    source: Node = node.args[0]  # type: ignore[assignment]
    kept = [e for e in index if e]
    if len(kept) != sum(not equal(n, 1) for n in shape(source)):
        return None
    return source, tuple(() if equal(n, 1) else kept.pop(0) for n in shape(source))


def _slice(node: Node, index: Index) -> Read:
    source: Node = node.args[0]  # type: ignore[assignment]
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
    source: Node = node.args[0]  # type: ignore[assignment]
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
    source: Node = pieces.args[0]  # type: ignore[assignment]
    dim = _axis(pieces, len(index))
    start = sum((v.shape[dim] for v in pieces.meta["val"][:which]), start=0)
    return shifted(source, index, dim, start)


def _cat(node: Node, index: Index) -> Read:
    dim, parts, begin = _axis(node, len(index)), [], 0
    for source in node.args[0]:  # type: ignore[union-attr]
        if len(shape(source)) != len(index):  # type: ignore[arg-type]
            return None
        length = shape(source)[dim]  # type: ignore[arg-type]
        parts.append((begin, length, source, 0))
        begin = begin + length
    return pick_part(index, dim, parts)  # type: ignore[arg-type]


def _slice_scatter(node: Node, index: Index) -> Read:
    base, source = node.args[:2]
    dim, start = _axis(node, len(index)), argument(node, "start", 0)
    if argument(node, "step", 1) != 1 or not true(start >= 0):
        return None
    size, length = shape(node)[dim], shape(source)[dim]  # type: ignore[arg-type]
    end = start + length
    parts = [(0, start, base, 0), (start, length, source, 0), (end, size - end, base, end)]
    return pick_part(index, dim, [p for p in parts if not equal(p[1], 0)])  # type: ignore[misc]


def _pad(node: Node, index: Index) -> Read:
    """Zero padding, where the index never reaches the padding."""
    source: Node = node.args[0]  # type: ignore[assignment]
    pads: list[Size] = node.args[1]  # type: ignore[assignment]
    entries = list(index)
    for i in range(len(pads) // 2):
        dim, before, after = len(index) - 1 - i, pads[2 * i], pads[2 * i + 1]
        if equal(before, 0) and equal(after, 0):
            continue
        size = shape(source)[dim]
        if len(entries[dim]) != 1 or isinstance(entries[dim][0].label, Leaf):
            return None
        digit = entries[dim][0]
        high = digit.offset + (digit.label.size if isinstance(digit.label, Label) else 1)
        if not (true(digit.offset >= before) and true(high <= before + size)):
            return None
        entries[dim] = (Digit(digit.label, digit.offset - before, size),)
    return source, tuple(entries)


def _gather(node: Node, index: Index) -> Read:
    """`source[..., table, ...]` with one integer tensor: that dimension is read where the table says."""
    source: Node = node.args[0]  # type: ignore[assignment]
    tables = [(dim, t) for dim, t in enumerate(node.args[1]) if t is not None]  # type: ignore[arg-type]
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
    aten.detach.default: _same,
    aten.contiguous.default: _same,
    aten.lift_fresh_copy.default: _same,
    aten.copy.default: _copy,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten._unsafe_view.default: _view,
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.default: _squeeze,
    aten.squeeze.dim: _squeeze,
    aten.squeeze.dims: _squeeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    operator.getitem: _getitem,
    aten.cat.default: _cat,
    aten.slice_scatter.default: _slice_scatter,
    aten.constant_pad_nd.default: _pad,
    aten.index.Tensor: _gather,
}


def relabel(node: Node, index: Index) -> Read:
    """Where `node[index]` really reads: (tensor, index); None if `node` is not a view of a known kind.

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
