"""Where the attentions are: every softmax, however it is written, and what consumes it.

All spellings are exponentials e = exp(scores - m), m constant along the axis, and their sum over
it: probabilities e / Σe or exp(scores - log Σ exp(scores)), or e itself, divided by Σe after the
values are weighed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from torch.fx import Graph, Node

from mla_compile.passes.graph import (
    CASTS,
    CONTRACTIONS,
    FUSED_ATTENTION,
    RENAMES,
    aten,
    constant,
    equal,
    is_tensor,
    readers,
    shape,
    strip,
)
from mla_compile.passes.site import Reason, Refusal

# What probabilities stay probabilities through, up to a factor.
CARRIERS = RENAMES | CASTS | {aten.mul.Tensor, aten.slice.Tensor}
COPIES = CASTS | {aten.clone.default}
RESHAPES = RENAMES - {aten.permute.default, aten.expand.default}


@dataclass(frozen=True, eq=False)
class Normalised:
    """A softmax of `scores` over `axis`: `node`, or `node` over `total` where that is not None.

    A fused attention call is one without `scores`.
    """

    node: Node
    scores: Node | None
    axis: int
    total: Node | None = None


@dataclass(frozen=True, eq=False)
class Attention:
    """A softmax, the `contraction` that consumes it, and the `path` from it to the `root`.

    The root is the contraction or, with a `total`, the division after it; that of a fused call is
    its first result; or a slice of these.  `lse` are the nodes that hold log Σ exp(scores), if any
    is used elsewhere.
    """

    softmax: Node
    scores: Node | None
    axis: int
    total: Node | None
    contraction: Node
    root: Node
    path: frozenset[Node]
    lse: tuple[Node, ...] = ()


def find_softmaxes(graph: Graph) -> Iterator[Normalised]:
    """Every softmax of the graph, in order, however it is written."""
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in FUSED_ATTENTION:
            yield Normalised(node, None, -1)
        elif node.target is aten.exp.default:
            yield from normalised(node)


def normalised(exponential: Node) -> Iterator[Normalised]:
    """The softmaxes that exp(x) is the numerator of."""
    difference, shift = split_shift(exponential)
    summed = list(row_sums(exponential))
    for total, axis in summed:
        if not constant_along(shift, difference, axis):
            continue
        scores = unshifted(difference, axis)
        divided = [d for e in copies(exponential) for d in e.users if divides_by(d, e, total, axis)]
        for division in divided:
            yield Normalised(without_empty_rows(division, scores), scores, axis)
        if not divided:
            yield Normalised(exponential, scores, axis, total)
    if not summed and shift is not None:
        for axis in range(len(shape(difference))):
            lse = per_row(shift, difference, axis)
            if lse in log_sum_exps(difference, axis):
                yield Normalised(exponential, difference, axis)


def split_shift(exponential: Node) -> tuple[Node, Node | None]:
    """(x, m) where the argument of exp is x - m, else (its argument, None)."""
    difference = strip_copies(exponential.args[0])
    if difference.target is aten.sub.Tensor and is_tensor(difference.args[1]):
        return difference.args
    return exponential.args[0], None


def unshifted(scores: Node, axis: int) -> Node:
    """The scores before something constant along the axis was subtracted: no softmax sees it."""
    shifted = strip_copies(scores)
    if shifted.target is not aten.sub.Tensor or not is_tensor(shifted.args[1]):
        return scores
    if per_row(shifted.args[1], shifted, axis) is None:
        return scores
    return unshifted(shifted.args[0], axis)


def row_sums(exponential: Node) -> Iterator[tuple[Node, int]]:
    """The sums of a tensor over one axis, and the axis."""
    for copy in copies(exponential):
        for user in copy.users:
            if user.target is aten.sum.dim_IntList and len(user.args[1]) == 1:
                yield user, user.args[1][0] % len(shape(exponential))


def copies(node: Node) -> Iterator[Node]:
    """The node and the casts of it."""
    yield node
    for user in node.users:
        if user.target in COPIES:
            yield from copies(user)


def strip_copies(node: Node) -> Node:
    while node.target in COPIES:
        node = node.args[0]
    return node


def constant_along(shift: Node | None, scores: Node, axis: int) -> bool:
    return shift is None or per_row(shift, scores, axis) is not None


def per_row(node: Node, like: Node, axis: int) -> Node | None:
    """The node behind one that has an element for each row of `like`, and size 1 along the axis."""
    rows = [*shape(like)]
    rows[axis] = 1
    if len(shape(node)) != len(rows) or not all(map(equal, shape(node), rows)):
        return None
    return without_unit_dims(node)


def without_unit_dims(node: Node) -> Node:
    """The node behind casts and views that only add or remove dimensions of size one."""
    while node.op == "call_function":
        renamed = node.target in RESHAPES and same_rows(node, node.args[0])
        if not (renamed or node.target in COPIES):
            break
        node = node.args[0]
    return node


def same_rows(a: Node, b: Node) -> bool:
    """Equal shapes but for dimensions of size one."""
    left, right = ([n for n in shape(x) if not equal(n, 1)] for x in (a, b))
    return len(left) == len(right) and all(map(equal, left, right))


def divides_by(division: Node, numerator: Node, total: Node, axis: int) -> bool:
    """division = numerator / total, row by row."""
    if division.target is not aten.div.Tensor or division.args[0] is not numerator:
        return False
    denominator = division.args[1]
    return is_tensor(denominator) and per_row(denominator, numerator, axis) is total


def log_sum_exps(scores: Node, axis: int) -> Iterator[Node]:
    """The nodes that hold log Σ exp(scores) over the axis, with or without that dimension."""
    for exponential in exponentials(scores):
        source, shift = split_shift(exponential)
        if constant_along(shift, source, axis):
            for total, summed_axis in row_sums(exponential):
                if summed_axis == axis:
                    yield from logarithms(total, shift)


def exponentials(scores: Node) -> Iterator[Node]:
    """The nodes exp(scores) and exp(scores - m)."""
    for source in copies(strip_copies(scores)):
        for user in source.users:
            shifted = user.target is aten.sub.Tensor and user.args[0] is source
            direct = [e for c in copies(user) for e in c.users] if shifted else [user]
            yield from (e for e in direct if e.target is aten.exp.default)


def logarithms(total: Node, shift: Node | None) -> Iterator[Node]:
    """log(total) + shift"""
    for log in (u for u in total.users if u.target is aten.log.default):
        if shift is None:
            yield log
            continue
        for add in log.users:
            if add.target is not aten.add.Tensor or add.kwargs or not same_rows(add, log):
                continue
            other = add.args[1] if add.args[0] is log else add.args[0]
            if is_tensor(other) and without_unit_dims(other) is without_unit_dims(shift):
                yield add


def without_empty_rows(probabilities: Node, scores: Node) -> Node:
    """The probabilities with rows that see no key set to zero, if the graph does that."""
    for user in probabilities.users:
        zeroed = user.target is aten.where.self and user.args[2] is probabilities
        if zeroed and constant(user.args[1]) == 0 and sees_nothing(user.args[0], scores):
            return user
    return probabilities


def sees_nothing(condition: Node, scores: Node) -> bool:
    """condition = not any(not (scores == -inf)), as ATen's safe softmax says it."""
    for target in (aten.logical_not.default, aten.any.dim, aten.logical_not.default):
        if condition.target is not target:
            return False
        condition = condition.args[0]
    hidden = condition.target is aten.eq.Scalar and condition.args[1] == float("-inf")
    return hidden and strip(condition.args[0]) is strip(scores)


