"""Where the attentions are: every softmax, however it is written, and what consumes it.

All spellings are exponentials e = exp(scores - m), m constant along the axis, and their sum over
it: probabilities e / Σe or exp(scores - log Σ exp(scores)), or e itself, divided by Σe after the
values are weighed.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from math import inf

from torch.fx import Graph, Node

from mla_compile.passes.graph import (
    CONTRACTIONS,
    COPIES,
    FLEX_ATTENTION,
    FUSED_ATTENTION,
    RENAMES,
    RESHAPES,
    WHOLE,
    aten,
    constant,
    is_scalar_tensor,
    is_sum,
    is_tensor,
    reached,
    readers,
    shape,
    strip,
    summed,
    twins,
)
from mla_compile.passes.site import Reason, Refusal
from mla_compile.passes.sizes import equal, numel, same_sizes

JOINED = RENAMES | {aten.cat.default, aten.constant_pad_nd.default}
JOINED |= {aten.select_scatter.default, aten.slice_scatter.default, aten.select.int}
CALLS = FUSED_ATTENTION | {FLEX_ATTENTION}
CARRIERS = WHOLE | {aten.mul.Tensor, aten.div.Tensor, aten.slice.Tensor, aten.select.int}

RowSums = dict[tuple[Node, int], list[Node]]  # Σe by e = exp(scores - a shift of the row), and axis
Logs = dict[Node, tuple[Node, int]]  # what holds log Σ exp(scores), and these scores and the axis


@dataclass(frozen=True, eq=False)
class Attention:
    """A softmax of `scores` over `axis`: `node`, to be divided by one of `totals` if there are any.

    A fused attention call is one without `scores`.  `logs` and `twins` are those of the graph.  The
    `path`, once `attentions` has found it, leads through the contraction with the values to the
    `root`: that contraction, or a division after it, or a slice of these.
    """

    node: Node
    scores: Node | None = None
    axis: int = -1
    totals: list[Node] = field(default_factory=list)
    logs: Logs = field(default_factory=dict)
    twins: dict[Node, Node] = field(default_factory=dict)
    path: tuple[Node, ...] = ()  # in the graph's order

    @property
    def root(self) -> Node:
        return self.path[-1]

    @property
    def lse(self) -> tuple[Node, ...]:
        """What holds log Σ exp(scores) and is used elsewhere."""
        logs = (x for x, of in self.logs.items() if of == (strip(self.scores, COPIES), self.axis))
        return tuple(log for log in logs if escape(log, {self.node, self.root}))


def find_softmaxes(graph: Graph) -> list[Attention]:
    """Every softmax of the graph, in order, however it is written."""
    sums = row_sums(graph)
    logs, same = logarithms(sums), twins(graph)
    found = [Attention(n, twins=same) for n in graph.nodes if n.target in CALLS]
    for (exponential, axis), totals in sums.items():
        scores = unshifted(exponential.args[0], axis)
        found.append(Attention(exponential, scores, axis, totals, logs, same))
    for exponential in graph.find_nodes(op="call_function", target=aten.exp.default):
        inputs = strip(exponential.args[0], COPIES).all_input_nodes
        for log in logs.keys() & {strip(x, RESHAPES) for x in inputs}:
            scores, axis = logs[log]
            before, shift = split_shift(exponential.args[0], axis)
            if shift and strip(shift, RESHAPES) is log and strip(before, COPIES) is scores:
                found.append(Attention(exponential, unshifted(before, axis), axis, [], logs, same))
    return sorted(found, key=lambda softmax: softmax.node)


def row_sums(graph: Graph) -> RowSums:
    found: RowSums = {}
    for total in filter(is_sum, graph.nodes):
        exponential = strip(total.args[0], COPIES)
        of_one = shape(exponential) and len(summed(total)) == 1
        if of_one and exponential.target is aten.exp.default:
            axis = summed(total)[0] % len(shape(exponential))
            found.setdefault((exponential, axis), []).append(total)
    return found


def logarithms(sums: RowSums) -> Logs:
    """log Σ exp(scores), with or without the axis: log(total), and log(total) + shift."""
    found: Logs = {}
    for (exponential, axis), totals in sums.items():
        scores, shift = split_shift(exponential.args[0], axis)
        for log in (u for x in totals for u in x.users if u.target is aten.log.default):
            found[log] = strip(exponential.args[0], COPIES), axis
            for add in log.users if shift else ():
                if add.target is aten.add.Tensor and not add.kwargs:
                    others = [strip(x, RESHAPES) for x in add.args if is_tensor(x) and x is not log]
                    alike = equal(numel(shape(add)), numel(shape(log)))
                    if alike and others == [strip(shift, RESHAPES)]:
                        found[add] = strip(scores, COPIES), axis
    return found


def split_shift(scores: Node, axis: int) -> tuple[Node, Node | None]:
    """(x, m) where they are x - m, of the sizes of x, and m is constant along the axis.

    Else (they, None).  An m of many elements has one for each row and size 1 along the axis: if
    what it is a reshape of has as well, each number is in its place.
    """
    node = strip(scores, COPIES)
    if node.target is aten.sub.Tensor and all(map(is_tensor, node.args)) and not node.kwargs:
        (before, shift), sizes = node.args, shape(node)
        of_rows = same_sizes(shape(shift), (*sizes[:axis], 1, *sizes[axis + 1 :]))
        if same_sizes(shape(before), sizes) and (of_rows or is_scalar_tensor(shift)):
            return before, shift
    return scores, None


def unshifted(scores: Node, axis: int) -> Node:
    """The scores before something constant along the axis was subtracted: no softmax sees it."""
    before, shift = split_shift(scores, axis)
    return unshifted(before, axis) if shift else scores


def division(node: Node) -> tuple[Node, Node, bool] | None:
    """(a, b, False) where the node is a / b, (a, b, True) where it is a · b and b is a 1 / c."""
    inverse = node.target is aten.mul.Tensor
    if not (inverse or node.target is aten.div.Tensor) or not all(map(is_tensor, node.args)):
        return None
    for weighed, by in (node.args, node.args[::-1])[: 1 + inverse]:
        if shape(by) and (not inverse or strip(by).target is aten.reciprocal.default):
            return weighed, by, inverse
    return None


def unzeroed(node: Node) -> Node | None:
    """What it is wherever it is not set to zero, unless by chance."""
    zeroed = node.target is aten.where.self and not is_random(node.args[0])
    kept = [x for x in node.args[1:] if zeroed and constant(x) != 0]
    return kept[0] if len(kept) == 1 else None


def sees_nothing(condition: Node, scores: Node) -> bool:
    """condition = not any(not (scores == -inf)) of the row, as ATen's safe softmax says it."""
    for target in (aten.logical_not.default, aten.any.dim, aten.logical_not.default):
        if condition.target is not target:
            return False
        condition = condition.args[0]
    hidden = condition.target is aten.eq.Scalar and condition.args[1] == -inf
    return hidden and strip(condition.args[0], COPIES, True) is strip(scores, COPIES, True)


