"""Where the attentions are: every softmax, however it is written, and what consumes it."""

from __future__ import annotations

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

# What probabilities stay probabilities through, up to a factor.
CARRIERS = RENAMES | CASTS | {aten.mul.Tensor, aten.slice.Tensor}
SOFTMAX = frozenset({aten._softmax.default, aten.softmax.int, aten._safe_softmax.default})


@dataclass(frozen=True, eq=False)
class Normalised:
    """A softmax of `scores` over `axis`.  A fused attention call is one without `scores`."""

    node: Node
    scores: Node | None
    axis: int


@dataclass(frozen=True, eq=False)
class Attention:
    """A softmax, the contraction `root` that consumes it, and the `path` from one to the other.

    The root of a fused attention call is its first result.
    """

    softmax: Node
    scores: Node | None
    axis: int
    root: Node
    path: frozenset[Node]


def find_softmaxes(graph: Graph) -> Iterator[Normalised]:
    """Every softmax of the graph, in order, however it is written."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in FUSED_ATTENTION:
            yield Normalised(node, None, -1)
        elif found := as_softmax(node):
            scores, axis = found
            yield Normalised(without_empty_rows(node, scores), scores, axis)


def is_attention(softmax: Normalised) -> bool:
    """Its probabilities weigh something; a router's do not."""
    return softmax.scores is None or weighs(softmax.node)


def attention_of(softmax: Normalised) -> Attention:
    """The softmax and the contraction that consumes it.  Refuses if anything else does."""
    if softmax.scores is None:
        used = [u for u in softmax.node.users if u.users]
        if [u.args[1] for u in used] != [0]:
            raise Refusal(
                Reason.ESCAPE, "more than the output of the fused call is used", softmax.node
            )
        return Attention(softmax.node, None, -1, used[0], frozenset({softmax.node, used[0]}))
    root, path = consumer(softmax.node)
    return Attention(softmax.node, softmax.scores, softmax.axis, root, path)


def as_softmax(node: Node) -> tuple[Node, int] | None:
    """(scores, axis) if node is softmax(scores, axis).

    Either the op, or exp(x - m) / sum(exp(x - m)) for any m that is constant along the axis.
    """
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
    """The probabilities with rows that see no key set to zero, if the graph does that."""
    for user in probabilities.users:
        zeroed = user.target is aten.where.self and user.args[2] is probabilities
        if zeroed and constant(user.args[1]) == 0 and sees_nothing(user.args[0], scores):
            return user
    return probabilities


def sees_nothing(condition: Node, scores: Node) -> bool:
    """condition = "every score of the row is -inf", as ATen's safe softmax says it."""
    negated = False
    every = False
    while True:
        if condition.target is aten.logical_not.default:
            negated = not negated
        elif (condition.target is aten.any.dim and negated and not every) or (
            condition.target is aten.all.dim and not negated and not every
        ):
            every = True
        else:
            break
        condition = condition.args[0]  # type: ignore[assignment]
    hidden = (
        condition.target is aten.eq.Scalar and condition.args[1] == float("-inf") and not negated
    )
    return hidden and every and strip(condition.args[0]) is strip(scores)  # type: ignore[arg-type]


def weighs(probabilities: Node) -> bool:
    """The probabilities, or something made of them element by element, are summed up in a contraction."""
    todo, seen = [probabilities], {probabilities}
    while todo:
        node = todo.pop()
        for user in set(node.users) - seen:
            if user.target in CONTRACTIONS or user.target is aten.sum.dim_IntList:
                return True
            if user.target in CARRIERS or (is_tensor(user) and same_shape(user, node)):
                seen.add(user)
                todo.append(user)
    return False


def same_shape(a: Node, b: Node) -> bool:
    return len(shape(a)) == len(shape(b)) and all(map(equal, shape(a), shape(b)))


def consumer(probabilities: Node) -> tuple[Node, frozenset[Node]]:
    """The one contraction that the probabilities end in, and the nodes on the way to it."""
    node, path = probabilities, {probabilities}
    while True:
        if len(node.users) != 1:
            users = ", ".join(u.name for u in node.users)
            raise Refusal(Reason.ESCAPE, f"the probabilities are used by {users}", node)
        user = next(iter(node.users))
        path.add(user)
        if user.target in CONTRACTIONS and node in user.args[-2:]:
            return user, frozenset(path)
        summed = user.args[1] if user.target is aten.sum.dim_IntList else ()
        if node.target is aten.mul.Tensor and len(summed) == 1:  # type: ignore[arg-type]
            return user, frozenset(path)
        if is_random(user) or any(is_random(a) for a in user.all_input_nodes):
            raise Refusal(Reason.DROPOUT, f"{user.name} drops probabilities", user)
        if user.target not in CARRIERS:
            detail = f"the probabilities are used by {user.name} ({user.target})"
            raise Refusal(Reason.ESCAPE, detail, user)
        node = user


def is_random(node: Node) -> bool:
    """A random tensor, or a comparison or cast of one: a dropout mask."""
    through = RENAMES | CASTS | {aten.gt.Scalar, aten.lt.Scalar, aten.div.Tensor}
    while node.op == "call_function" and node.target in through:
        node = node.args[0]  # type: ignore[assignment]
    return any(word in str(node.target) for word in ("rand", "bernoulli", "dropout"))
