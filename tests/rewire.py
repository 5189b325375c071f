"""Mutations no author thought of: an edge of a graph gets another tensor of the same shape."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

aten = torch.ops.aten
Change = tuple[str, Callable[[Node], Node]]


def rewire(module: GraphModule, which: int, how: int) -> str:
    """Change edge `which` in way `how`, both modulo what there is; the change in words."""
    edges = [(user, x) for user in module.graph.nodes for x in operands(user)]
    user, source = edges[which % len(edges)]
    name, change = (ways := changes(source, user))[how % len(ways)]
    with module.graph.inserting_before(user):
        user.replace_input_with(source, laid_out(change(source), source.meta["val"]))
    inputs = [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]
    mode = inputs[0].fake_mode
    FakeTensorProp(module, mode).propagate_dont_convert_inputs(*inputs)
    module.recompile()
    return f"{user.name} reads {source.name}, {name}"


def operands(user: Node) -> list[Node]:
    if user.op != "call_function" or user.target is operator.getitem:
        return []
    return [x for x in user.all_input_nodes if is_tensor(x) and x.meta["val"].numel() > 1]


def is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def changes(source: Node, user: Node) -> list[Change]:
    call = source.graph.call_function
    t: Tensor = source.meta["val"]
    long = [d for d in range(t.dim()) if t.shape[d] > 1]
    ways: list[Change] = [(f"reversed along {d}", partial(reversed_along, d)) for d in long]
    ways += [(f"one late along {d}", partial(rolled, d)) for d in long]
    if t.dtype is torch.bool:
        ways.append(("negated", lambda x: call(aten.logical_not.default, (x,))))
    if t.is_floating_point():
        ways += [
            ("bent", lambda x: call(aten.sin.default, (x,))),
            ("negated", lambda x: call(aten.neg.default, (x,))),
            ("doubled", lambda x: call(aten.mul.Tensor, (x, 2.0))),
            ("squared", lambda x: call(aten.mul.Tensor, (x, x))),
            ("moved", lambda x: call(aten.add.Tensor, (x, 0.5))),
        ]
    if t.dim() > 1 and t.shape[-1] == t.shape[-2]:
        order = [*range(t.dim() - 2), t.dim() - 1, t.dim() - 2]
        ways.append(("transposed", lambda x: call(aten.permute.default, (x, order))))
    if t.dtype in (torch.int32, torch.int64):
        return ways  # any other integers may be no indices
    for other in itertools.takewhile(lambda n: n is not user, user.graph.nodes):
        if other is not source and is_tensor(other) and like(other.meta["val"], t):
            ways.append((f"instead {other.name}", partial(replaced, other)))
    return ways


def like(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype)


def laid_out(x: Node, t: Tensor) -> Node:
    """In memory in the order of `t`, of which a view is taken later.

    What `t` expands comes first: fused attention on a CPU takes the innermost stride to be 1.
    """
    call, dims = x.graph.call_function, range(t.dim())
    order = sorted(dims, key=lambda d: t.stride(d) or t.numel(), reverse=True)
    x = call(aten.permute.default, (x, order))
    x = call(aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
    return call(aten.permute.default, (x, [order.index(d) for d in dims]))


def replaced(other: Node, x: Node) -> Node:
    return other


def reversed_along(dim: int, x: Node) -> Node:
    return x.graph.call_function(aten.flip.default, (x, [dim]))


def rolled(dim: int, x: Node) -> Node:
    call = x.graph.call_function
    rest = call(aten.slice.Tensor, (x, dim, 1))
    first = call(aten.slice.Tensor, (x, dim, 0, 1))
    return call(aten.cat.default, ([rest, first], dim))
