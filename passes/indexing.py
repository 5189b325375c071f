"""Index expressions: which element of which tensor a loop nest reads.

Every loop index is a `Label`.  An index has one entry per tensor dimension, and an entry is a tuple
of mixed-radix `Digit`s, outermost first; a dimension of size one has the empty entry.  A view does
not move data, so it only rewrites the index: `views.relabel(node, index)` gives the tensor that
`node[index]` really reads and the index it is read at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod

from torch.fx import Node

from mla_compile.passes.graph import Size, divides, equal, expression, plain, shape


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

    def key(self, rename: dict[Label, str]) -> tuple[object, ...]:
        name: object = None
        if isinstance(self.label, Label):
            name = rename.get(self.label, self.label)
        elif self.label is not None:
            name = self.label.key(rename)
        return name, expression(self.offset), expression(self.base)

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

    @property
    def tables(self) -> list[tuple[int, Leaf]]:
        """The dimensions that are read where another tensor says, and its elements that say so."""
        entries = enumerate(self.index)
        return [(dim, d.label) for dim, e in entries for d in e if isinstance(d.label, Leaf)]

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
    return frozenset(every_label(index))


def every_label(index: Index) -> Iterator[Label]:
    """The labels of an index, as often as it reads them."""
    for digit in (d for entry in index for d in entry):
        if isinstance(digit.label, Label):
            yield digit.label
        elif digit.label is not None:
            yield from every_label(digit.label.index)


def whole(label: Label) -> Entry:
    """The entry that runs over all of a dimension."""
    return (Digit(label, 0, label.size),)


def substitute(index: Index, label: Label, new: Callable[[Digit], Entry]) -> Index:
    """The index with the digits of one label replaced."""
    return tuple(
        tuple(x for d in entry for x in (new(d) if d.label is label else (d,))) for entry in index
    )


def refined(index: Index, refine: Refine, outer: Label, inner: Label) -> Index:
    """An index with the digit of one label written as two."""

    def two(d: Digit) -> Entry:
        if not (divides(inner.size, d.offset) and divides(inner.size, d.base)):
            raise refine
        return Digit(outer, d.offset // inner.size, d.base // inner.size), *whole(inner)

    return substitute(index, refine.label, two)


def narrowed(index: Index, label: Label, part: Label, begin: Size) -> Index:
    """An index with one label restricted to the part of it that begins there."""
    return substitute(index, label, lambda d: (Digit(part, d.offset + begin, d.base),))


def squeeze(node: Node, index: Index) -> Index:
    """Drop what an index says about dimensions of size one: nothing."""
    return tuple(() if e and equal(n, 1) else e for n, e in zip(shape(node), index, strict=True))


def broadcast(node: Node, index: Index) -> Index:
    """The index at which `node` is read when it is broadcast to the rank of `index`."""
    return squeeze(node, index[len(index) - len(shape(node)) :])


def outermost(entry: Entry) -> tuple[Digit, Size]:
    """The leading digit of an entry and how many elements one step of it spans."""
    return entry[0], prod((d.base for d in entry[1:]), start=1)


def regroup(index: Index, old: Iterable[Size], new: Iterable[Size]) -> Index | None:
    """The index into shape `old` that reads what `index` reads in the reshaped `new`, or None."""
    digits = [d for entry in index for d in entry if not equal(d.base, 1)]
    entries: list[Entry] = []
    for size in reversed(list(old)):
        entry: list[Digit] = []
        span: Size = 1
        while not equal(span, size):
            if not digits:
                return None
            digit = digits.pop()
            reach = span * digit.base if entry else digit.base
            if not divides(reach, size):
                inner = size // span
                if not (equal(span * inner, size) and divides(inner, digit.base)):
                    return None
                parts = split_digit(digit, inner)
                if parts is None:
                    return None
                outer, digit = parts
                digits.append(outer)
                reach = size
            entry.insert(0, digit)
            span = reach
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
