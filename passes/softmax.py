"""Where the attentions are: every softmax, however it is written, and the contraction that consumes it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Graph, Node

from mla_compile.passes.graph import (
    CASTS,
    CONTRACTIONS,
    FUSED_ATTENTION,
    RENAMES,
    argument,
    aten,
    constant,
    equal,
    is_tensor,
    shape,
    strip,
)
from mla_compile.passes.site import Reason, Refusal

SOFTMAX = frozenset({aten._softmax.default, aten.softmax.int, aten._safe_softmax.default})


@dataclass(frozen=True, eq=False)
class Attention:
    """A softmax of `scores` over `axis` and the contraction `root` that consumes it along `path`.

    A fused attention call is its own softmax, has no `scores`, and its `root` is its first result.
    """

    softmax: Node
    scores: Node | None
    axis: int
    root: Node
    path: frozenset[Node]


def find_attentions(graph: Graph) -> Iterator[Attention | tuple[Node, Refusal]]:
    """Every attention of the graph, in order; with a Refusal where the probabilities go astray."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in FUSED_ATTENTION:
            results = [u for u in node.users if u.target is operator.getitem and u.args[1] == 0]
            for root in results:
                yield Attention(node, None, -1, root, frozenset({node, root}))
        elif found := as_softmax(node):
            scores, axis = found
            probabilities = without_empty_rows(node, scores)
            try:
                yield Attention(probabilities, scores, axis, *consumer(probabilities))
            except Refusal as refusal:
                yield node, refusal


def as_softmax(node: Node) -> tuple[Node, int] | None:
    """(scores, axis) if node is softmax(scores, axis): the op, or exp(x - m) / sum(exp(x - m)) for any m constant along it."""
    if node.target in SOFTMAX:
        return node.args[0], argument(node, "dim") % len(shape(node))  # type: ignore[return-value]
    if node.target is not aten.div.Tensor or not is_tensor(node.args[1]):
        return None
    exponential, total = (strip_casts(a) for a in node.args)  # type: ignore[arg-type]
    if exponential.target is not aten.exp.default or total.target is not aten.sum.dim_IntList:
        return None
    if strip_casts(total.args[0]) is not exponential or len(total.args[1]) != 1:  # type: ignore[arg-type]
        return None
    difference = strip_casts(exponential.args[0])  # type: ignore[arg-type]
    if difference.target is not aten.sub.Tensor or not is_tensor(difference.args[1]):
        return None
    scores, maximum = difference.args
    rank = len(shape(node))
    axis = total.args[1][0] % rank  # type: ignore[index,operator]
    aligned = len(shape(scores)) == len(shape(maximum)) == len(shape(total)) == rank  # type: ignore[arg-type]
    if not aligned or not equal(shape(maximum)[axis], 1) or not equal(shape(total)[axis], 1):  # type: ignore[arg-type]
        return None
    return scores, axis  # type: ignore[return-value]


def strip_casts(node: Node) -> Node:
    while node.target in CASTS or node.target is aten.clone.default:
        node = node.args[0]  # type: ignore[assignment]
    return node


def without_empty_rows(probabilities: Node, scores: Node) -> Node:
    """The node that is zero where a row sees no key, if the graph makes one of the probabilities, else they themselves."""
    for user in probabilities.users:
        if user.target is aten.where.self and user.args[2] is probabilities:
            if constant(user.args[1]) == 0 and sees_nothing(user.args[0], scores):  # type: ignore[arg-type]
                return user
    return probabilities


def sees_nothing(condition: Node, scores: Node) -> bool:
    """condition = "every score of the row is -inf", as ATen's safe softmax says it."""
    negated = False
    every = False
    while True:
        if condition.target is aten.logical_not.default:
            negated = not negated
        elif condition.target is aten.any.dim and negated and not every:
            every = True
        elif condition.target is aten.all.dim and not negated and not every:
            every = True
        else:
            break
        condition = condition.args[0]  # type: ignore[assignment]
    hidden = condition.target is aten.eq.Scalar and condition.args[1] == float("-inf") and not negated
    return hidden and every and strip(condition.args[0]) is strip(scores)  # type: ignore[arg-type]


def consumer(probabilities: Node) -> tuple[Node, frozenset[Node]]:
    """The one contraction that the probabilities end in, and the nodes on the way to it."""
    node, path = probabilities, {probabilities}
    while True:
        if len(node.users) != 1:
            names = ", ".join(u.name for u in node.users) or "nothing"
            raise Refusal(Reason.ESCAPE, f"the attention probabilities are used by {names}", node)
        user = next(iter(node.users))
        path.add(user)
        if user.target in CONTRACTIONS:
            if node not in user.args[-2:]:
                raise Refusal(Reason.ESCAPE, f"the probabilities are added by {user.name}", user)
            return user, frozenset(path)
        if user.target is aten.sum.dim_IntList and node.target is aten.mul.Tensor and len(user.args[1]) == 1:  # type: ignore[arg-type]
            return user, frozenset(path)
        if user.target in RENAMES or user.target in CASTS or user.target in (aten.mul.Tensor, aten.slice.Tensor):
            node = user
            continue
        reason = Reason.DROPOUT if "dropout" in str(user.target) or "rand" in str(user.target) else Reason.ESCAPE
        raise Refusal(reason, f"the attention probabilities are used by {user.name} ({user.target})", user)
