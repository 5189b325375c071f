"""A part of an ATen graph as an inline SVG: layers from its inputs down to its output.

Views, casts and constants are left out. An edge that passes layers bends around their boxes.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from torch.fx import Node

from mla_compile.passes.graph import CASTS, RENAMES, is_tensor, shape

WIDTH, HEIGHT, BEND = 128, 34, 24  # pixels: a box, and the room of an edge that passes a layer
GAP_X, GAP_Y = 12, 28
SWEEPS = 6  # of sorting each layer by where its neighbours stand; more change nothing to see


@dataclass(frozen=True)
class Op:
    """A node of a graph as it was: the graph may change afterwards."""

    name: str
    label: str
    shape: str
    inputs: tuple[str, ...]
    plain: bool  # a view, cast or part of its one input
    constant: bool


def snapshot(nodes: Iterable[Node]) -> dict[str, Op]:
    return {n.name: op(n) for n in nodes if n.op != "output"}


def op(node: Node) -> Op:
    called = node.op == "call_function"
    label = getattr(node.target, "_opname", str(node.target)) if called else node.name
    inputs = tuple(dict.fromkeys(n.name for n in node.all_input_nodes))
    return Op(
        name=node.name,
        label=label,
        shape=" × ".join(map(str, shape(node))) if is_tensor(node) else "",
        inputs=inputs,
        plain=len(inputs) == 1 and node.target in RENAMES | CASTS | {operator.getitem},
        constant=called and not inputs,
    )


def between(ops: Mapping[str, Op], root: str, leaves: Collection[str]) -> list[Op]:
    """The ops from `leaves`, or the graph's inputs, to `root`, in the graph's order."""
    found, todo = set(), [root]
    while todo:
        name = todo.pop()
        if name in ops and name not in found:
            found.add(name)
            todo += () if name in leaves else ops[name].inputs
    return [x for name, x in ops.items() if name in found]


def svg(ops: Iterable[Op], names: Mapping[str, str]) -> str:
    """A picture of ops in graph order. `names` tells what the inputs are to the attention."""
    drawn: dict[str, Op] = {}
    shown: dict[str, str] = {}  # the drawn op that stands for an op
    for x in ops:
        if x.plain and x.name not in names and x.inputs[0] in shown:
            shown[x.name] = shown[x.inputs[0]]
        elif not x.constant or x.name in names:
            drawn[x.name] = x
            shown[x.name] = x.name
    edges = {(shown[a], x.name) for x in drawn.values() for a in x.inputs if a in shown}
    layers, routes = layered(list(drawn), sorted(edges))
    at = places(layers, drawn)
    parts = [path([at[n] for n in route]) for route in routes]
    for name, x in drawn.items():
        kind = "input" if name in names else "ours" if x.label.startswith("mla_") else "op"
        parts.append(box(*at[name], names.get(name, x.label), x.shape, kind))
    width = 2 * max(x for x, _ in at.values()) + WIDTH + GAP_X
    height = len(layers) * (HEIGHT + GAP_Y)
    return (
        f'<svg viewBox="{-width / 2:g} 0 {width:g} {height}" width="{width:g}">'
        f"{''.join(parts)}</svg>"
    )


Place = tuple[float, float]  # the middle of a box's upper side


def layered(
    names: list[str], edges: list[tuple[str, str]]
) -> tuple[list[list[str]], list[list[str]]]:
    """Layers by the longest way from an input, and each edge's route with a bend in every layer."""
    before: dict[str, list[str]] = {name: [] for name in names}
    after: dict[str, list[str]] = {name: [] for name in names}
    for a, b in edges:
        before[b].append(a)
        after[a].append(b)
    depth: dict[str, int] = {}
    for name in names:
        depth[name] = 1 + max((depth[a] for a in before[name]), default=-1)
    for name in reversed(names):  # as near to its first user as can be
        if not before[name] and after[name]:
            depth[name] = min(depth[b] for b in after[name]) - 1
    layers: list[list[str]] = [[] for _ in range(max(depth.values(), default=0) + 1)]
    for name in names:
        layers[depth[name]].append(name)
    routes = []
    for a, b in edges:
        bends = [f"{a} {b} {y}" for y in range(depth[a] + 1, depth[b])]
        for y, bend in enumerate(bends, start=depth[a] + 1):
            layers[y].append(bend)
        routes.append([a, *bends, b])
    untangle(layers, routes)
    return layers, routes


def untangle(layers: list[list[str]], routes: list[list[str]]) -> None:
    """Sort each layer by the mean place of what it is joined to, above and below in turn."""
    joined: dict[tuple[str, bool], list[str]] = {}
    for a, b in (step for route in routes for step in pairwise(route)):
        joined.setdefault((b, True), []).append(a)
        joined.setdefault((a, False), []).append(b)
    for sweep in range(SWEEPS):
        downward = sweep % 2 == 0
        place = {n: i - len(layer) / 2 for layer in layers for i, n in enumerate(layer)}
        for layer in layers if downward else reversed(layers):
            means = {}
            for n in layer:
                near = joined.get((n, downward), [n])
                means[n] = sum(place[m] for m in near) / len(near)
            layer.sort(key=means.__getitem__)
            place |= {n: i - len(layer) / 2 for i, n in enumerate(layer)}


def places(layers: list[list[str]], drawn: Collection[str]) -> dict[str, Place]:
    at: dict[str, Place] = {}
    for y, layer in enumerate(layers):
        widths = [(WIDTH if n in drawn else BEND) + GAP_X for n in layer]
        left = -sum(widths) / 2
        for n, width in zip(layer, widths, strict=True):
            at[n] = left + width / 2, y * (HEIGHT + GAP_Y)
            left += width
    return at


def path(route: list[Place]) -> str:
    (x, y), *rest = route
    d = f"M{x:g} {y + HEIGHT:g}"
    y += HEIGHT
    for next_x, next_y in rest:
        half = (y + next_y) / 2
        d += f"C{x:g} {half:g} {next_x:g} {half:g} {next_x:g} {next_y:g}V{next_y + HEIGHT:g}"
        x, y = next_x, next_y + HEIGHT
    return f'<path d="{d.rpartition("V")[0]}"/>'


def box(x: float, y: float, label: str, sizes: str, kind: str) -> str:
    return (
        f'<g class="{kind}"><title>{escape(label)} {escape(sizes)}</title>'
        f'<rect x="{x - WIDTH / 2:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="4"/>'
        f'<text x="{x:g}" y="{y + 14:g}">{escape(short(label))}</text>'
        f'<text class="shape" x="{x:g}" y="{y + 28:g}">{escape(short(sizes))}</text></g>'
    )


def short(text: str, most: int = 20) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