def weighing(softmax: Attention) -> list[Node]:
    """From the weights to the first contraction of what is made of them element by element.

    Of a fused call, to its output.  A router's probabilities weigh nothing.
    """

    made, node = {softmax.node}, softmax.node
    while node.op != "output":
        node = node.next
        for source in made.intersection(node.all_input_nodes):
            if weighs(node, source):
                return sorted(reached(node, lambda n: made.intersection(n.all_input_nodes)))
            tensors = is_tensor(source) and is_tensor(node) and not is_sum(node)
            if tensors and (node.target in CARRIERS or same_sizes(shape(node), shape(source))):
                made.add(node)
    return []


def weighs(node: Node, weights: Node) -> bool:
    if node.target in CONTRACTIONS:
        return weights in node.args[-2:]
    output = node.target is operator.getitem and node.args[1] == 0
    return output or (is_sum(node) and strip(weights, COPIES).target is aten.mul.Tensor)


def unread(node: Node) -> Refusal:
    """It does something else to the probabilities than what softmax and values are made of."""
    if any(map(is_random, (node, *node.all_input_nodes))):
        return Refusal(Reason.DROPOUT, f"{node.name} drops probabilities", node)
    reason = Reason.SOFTMAX if node.target in CARRIERS else Reason.ESCAPE
    return Refusal(reason, f"the probabilities are used by {node.name} ({node.target})", node)


def has_queries(softmax: Attention) -> bool:
    """Its scores are contractions; they may be, where they come from outside of the graph."""

    products = CONTRACTIONS | CALLS
    return any(
        node.op == "placeholder"
        or node.target in products
        or (is_sum(node) and node.args[0].target is aten.mul.Tensor)
        for node in parts_of_scores(softmax)
    )


def parts_of_scores(softmax: Attention) -> Iterator[Node]:
    """The scores and what they are made of, element by element or joined."""

    def joined(node: Node) -> list[Node]:
        inputs = filter(is_tensor, node.all_input_nodes)
        return [x for x in inputs if node.target in JOINED or same_sizes(shape(x), shape(node))]

    return reached(softmax.scores or softmax.node, joined)


def attentions(softmax: Attention) -> list[Attention]:
    """Up to the contraction, to a division after it, and to slices of these: values may be padded.

    No as_strided may use what is around a slice.
    """
    if softmax.node.target is FLEX_ATTENTION:
        raise Refusal(Reason.FLEX, "a score_mod and a mask_mod are not read")
    path, views = weighing(softmax), RENAMES | {aten.slice.Tensor, aten.select.int}
    ends = [len(path)]
    while len(users := readers(path[-1])) == 1 and users[0].target in CARRIERS:
        (node,) = users
        path.append(node)
        if node.target is aten.slice.Tensor:
            same = reached(node, lambda n: [user for user in n.users if user.target in views])
            if any(user.target is aten.as_strided.default for n in same for user in n.users):
                break
        if node.target is aten.slice.Tensor or division(node):
            ends.append(len(path))
    found = [replace(softmax, path=tuple(path[:end])) for end in ends]
    divided = [x for x in found if softmax.totals and any(map(division, x.path))]
    return divided or found


def is_random(node: Node) -> bool:
    """A random tensor, or a comparison or cast of one: a dropout mask."""
    source = strip(node, WHOLE | {aten.gt.Scalar, aten.lt.Scalar, aten.div.Tensor})
    return any(word in str(source.target) for word in ("rand", "bernoulli", "dropout"))


def escape(node: Node, replaced: Collection[Node], kept: Collection[Node] = ()) -> Node | None:
    """What needs `node` even where `replaced` are recomputed: an output, an effect, one `kept`."""
    after = reached(node, lambda n: [user for user in readers(n) if user not in replaced])
    needed = (n for n in after if n is not node)
    return next((n for n in needed if n in kept or n.op == "output" or n.is_impure()), None)
