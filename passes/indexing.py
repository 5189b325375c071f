"""Index expressions: which element of which tensor a loop nest reads.

Every loop index is a `Label`.  An index has one entry per tensor dimension, and an entry is a tuple
of mixed-radix `Digit`s, outermost first; a dimension of size one has the empty entry.  A view does
not move data, so it only rewrites the index: `relabel(node, index)` gives the tensor that
`node[index]` really reads and the index it is read at, by one rule an operator.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import Any, TypeVar

from torch.fx import Node

from mla_compile.passes.graph import COPIES, INTEGERS, RESHAPES, argument, aten, dtype, shape
from mla_compile.passes.sizes import Size, divides, equal, numel, plain, true

T = TypeVar("T")


class Label:
    """One loop index, running from 0 to size - 1.  Compared by identity."""

    def __init__(self, name: str, size: Size):
        self.name, self.size = name, plain(size)

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
        whole = isinstance(self.label, Label) and equal(self.offset, 0)
        return whole and equal(self.label.size, self.base)

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, Digit) and self.label == other.label
        return same and equal(self.offset, other.offset) and equal(self.base, other.base)

    def __repr__(self) -> str:
        shift = "" if self.full or equal(self.offset, 0) else f"+{self.offset}"
        return f"{self.label or ''}{shift}" or "0"


Group = tuple[Label, ...]
Entry = tuple[Digit, ...]
Index = tuple[Entry, ...]
Read = tuple[Node, Index] | None


@dataclass(frozen=True)
class Leaf:
    """One element of a tensor that the graph provides: `node[index]`."""

    node: Node
    index: Index

    @property
    def labels(self) -> frozenset[Label]:
        return labels_of(self.index)

    @property
    def tables(self) -> list[tuple[int, Leaf]]:
        """The dimensions that are read where another tensor says, and its elements that say so."""
        entries = enumerate(self.index)
        return [(dim, d.label) for dim, e in entries for d in e if isinstance(d.label, Leaf)]

    def __repr__(self) -> str:
        return f"{self.node.name}[{', '.join('·'.join(map(repr, e)) or '0' for e in self.index)}]"


class Split(Exception):
    """`label` must be split: the entries `ways`, one after another, take its place."""

    def __init__(self, label: Label, ways: list[Entry]):
        self.label, self.ways = label, ways


def every_label(index: Index) -> list[Label]:
    """The labels of an index and of those it is read at, as often as they are read."""
    labels = [d.label for entry in index for d in entry]
    of_tables = (every_label(x.index) for x in labels if isinstance(x, Leaf))
    return [x for x in labels if isinstance(x, Label)] + [*chain.from_iterable(of_tables)]


def labels_of(index: Index) -> frozenset[Label]:
    return frozenset(every_label(index))


def rows_of(leaf: Leaf) -> Group:
    """The labels that run over all of a dimension."""
    return tuple(d.label for entry in leaf.index for d in entry if d.full)


def whole(label: Label) -> Entry:
    """The entry that runs over all of a dimension."""
    return (Digit(label, 0, label.size),)


def outermost(entry: Entry) -> tuple[Digit, Size]:
    """The leading digit of an entry and how many elements one step of it spans."""
    return entry[0] if entry else Digit(None, 0, 1), numel(d.base for d in entry[1:])


def moved(entry: Entry, start: Size, size: Size) -> Entry | None:
    """The entry of a part as one of the whole, where the part begins at `start`."""
    first, span = outermost(entry)
    if equal(start, 0) and equal(span * first.base, size):
        return entry
    if isinstance(first.label, Leaf) or not (divides(span, start) and divides(span, size)):
        return None
    first = Digit(first.label, first.offset + start // span, size // span)
    return entry[1:] if equal(first.base, 1) else (first, *entry[1:])


def substitute(index: Index, label: Label, way: Entry) -> Index:
    """The index with one label replaced by the entry that runs over it."""

    def replaced(d: Digit) -> Entry:
        if d.label is label:
            entry = moved(way, d.offset, d.base)
            if entry is None:
                raise Split(label, [way])
            return entry
        if not isinstance(d.label, Leaf):
            return (d,)
        table = Leaf(d.label.node, substitute(d.label.index, label, way))
        return (Digit(table, d.offset, d.base),)

    return tuple(tuple(x for d in entry for x in replaced(d)) for entry in index)


def splitting(index: Index, body: Callable[[Index], list[T]]) -> list[T]:
    """body(index), the index's own labels split as far as the body asks for it."""
    try:
        return body(index)
    except Split as split:
        if split.label not in labels_of(index):
            raise
        parts = (substitute(index, split.label, way) for way in split.ways)
        return [x for part in parts for x in splitting(part, body)]


