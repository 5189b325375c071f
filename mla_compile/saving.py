"""What a rewrite saves of the work that any implementation of the graph as written has to do.

FLOPs are those of the contractions. Elements are those moved to and from memory by what is as large
as the cache: as written, an expanded cache is read once, its keys and values for every head are
written and read once; an absorbed one is read for the scores and again for the values. The op reads
the cache once, whatever the number of heads. Scores and probabilities are left out on both sides:
fused, as written or by us, they never reach memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Size = Any  # int or torch.SymInt


@dataclass(frozen=True)
class Work:
    flops: Size
    elements: Size


def as_written(d: dict[str, Size], expanded: bool) -> Work:
    latents = d["B"] * d["Skv"] * (d["Lkv"] + d["R"])
    if not expanded:
        work = absorbed(d)
        return Work(work.flops, latents + d["B"] * d["Skv"] * d["Lkv"])
    width = d["P"] + d["R"] + d["V"]
    keys_and_values = d["B"] * d["N"] * d["Skv"] * width
    expansion = 2 * d["B"] * d["N"] * d["Skv"] * d["Lkv"] * (d["P"] + d["V"])
    return Work(expansion + 2 * d["Sq"] * keys_and_values, latents + 2 * keys_and_values)


def absorbed(d: dict[str, Size]) -> Work:
    """The attention as the op does it, without the projections of query and output."""
    latents = d["B"] * d["Skv"] * (d["Lkv"] + d["R"])
    width = 2 * d["Lkv"] + d["R"]
    return Work(2 * d["B"] * d["N"] * d["Sq"] * d["Skv"] * width, latents)


def rewritten(d: dict[str, Size], expanded: bool) -> Work:
    work = absorbed(d)
    if not expanded:
        return work
    projections = 2 * d["B"] * d["N"] * d["Sq"] * d["Lkv"] * (d["P"] + d["V"])
    return Work(work.flops + projections, work.elements)


def saving(d: dict[str, Size], expanded: bool) -> dict[str, str]:
    """A row each for FLOPs and memory, as text; sizes may be symbolic."""
    before, after = as_written(d, expanded), rewritten(d, expanded)
    return {
        "FLOPs": change(before.flops, after.flops),
        "memory": change(before.elements, after.elements) + " elements",
    }


def change(before: Size, after: Size) -> str:
    """'as written -> now (times less)', or one number where nothing changes."""
    if str(before) == str(after):
        return f"{shown(after)} as before"
    hints = at_hint(before), at_hint(after)
    times = f" ({hints[0] / hints[1]:.3g}x less)" if hints[0] and hints[1] else ""
    return f"{shown(before)} -> {shown(after)}{times}"


def shown(n: Size) -> str:
    return f"{n:.3g}" if isinstance(n, int) else str(n)


def at_hint(n: Size) -> int | None:
    """A symbolic size at the values that it was traced with."""
    return n if isinstance(n, int) else n.node.hint
