"""Splitting a label: into digits for a view, into segments for a concatenation."""

from __future__ import annotations

from collections.abc import Callable

from mla_compile.passes.graph import Size, divides
from mla_compile.passes.indexing import Digit, Entry, Label, Refine, Segment, whole
from mla_compile.passes.site import Reason, Refusal


def refined(entry: Entry, refine: Refine, outer: Label, inner: Label) -> Entry:
    """An entry with the digit of one label written as two."""
    digits: list[Digit] = []
    for d in entry:
        if d.label is not refine.label:
            digits.append(d)
            continue
        if not (divides(inner.size, d.offset) and divides(inner.size, d.base)):
            raise Refusal(
                Reason.LAYOUT,
                f"a dimension of {d.base} is cut off the grid of {inner.size} that a view needs",
            )
        digits += [Digit(outer, d.offset // inner.size, d.base // inner.size), *whole(inner)]
    return tuple(digits)


def cut(entry: Entry, segment: Segment, fresh: Callable[[Size], Label]) -> list[Entry]:
    """Copies of an entry, each restricted to one segment of a label."""
    pieces, begin = [], 0
    for size in segment.sizes:
        piece = tuple(
            Digit(fresh(size), d.offset + begin, d.base) if d.label is segment.label else d
            for d in entry
        )
        pieces.append(piece)
        begin = begin + size
    return pieces
