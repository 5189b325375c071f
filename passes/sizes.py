"""Questions about sizes, which may be symbolic: no answer adds a guard."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import lru_cache, reduce
from typing import Any
from weakref import WeakKeyDictionary

import sympy
import torch
from sympy.polys.polyerrors import BasePolynomialError
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true
from torch.utils._sympy.functions import FloorDiv

Size = Any  # int or torch.SymInt

# What was asked of symbolic sizes before: PyTorch takes 40 µs to compare two.
_KNOWN: WeakKeyDictionary[ShapeEnv, dict[Any, bool]] = WeakKeyDictionary()


def true(condition: bool | torch.SymBool) -> bool:
    return bool(statically_known_true(condition))


def equal(a: Size, b: Size) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    sides = expression(a), expression(b)
    known = _KNOWN.setdefault((b if isinstance(a, int) else a).node.shape_env, {})
    if sides not in known:
        known[sides] = true(a == b)
    return known[sides]


def numel(sizes: Iterable[Size]) -> Size:
    """PyTorch takes 30 µs to multiply by one: that is left out."""
    return reduce(operator.mul, [n for n in sizes if not equal(n, 1)] or [1])


def same_sizes(a: Sequence[Size], b: Sequence[Size]) -> bool:
    return len(a) == len(b) and all(map(equal, a, b))


def divides(a: Size, b: Size) -> bool:
    if equal(a, 1) or equal(a, b) or equal(b % a, 0):
        return True
    return not (isinstance(a, int) and isinstance(b, int)) and _multiple(*map(expression, (a, b)))


@lru_cache(maxsize=4096)
def _multiple(a: Any, b: Any) -> bool:
    """As polynomials: PyTorch does not see that 2·s + 2 is a multiple of s + 1."""
    with suppress(BasePolynomialError):
        return bool(sympy.div(b, a, domain="ZZ")[1] == 0)
    return False


def expression(n: Size) -> Any:
    """A size as what can be hashed: an int, or what SymPy makes of it."""
    return n.node.expr if isinstance(n, torch.SymInt) else n


def plain(n: Size) -> Size:
    """A symbolic integer without symbols as an int; s²//s, which PyTorch keeps, as s."""
    if not isinstance(n, torch.SymInt):
        return n
    size = n.node.expr
    if size.has(FloorDiv):
        size = size.replace(FloorDiv, lambda a, b: a / b if (a / b).is_integer else FloorDiv(a, b))
    if size.is_Integer:
        return int(size)
    same = size is n.node.expr
    return n if same else n.node.shape_env.create_symintnode(size, hint=n.node.hint)
