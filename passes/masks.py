"""What the masks of an attention say: a length, causality, or something else; do they compose?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf, isfinite, isnan
from typing import Any

import torch
from torch.fx import Node

from mla_compile.passes.graph import (
    INTEGERS,
    Size,
    argument,
    aten,
    dtype,
    equal,
    is_tensor,
    prims,
    true,
)
from mla_compile.passes.indexing import Group, Index, Leaf, broadcast, settle
from mla_compile.passes.normal_form import ABSORBING, Softmax
from mla_compile.passes.site import Lengths, Mask, Reason, Refusal, span


def split_masks(
    masks: tuple[Mask, ...], softmax: Softmax, batch: Group, queries: Group
) -> tuple[Lengths | None, bool, tuple[Mask, ...]]:
    """Take out the mask that says only `token < length`, or only `token <= query + Skv - Sq`.

    With a finite fill a length stays a mask as well: a sequence of length zero then averages over
    all.  Under a causal mask with a finite fill each query must see a token.  If only the device
    knows where the queries start, nobody can say whether the cache ends with them.
    """
    masks = tuple(part for mask in masks for part in conjuncts(mask))
    bounds = [(mask, upper_bound(mask, softmax.time, queries)) for mask in masks]
    for mask, bound in bounds:
        if bound is None or bound.rows != 0 or (mask.fill != -inf and len(masks) > 1):
            continue
        if all(t.labels <= frozenset(batch) for t in bound.terms):
            rest = tuple(m for m in masks if m is not mask or isfinite(mask.fill))
            return Lengths(bound.terms, bound.constant, mask.fill), False, rest
    for mask, bound in bounds:
        if bound is None or bound.rows != 1 or bound.terms:
            continue
        if not equal(bound.constant + span(queries) - 1, span(softmax.time)):
            continue
        if mask.fill == -inf or (len(masks) == 1 and true(bound.constant >= 1)):
            return None, True, tuple(m for m in masks if m is not mask)
    return None, False, masks


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


# token < bound: which side the token is on, and whether the bound itself is visible.
COMPARISONS = {aten.lt: (0, 0), aten.le: (0, 1), aten.gt: (1, 0), aten.ge: (1, 1)}


def upper_bound(mask: Mask, time: Group, queries: Group) -> Affine | None:
    """What the tokens that a mask keeps are below, if it compares nothing else."""
    node, index = mask.leaf.node, mask.leaf.index
    comparison = COMPARISONS.get(getattr(node.target, "overloadpacket", None))
    if mask.fill is None or mask.fill > ABSORBING or comparison is None:
        return None
    token_side, closed = comparison if mask.keep else (1 - comparison[0], 1 - comparison[1])
    sides = [affine(side, index, (time, queries)) for side in node.args]
    token, bound = sides[token_side], sides[1 - token_side]
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


def affine(value: Any, index: Index, axes: tuple[Group, Group]) -> Affine | None:
    """value[index] as a sum of iotas over tokens and queries, integers and integer tensors."""
    if not is_tensor(value):
        number = value.meta["val"] if isinstance(value, Node) else value
        return Affine(0, 0, (), number) if isinstance(number, (int, torch.SymInt)) else None
    leaf = settle(value, broadcast(value, index))
    node = leaf.node
    if dtype(node) not in INTEGERS:
        return None
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and not node.kwargs:
        a, b = (affine(x, leaf.index, axes) for x in node.args)
        sign = -1 if node.target is aten.sub.Tensor else 1
        if a and b and (sign > 0 or not b.terms):
            counts = a.tokens + sign * b.tokens, a.rows + sign * b.rows
            return Affine(*counts, a.terms + b.terms, a.constant + sign * b.constant)
    if node.target is prims.iota.default and argument(node, "step") == 1:
        start, entry = argument(node, "start"), leaf.index[0]
        if not entry:
            return Affine(0, 0, (), start)
        labels = tuple(d.label for d in entry)
        if labels in axes and (len(labels) == 1 or all(d.full for d in entry)):
            over = [int(labels == axis) for axis in axes]
            return Affine(*over, (), start + entry[0].offset)
    return None if leaf.labels & {*axes[0], *axes[1]} else Affine(0, 0, (leaf,), 0)


def check_masks(masks: tuple[Mask, ...]) -> None:
    """Several masks compose if each boolean one hides beyond the reach of any score."""
    fills = {m.fill for m in masks if m.fill is not None}
    if len(masks) > 1 and (len(fills) > 1 or any(f > ABSORBING for f in fills)):
        raise Refusal(Reason.MASK, f"{len(masks)} masks with the fills {sorted(fills)}")
    if any(f == inf or isnan(f) for f in fills):
        raise Refusal(Reason.MASK, f"a mask fills with {sorted(fills)}")
