"""What the masks of an attention say: which is only a length, and whether the rest compose."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf, isfinite, isnan
from typing import Any

import torch
from torch.fx import Node

from mla_compile.passes.graph import Size, aten, dtype, is_tensor, prims
from mla_compile.passes.indexing import Index, Label, Leaf, broadcast
from mla_compile.passes.normal_form import ABSORBING, Softmax
from mla_compile.passes.site import Lengths, Mask, Reason, Refusal
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
    negated = node.target in NOT
    splits = negated or node.target in AND[mask.keep]
    if mask.fill is None or mask.fill > ABSORBING or not splits or dtype(node) is not torch.bool:
        yield mask
        return
    for x in node.args:
        leaf = settle(x, broadcast(x, index))
        yield from conjuncts(replace(mask, leaf=leaf, keep=mask.keep != negated))


# token < length: which side the token is on, and whether the length itself is visible.
COMPARISONS = {aten.lt: (0, 0), aten.le: (0, 1), aten.gt: (1, 0), aten.ge: (1, 1)}


def as_lengths(mask: Mask, softmax: Softmax, batch: tuple[Label, ...]) -> Lengths | None:
    node, index = mask.leaf.node, mask.leaf.index
    comparison = COMPARISONS.get(getattr(node.target, "overloadpacket", None))
    if mask.fill is None or mask.fill > ABSORBING or comparison is None:
        return None
    token_side, closed = comparison if mask.keep else (1 - comparison[0], 1 - comparison[1])
    token, length = (
        affine(side, broadcast(side, index) if is_tensor(side) else (), softmax.time)
        for side in (node.args[token_side], node.args[1 - token_side])
    )
    if token is None or length is None:
        return None
    if (token.steps, length.steps) != (1, 0) or token.terms:
        return None
    if not all(t.labels <= frozenset(batch) for t in length.terms):
        return None
    return Lengths(length.terms, length.constant - token.constant + closed, mask.fill)


@dataclass(frozen=True)
class Affine:
    """steps · token + Σ terms + constant"""

    steps: int
    terms: tuple[Leaf, ...]
    constant: Size


def affine(value: Any, index: Index, time: tuple[Label, ...]) -> Affine | None:
    """value[index] as a sum of iota over the tokens, integers and integer tensors, if it is one."""
    if not isinstance(value, Node):
        return Affine(0, (), value) if isinstance(value, int) else None
    if not is_tensor(value):
        return Affine(0, (), value.meta["val"])
    leaf = settle(value, index)
    node = leaf.node
    if dtype(node) not in (torch.int32, torch.int64):
        return None
    if node.target is aten.add.Tensor and not node.kwargs:
        parts = [
            affine(x, broadcast(x, leaf.index) if is_tensor(x) else (), time) for x in node.args
        ]
        if None in parts:
            return None
        a, b = parts
        return Affine(a.steps + b.steps, a.terms + b.terms, a.constant + b.constant)
    if node.target is prims.iota.default and node.kwargs["step"] == 1:
        start, entry = node.kwargs["start"], leaf.index[0]
        if not entry:
            return Affine(0, (), start)
        if [d.label for d in entry] == [*time] and (len(time) == 1 or all(d.full for d in entry)):
            return Affine(1, (), start + entry[0].offset)
    return None if leaf.labels & {*time} else Affine(0, (leaf,), 0)


def check_masks(masks: tuple[Mask, ...], node: Node) -> None:
    """Several masks compose if each boolean one hides beyond the reach of any score."""
    fills = {m.fill for m in masks if m.fill is not None}
    if len(masks) > 1 and (len(fills) > 1 or any(f > ABSORBING for f in fills)):
        raise Refusal(Reason.MASK, f"{len(masks)} masks with the fills {sorted(fills)}", node)
    if any(f == inf or isnan(f) for f in fills):
        raise Refusal(Reason.MASK, f"a mask fills with {sorted(fills)}", node)