def is_attention(softmax: Normalised) -> bool:
    """It weighs something; a router's probabilities do not."""
    return softmax.scores is None or weighs(softmax.node)


def has_queries(softmax: Normalised) -> bool:
    """Its scores are contractions, but for what is done element by element or joined to them.

    They may be, where they come from outside of the graph.
    """
    todo, seen = [softmax.scores or softmax.node], set()
    while todo:
        node = todo.pop()
        summed = node.target is aten.sum.dim_IntList
        multiplied = summed and node.args[0].target is aten.mul.Tensor
        if node.target in CONTRACTIONS | FUSED_ATTENTION or multiplied or node.op == "placeholder":
            return True
        whole = node.target in RENAMES or node.target is aten.cat.default
        before = [
            x for x in node.all_input_nodes if is_tensor(x) and (whole or same_shape(x, node))
        ]
        todo += [x for x in before if x not in seen]
        seen |= {*before}
    return False


def weighs(weights: Node) -> bool:
    """The weights, or something made of them element by element, are summed up in a contraction."""
    todo, seen = [weights], {weights}
    while todo:
        node = todo.pop()
        for user in set(node.users) - seen:
            summed = user.target is aten.sum.dim_IntList
            if user.target in CONTRACTIONS or (summed and strip_copies(node) is not weights):
                return True
            if user.target in CARRIERS or (
                is_tensor(user) and not summed and same_shape(user, node)
            ):
                seen.add(user)
                todo.append(user)
    return False


