"""Golden limits of the shipped AMD binaries, by arch and tile, as Triton 3.9 compiles them.

VGPRs are at most, programs per compute unit at least. Numbers are the worst of all cases, up
to the 8 registers that are allocated at once. A change that moves one is to be looked at, and the
number changed with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.cdna.gate import Report
from tests.cdna.shipped import Shipped

TRITON = "3.9"


@dataclass(frozen=True)
class Limit:
    vgprs: int
    programs: int = 1
    sgpr_spills: int = 0


LIMITS: dict[tuple[str, str], Limit] = {
    # The combine reads once and writes once: eight waves a SIMD hide its latency.
    ("gfx942", "combine"): Limit(40, programs=8),
    ("gfx950", "combine"): Limit(40, programs=8),
}
# What a binary may do that others may not: part of its name, what is wrong, why that stands.
EXCEPTIONS: list[tuple[str, str, str]] = []


def verdict(shipped: Shipped, r: Report) -> str:
    return "; ".join(r.problems(shipped.arch)) or "ok"
