"""What the masks of an attention say: a length, causality, or something else; do they compose?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf, isfinite, isnan
from typing import Any

import torch
from torch.fx import Node

from mla_compile.passes.graph import Size, argument, aten, dtype, equal, is_tensor, prims, true
from mla_compile.passes.indexing import Index, Label, Leaf, broadcast
from mla_compile.passes.normal_form import ABSORBING, Softmax
from mla_compile.passes.site import Lengths, Mask, Reason, Refusal, span
from mla_compile.passes.views import settle


def split_lengths(
    masks: tuple[Mask, ...], softmax: Softmax, batch: tuple[Label, ...]
) -> tuple[Lengths | None, tuple[Mask, ...]]:
    """Take out the mask that says only `token < length`.

    With a finite fill it stays a mask as well: a sequence of length zero then averages over all.
    """
    masks = tuple(part for mask in masks for part in conjuncts(mask))
    for mask in masks:
        lengths = as_lengths(mask, softmax, batch)
        if lengths is not None and (lengths.fill == -inf or len(masks) == 1):
            rest = tuple(m for m in masks if m is not mask or isfinite(lengths.fill))
            return lengths, rest
    return None, masks


NOT = frozenset({aten.bitwise_not.default, aten.logical_not.default})
# What hides a token that any of its operands hides, by whether True keeps a token.
AND = {
    True: frozenset({aten.bitwise_and.Tensor, aten.logical_and.default}),
    False: frozenset({aten.bitwise_or.Tensor, aten.logical_or.default}),
}


def conjuncts(mask: Mask) -> Iterator[Mask]:
    """Masks that together hide what `mask` hides, if its fill is beyond the reach of any score."""
    node, index = mask.leaf.node, mask.leaf.index
    if mask.fill is not None and node.target is aten.full.default and node.args[1] is mask.keep:
        return  # hides nothing
    negated = node.target in NOT
    splits = negated or node.target in AND[mask.keep]
    if mask.fill is None or mask.fill > ABSORBING or not splits or dtype(node) is not torch.bool:
        yield mask
        return
    for x in node.args:
        leaf = settle(x, broadcast(x, index))
        yield from conjuncts(replace(mask, leaf=leaf, keep=mask.keep != negated))


def split_causal(
    masks: tuple[Mask, ...], softmax: Softmax, queries: tuple[Label, ...]
) -> tuple[bool, tuple[Mask, ...]]:
    """Take out the mask that says only `token <= query + Skv - Sq`.

    With a finite fill each query must see a token. If only the device knows where the queries
    start, nobody can say whether the cache ends with them.
    """
    for mask in masks:
        bound = upper_bound(mask, softmax.time, queries)
        if bound is None or bound.rows != 1 or bound.terms:
            continue
        if not equal(bound.constant + span(queries) - 1, span(softmax.time)):
            continue
        if mask.fill == -inf or (len(masks) == 1 and true(bound.constant >= 1)):
            return True, tuple(m for m in masks if m is not mask)
    return False, masks


def as_lengths(mask: Mask, softmax: Softmax, batch: tuple[Label, ...]) -> Lengths | None:
    bound = upper_bound(mask, softmax.time, ())
    if bound is None or not all(t.labels <= frozenset(batch) for t in bound.terms):
        return None
    return Lengths(bound.terms, bound.constant, mask.fill)


# token < bound: which side the token is on, and whether the bound itself is visible.
COMPARISONS = {aten.lt: (0, 0), aten.le: (0, 1), aten.gt: (1, 0), aten.ge: (1, 1)}


def upper_bound(mask: Mask, time: tuple[Label, ...], queries: tuple[Label, ...]) -> Affine | None:
    """What the tokens that a mask keeps are below, if it compares nothing else."""
    node, index = mask.leaf.node, mask.leaf.index
    comparison = COMPARISONS.get(getattr(node.target, "overloadpacket", None))
    if mask.fill is None or mask.fill > ABSORBING or comparison is None:
        return None
    token_side, closed = comparison if mask.keep else (1 - comparison[0], 1 - comparison[1])
    token, bound = (
        affine(side, broadcast(side, index) if is_tensor(side) else (), (time, queries))
        for side in (node.args[token_side], node.args[1 - token_side])
    )
    if token is None or bound is None or token.terms or (token.tokens, bound.tokens) != (1, 0):
        return None
    return Affine(0, bound.rows - token.rows, bound.terms, bound.constant - token.constant + closed)


@dataclass(frozen=True)
class Affine:
    """tokens · token + rows · query + Σ terms + constant"""

    tokens: int
    rows: int
    terms: tuple[Leaf, ...]
    constant: Size

    def plus(self, other: Affine, sign: int) -> Affine | None:
        if sign < 0 and other.terms:
            return None
        tokens, rows = self.tokens + sign * other.tokens, self.rows + sign * other.rows
        return Affine(tokens, rows, self.terms + other.terms, self.constant + sign * other.constant)


def affine(value: Any, index: Index, axes: tuple[tuple[Label, ...], ...]) -> Affine | None:
    """value[index] as a sum of iotas over tokens and queries, integers and integer tensors."""
    if not isinstance(value, Node):
        return Affine(0, 0, (), value) if isinstance(value, int) else None
    if not is_tensor(value):
        return Affine(0, 0, (), value.meta["val"])
    leaf = settle(value, index)
    node = leaf.node
    if dtype(node) not in (torch.int32, torch.int64):
        return None
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
        a, b = (
            affine(x, broadcast(x, leaf.index) if is_tensor(x) else (), axes) for x in node.args
        )
        total = a and b and a.plus(b, -1 if node.target is aten.sub.Tensor else 1)
        if total is not None:
            return total
    if node.target is prims.iota.default and argument(node, "step") == 1:
        start, entry = argument(node, "start"), leaf.index[0]
        if not entry:
            return Affine(0, 0, (), start)
        labels = tuple(d.label for d in entry)
        if labels in axes and (len(labels) == 1 or all(d.full for d in entry)):
            over = [int(labels == axis) for axis in axes]
            return Affine(*over, (), start + entry[0].offset)
    return None if leaf.labels & {*axes[0], *axes[1]} else Affine(0, 0, (leaf,), 0)


def check_masks(masks: tuple[Mask, ...], node: Node) -> None:
    """Several masks compose if each boolean one hides beyond the reach of any score."""
    fills = {m.fill for m in masks if m.fill is not None}
    if len(masks) > 1 and (len(fills) > 1 or any(f > ABSORBING for f in fills)):
        raise Refusal(Reason.MASK, f"{len(masks)} masks with the fills {sorted(fills)}", node)
    if any(f == inf or isnan(f) for f in fills):
        raise Refusal(Reason.MASK, f"a mask fills with {sorted(fills)}", node)