def broadcast(node: Node, index: Index) -> Index:
    """The index at which `node` is read when it is broadcast to the rank of `index`."""
    sizes = shape(node)
    entries = index[len(index) - len(sizes) :]
    return tuple(() if e and equal(n, 1) else e for n, e in zip(sizes, entries, strict=True))


def split_at(entry: Entry, within: Size, span: Size = 1) -> tuple[Entry, Entry] | None:
    """The digits of an entry around its innermost `within` elements, and those within.

    One on both sides of the border is split where only its inner part varies, else it is refined.
    What was taken from the entry spans `span` elements.
    """
    if equal(span, within):
        return entry, ()
    if not entry:
        return None
    *rest, digit = entry
    label, reach = digit.label, numel((span, digit.base))
    if divides(reach, within):
        parts = split_at(tuple(rest), within, reach)
        return parts and (parts[0], (*parts[1], digit))
    size = within // span
    if isinstance(label, Leaf) or not (equal(span * size, within) and divides(size, digit.base)):
        return None
    begin = digit.offset % size
    if label is None or true(begin + label.size <= size):
        constant = Digit(None, digit.offset // size, digit.base // size)
        return (*rest, constant), (Digit(label, begin, size),)
    if divides(size, digit.offset) and divides(size, label.size):
        outer, inner = Label(f"{label}o", label.size // size), Label(f"{label}i", size)
        raise Split(label, [whole(outer) + whole(inner)])
    return None


def shifted(source: Any, index: Index, dim: int, start: Size) -> Read:
    """Read `source` with an index into its part that begins at `start` along `dim`.

    Without that dimension the part is one element.
    """
    sizes = shape(source)
    dim %= len(sizes)
    index = index if len(index) == len(sizes) else (*index[:dim], (), *index[dim:])
    entry = moved(index[dim], start, sizes[dim])
    return None if entry is None else (source, (*index[:dim], entry, *index[dim + 1 :]))


def pick_part(index: Index, dim: int, borders: list[Size], parts: list[tuple[Any, Size]]) -> Read:
    """Read a tensor made of consecutive parts along `dim` from the one the index is in.

    A part, from one of the `borders` to the next, is of a tensor that begins at a position.
    """
    first, span = outermost(index[dim])
    if isinstance(first.label, Leaf) or not all(divides(span, border) for border in borders):
        return None
    borders = [border // span for border in borders]
    low, high = first.offset, first.offset + (first.label.size if first.label else 1)
    for (begin, end), (source, start) in zip(pairwise(borders), parts, strict=True):
        if true(low >= begin) and true(high <= end):
            return shifted(source, index, dim, -start)
    inside = [border for border in borders if true(low < border) and true(border < high)]
    if first.label and inside and len(parts) > 1:
        label, cuts = first.label, pairwise((low, *inside, high))
        ways = [Digit(Label(f"{label}@{a - low}", b - a), a - low, label.size) for a, b in cuts]
        raise Split(label, [(way,) for way in ways])
    return None


def _same(node: Node, index: Index) -> Read:
    """A copy, or a tensor that is expanded or repeated.  One label over its copies is not split."""
    source = node.args[1 if node.target is aten.copy.default else 0]
    sizes = shape(node)[len(index) - len(shape(source)) :]
    dims = zip(broadcast(source, index), shape(source), sizes, strict=True)
    try:
        parts = [((), entry) if equal(n, m) else split_at(entry, n) for entry, n, m in dims]
    except Split:
        return None
    if None in parts or dtype(source) != dtype(node):
        return None
    return source, tuple(x for _, x in filter(None, parts))


def _reshape(node: Node, index: Index) -> Read:
    """The digits of the whole index, dealt out anew to the dimensions of the source."""
    digits = tuple(d for entry in index for d in entry if not equal(d.base, 1))
    entries: list[Entry] = []
    for size in reversed(shape(node.args[0])):
        parts = split_at(digits, size)
        if parts is None:
            return None
        digits, entry = parts
        entries.insert(0, entry)
    return None if digits else (node.args[0], tuple(entries))


def _permute(node: Node, index: Index) -> Read:
    entries = {dim % len(index): entry for dim, entry in zip(node.args[1], index, strict=True)}
    return node.args[0], tuple(entries[dim] for dim in range(len(index)))


def _slice(node: Node, index: Index) -> Read:
    """A slice, or the element that is selected."""
    one = node.target is aten.select.int
    dim, start = argument(node, "dim", 0), argument(node, "index" if one else "start", 0)
    size = shape(node.args[0])[dim]
    start = start + size if true(start < 0) else start
    inside = one or (equal(argument(node, "step", 1), 1) and true(start <= size))
    return shifted(node.args[0], index, dim, start) if inside and true(start >= 0) else None


def _piece(node: Node, index: Index) -> Read:
    """A part of a split, or an element that is unbound."""
    pieces, start = node.args
    dim = argument(pieces, "dim", 0)
    if pieces.target is not aten.unbind.int:
        start = sum((v.shape[dim] for v in pieces.meta["val"][:start]), start=0)
    return shifted(pieces.args[0], index, dim, start)


def _cat(node: Node, index: Index) -> Read:
    sources, dim = node.args[0], argument(node, "dim", 0) % len(index)
    if any(len(shape(source)) != len(index) for source in sources):
        return None
    borders = [*accumulate((shape(source)[dim] for source in sources), initial=0)]
    return pick_part(index, dim, borders, [*zip(sources, borders, strict=False)])


def _slice_scatter(node: Node, index: Index) -> Read:
    base, source = node.args[:2]
    dim, start = argument(node, "dim", 0) % len(index), argument(node, "start", 0)
    cast = dtype(source) is not dtype(base)
    if cast or not equal(argument(node, "step", 1), 1) or not true(start >= 0):
        return None
    borders = [0, start, start + shape(source)[dim], shape(node)[dim]]
    return pick_part(index, dim, borders, [(base, 0), (source, start), (base, 0)])


def _pad(node: Node, index: Index) -> Read:
    """Padding, where the index never reaches it.  Padded and cut alike, a tensor is shifted."""
    source: Node = node.args[0]
    read: Read = source, index
    pads = [n.meta["val"] if isinstance(n, Node) else n for n in node.args[1]]
    for dim, before, after in zip(range(len(index))[::-1], pads[::2], pads[1::2], strict=False):
        if read and not (equal(before, 0) and equal(after, 0)):
            borders = [before, before + shape(source)[dim]]
            read = pick_part(read[1], dim, borders, [(source, before)])
    return read


def _gather(node: Node, index: Index) -> Read:
    """`source[..., table, ...]` with one integer tensor: read where the table says."""
    source: Node = node.args[0]
    tables = [(dim, t) for dim, t in enumerate(node.args[1]) if t is not None]
    if len(tables) != 1 or dtype(tables[0][1]) not in INTEGERS:
        return None
    ((dim, table),) = tables
    after = dim + len(shape(table))
    entry = (Digit(settle(table, index[dim:after]), 0, shape(source)[dim]),)
    return source, (*index[:dim], entry, *index[after:])


_RULES: dict[Any, Callable[[Node, Index], Read]] = {
    **dict.fromkeys(COPIES | {aten.copy.default, aten.expand.default, aten.repeat.default}, _same),
    **dict.fromkeys(RESHAPES, _reshape),
    aten.permute.default: _permute,
    aten.slice.Tensor: _slice,
    aten.select.int: _slice,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int), _piece),
    aten.cat.default: _cat,
    aten.slice_scatter.default: _slice_scatter,
    aten.constant_pad_nd.default: _pad,
    aten.index.Tensor: _gather,
}


def relabel(node: Node, index: Index) -> Read:
    """Where `node[index]` really reads: (tensor, index), or None if `node` is no known view.

    Raises Split when the answer is different for different parts of a label.
    """
    view = node.args[0] if node.target is operator.getitem else node
    rule = _RULES.get(view.target)
    return rule(node, index) if rule else None


def settle(node: Node, index: Index) -> Leaf:
    """Follow `node[index]`, broadcast, through views as far as no label needs to be split."""
    index = broadcast(node, index)
    try:
        read = relabel(node, index)
    except Split:
        read = None
    return settle(*read) if read else Leaf(node, index)