def same_shape(a: Node, b: Node) -> bool:
    return len(shape(a)) == len(shape(b)) and all(map(equal, shape(a), shape(b)))


def attention_of(softmax: Normalised) -> Attention:
    """The softmax and the contraction that consumes it.  Refuses if anything else does."""
    node, scores, axis, total = softmax.node, softmax.scores, softmax.axis, softmax.total
    if scores is None:
        used = [u for u in node.users if u.users]
        if [u.args[1] for u in used] != [0]:
            raise Refusal(Reason.ESCAPE, "more than the output of the fused call is used", node)
        path = frozenset({node, used[0]})
        return Attention(node, None, axis, None, used[0], used[0], path)
    contraction, path = consumer(node, () if total is None else toward_sums(node))
    root = contraction
    while total is not None and not is_division(root):
        root = next_carrier(root, "the values are weighed by exponentials that no sum divides")
        path |= {root}
    replaced = {root, node}
    lse = (n for n in log_sum_exps(scores, axis) if escape(n, replaced))
    return Attention(node, scores, axis, total, contraction, root, path, tuple(lse))


def cropped(attention: Attention) -> Attention | None:
    """The attention up to a slice of its output, if nothing else is used: values may be padded."""
    path = [attention.root]
    while path[-1] is attention.root or path[-1].target is not aten.slice.Tensor:
        users = readers(path[-1])
        if len(users) != 1 or users[0].target not in RENAMES | CASTS | {aten.slice.Tensor}:
            return None
        path += users
    return replace(attention, root=path[-1], path=attention.path.union(path))


def toward_sums(exponential: Node) -> set[Node]:
    """The sums of the exponentials, and the casts on the way to them."""
    found = set()
    for total, _ in row_sums(exponential):
        node = total
        while node is not exponential:
            found.add(node)
            node = node.args[0]
    return found


def consumer(weights: Node, beside: Collection[Node]) -> tuple[Node, frozenset[Node]]:
    """The one contraction that the weights end in, and the way to it, `beside` not counted."""
    node, path = weights, {weights}
    while True:
        users = [u for u in readers(node) if u not in beside]
        if len(users) != 1:
            names = ", ".join(u.name for u in users)
            raise Refusal(Reason.ESCAPE, f"the probabilities are used by {names}", node)
        user = users[0]
        path.add(user)
        if user.target in CONTRACTIONS and node in user.args[-2:]:
            return user, frozenset(path)
        summed = user.args[1] if user.target is aten.sum.dim_IntList else ()
        if node.target is aten.mul.Tensor and len(summed) == 1:
            return user, frozenset(path)
        if is_random(user) or any(is_random(a) for a in user.all_input_nodes):
            raise Refusal(Reason.DROPOUT, f"{user.name} drops probabilities", user)
        if user.target is aten.div.Tensor and user.args[0] is node:
            raise Refusal(Reason.SINKS, f"{node.name} is divided by more than its sum", user)
        if user.target not in CARRIERS:
            detail = f"the probabilities are used by {user.name} ({user.target})"
            raise Refusal(Reason.ESCAPE, detail, user)
        node = user


def is_division(node: Node) -> bool:
    return node.target is aten.div.Tensor and is_tensor(node.args[1]) and bool(shape(node.args[1]))


def next_carrier(node: Node, otherwise: str) -> Node:
    users = readers(node)
    if len(users) != 1 or users[0].target not in RENAMES | CASTS | {aten.div.Tensor}:
        raise Refusal(Reason.SOFTMAX, otherwise, node)
    return users[0]


def is_random(node: Node) -> bool:
    """A random tensor, or a comparison or cast of one: a dropout mask."""
    through = RENAMES | CASTS | {aten.gt.Scalar, aten.lt.Scalar, aten.div.Tensor}
    while node.op == "call_function" and node.target in through:
        node = node.args[0]
    return any(word in str(node.target) for word in ("rand", "bernoulli", "dropout"))


def escape(node: Node, replaced: Collection[Node]) -> Node | None:
    """A node beyond the attention that needs `node` even where `replaced` are recomputed."""
    seen, todo = {node}, [node]
    while todo:
        for user in readers(todo.pop()):
            if user in seen or user in replaced:
                continue
            if user.op == "output" or user.is_impure():
                return user
            seen.add(user)
            todo.append(user)
    return None
