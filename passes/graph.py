"""Questions about the nodes of an ATen graph, as Inductor's decompositions leave it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Set
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from mla_compile.passes.sizes import Size, equal, plain

aten = torch.ops.aten
prims = torch.ops.prims

FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
INTEGERS = frozenset({torch.int32, torch.int64})
CASTS = frozenset({prims.convert_element_type.default})
DIVISIONS = frozenset({aten.div.Tensor, aten.div.Scalar})
SCALINGS = DIVISIONS | {aten.mul.Tensor, aten.mul.Scalar}
CONTRACTIONS = frozenset(f.default for f in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm))
FUSED_ATTENTION = frozenset(
    {
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
FLEX_ATTENTION = torch.ops.higher_order.flex_attention
# Copies of all of one tensor, the same numbers in other dimensions, either in another order, and
# any of these in another type.
COPIES = frozenset({aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default})
RESHAPES = frozenset(f.default for f in (aten.view, aten.unsqueeze, aten.squeeze))
RESHAPES |= {aten.squeeze.dim, aten.squeeze.dims}
RENAMES = COPIES | RESHAPES | {aten.expand.default, aten.permute.default}
WHOLE = RENAMES | CASTS
SIZES = frozenset({aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default})


def reached(start: Node, step: Callable[[Node], Iterable[Node]]) -> Iterator[Node]:
    """A node, then those that `step` gives for it, then those it gives for them, each once."""
    seen, todo = {start}, [start]
    while todo:
        node = todo.pop()
        yield node
        new = [x for x in dict.fromkeys(step(node)) if x not in seen]
        seen.update(new)
        todo += new


def is_sum(node: Node) -> bool:
    """Over dimensions, in floating point: a sum of integers cuts what it adds up."""
    return node.target is aten.sum.dim_IntList and dtype(node) in FLOATS


def summed(node: Node) -> list[int]:
    """The dimensions that a sum names, none for all."""
    return node.args[1] or []


def readers(node: Node) -> list[Node]:
    """The users of a node that read its elements, not only its size."""
    return [user for user in node.users if user.target not in SIZES]


def twins(graph: Graph) -> dict[Node, Node]:
    """For each node that computes the same from the same as one before it, that one."""
    first: dict[tuple[Any, str], Node] = {}
    found: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.target is operator.getitem or is_aten_function(node.target):
            inputs = map_arg((node.args, node.kwargs), lambda n: found.get(n, n))
            one = first.setdefault((node.target, str(inputs)), node)
            if one is not node:
                found[node] = one
    return found


def is_aten_function(target: Any) -> bool:
    """Of ATen, and the same whenever it is called."""
    known = isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "prims")
    return known and torch.Tag.nondeterministic_seeded not in target.tags


def shape(node: Node) -> tuple[Size, ...]:
    return tuple(map(plain, node.meta["val"].shape))


def dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def is_tensor(value: Any) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor)


def is_scalar_tensor(value: Any) -> bool:
    return is_tensor(value) and all(equal(n, 1) for n in shape(value))


def argument(node: Node, name: str, default: Any = None) -> Any:
    """An argument of an ATen call by its schema name; a SymInt argument as its value."""
    names = [a.name for a in node.target._schema.arguments]
    value = (dict(zip(names, node.args, strict=False)) | node.kwargs).get(name)
    if isinstance(value, Node) and not is_tensor(value):
        value = value.meta["val"]
    return default if value is None else value


@unset_fake_temporarily()
def constant(value: Any) -> float | None:
    """The number that a scalar, or a tensor filled with one, stands for, as its type rounds it."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if not is_tensor(value):
        return None
    filled = None
    if value.op == "get_attr":  # of torch.tensor(number)
        stored = getattr(value.graph.owning_module, value.target, None)
        if isinstance(stored, torch.Tensor) and not stored.dim():
            filled = stored.item()
    elif value.target is aten.full.default:
        filled = value.args[1]
    elif value.target in WHOLE | {aten.scalar_tensor.default}:
        filled = value.args[0]
    number = constant(filled)
    return None if number is None or dtype(value).is_complex else in_type(number, dtype(value))


@unset_fake_temporarily()
def in_type(number: float, type_: torch.dtype) -> float:
    return float(torch.tensor(number, dtype=torch.float64, device="cpu").to(type_))


def cast_of(node: Node) -> Node | None:
    """What the node is in another floating type, if it is that."""
    if node.target not in CASTS | {aten.copy.default}:
        return None
    source = node.args[int(node.target is aten.copy.default)]
    return source if dtype(source) in FLOATS and dtype(node) in FLOATS else None


def rounds(node: Node) -> bool:
    """It is cast to a type that does not hold all that it is cast from."""
    source = cast_of(node)
    return source is not None and not holds(dtype(node), dtype(source))


def holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    return torch.promote_types(wide, narrow) is wide


def unchanged(node: Node) -> bool:
    """The same numbers as its input's, at most in another floating type."""
    if node.target is aten.mul.Tensor:  # as PyTorch writes 1 / x
        return bool(node.args[1] == 1)
    return node.target in COPIES or (node.target in CASTS and dtype(node) in FLOATS)


def strip(node: Node, views: Set[Any] = WHOLE, exact: bool = False) -> Node:
    """The node behind copies, casts to floats and these operators, by default all views of all.

    If that is to be exact, not behind a cast that rounds.
    """
    while (node.target in views or unchanged(node)) and not (exact and rounds(node)):
        node = node.args[0]
    return node
