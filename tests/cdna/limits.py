"""Golden limits of the shipped AMD binaries, by arch and tile, as Triton 3.9 compiles them.

VGPRs are at most, programs per compute unit at least: the worst of all cases, up to the 8 registers
that are allocated at once. Who moves a number looks at why, and writes it here.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.cdna.gate import Report

TRITON = "3.9"


@dataclass(frozen=True)
class Limit:
    vgprs: int
    programs: int = 1
    sgpr_spills: int = 0  # to lanes of vector registers, outside the loop


LIMITS = {
    # Waves of 256 registers: three programs of 2 waves, one of 8.
    ("gfx942", "cdna3 16x16"): Limit(256, programs=3, sgpr_spills=42),
    ("gfx942", "cdna3 64x32"): Limit(256),
    ("gfx950", "cdna4 16x32"): Limit(264, programs=2),
    # Ragged queries and 64-bit pages are what spills.
    ("gfx950", "cdna4 64x64"): Limit(256, sgpr_spills=7),
    ("gfx942", "cdna3 64x32 evenly"): Limit(256, sgpr_spills=2),
    ("gfx950", "cdna4 16x32 evenly"): Limit(272, programs=2, sgpr_spills=12),
    ("gfx950", "cdna4 64x64 evenly"): Limit(256, sgpr_spills=16),
    # 202 over a large cache under a mask of keys: heads in 64 bits took two more.
    ("gfx942", "split 16x16"): Limit(208, programs=2),
    ("gfx942", "split 64x32"): Limit(376, sgpr_spills=6),
    # One program of two waves a unit: its two tiles of K and of V are 140 of 160 KB LDS.
    ("gfx950", "split 16x32"): Limit(336),
    # A mask of keys moves accumulators: 395 without one.
    ("gfx950", "split 64x32"): Limit(440, sgpr_spills=6),
    ("gfx942", "split 16x16 fp32"): Limit(400),
    ("gfx950", "split 16x16 fp32"): Limit(360),
    ("gfx942", "split 16x16 fp8"): Limit(272),
    ("gfx942", "split 64x16 fp8"): Limit(408),
    # Of an e4m3fnuz cache only; heads in 64 bits took two more.
    ("gfx950", "split 16x32 fp8"): Limit(416, programs=2, sgpr_spills=26),
    ("gfx950", "split 64x32 fp8"): Limit(416),
    ("gfx942", "split 16x16 L1024"): Limit(312),
    ("gfx950", "split 16x16 L1024"): Limit(384),
    # It reads once and writes once: eight waves a SIMD hide its latency; up to 64 registers do.
    ("gfx942", "combine"): Limit(64, programs=8),
    ("gfx950", "combine"): Limit(64, programs=8),
    # Eight rows of parts at once, 16 registers a lane.
    ("gfx942", "combine_cut"): Limit(104, programs=4),
    ("gfx950", "combine_cut"): Limit(104, programs=4),
}
# Part of a binary's name, what is wrong with it, and why that stands.
EXCEPTIONS = (
    (
        "-evenly",
        "VGPRs spilled",
        "what the blocks of a stretch share; the loop over the tiles has none",
    ),
    *(
        (
            f"gfx950-buffer-{case}",
            "2 VGPRs spilled, 12 bytes of scratch",
            "from the prologue to the epilogue; the loop has neither",
        )
        for case in ("int64-indices", "four-query-tokens", "ragged-query-tokens")
    ),
    (
        "mask-of-rows",
        "LDS reads of 2 bytes or less",
        "a mask tile of 1- or 2-byte elements changes its layout in LDS",
    ),
    (
        "gfx950-buffer-e4m3fnuz",
        "VGPRs spilled, 0 bytes of scratch",
        "to accumulation registers; CDNA4 has no fnuz and nobody keeps a cache of it there",
    ),
    (
        "gfx950-large-e4m3fnuz",
        "VGPRs spilled, 0 bytes of scratch",
        "as where the cache is a buffer",
    ),
    (
        "gfx950-buffer-e4m3fnuz",
        "loads of 16 bytes",
        "the rope tile's layout follows its conversion",
    ),
    (
        "gfx950-large-e4m3fnuz",
        "loads of 16 bytes",
        "as where the cache is a buffer",
    ),
)


def breaches(arch: str, r: Report) -> list[str]:
    """What a binary does worse than its golden limits."""
    limit = LIMITS[arch, r.name]
    found = []
    if r.vgprs > limit.vgprs:
        found.append(f"{r.vgprs} VGPRs, the limit is {limit.vgprs}")
    if r.programs < limit.programs:
        found.append(f"{r.programs} programs on a compute unit, the limit is {limit.programs}")
    if r.sgpr_spills > limit.sgpr_spills:
        found.append(f"{r.sgpr_spills} SGPRs spilled, the limit is {limit.sgpr_spills}")
    return found


def judge(name: str, problems: list[str]) -> tuple[list[str], list[str]]:
    """Problems that stand, and the reasons of those that are excused."""
    wrong, reasons = [], []
    for problem in problems:
        excuses = [why for part, what, why in EXCEPTIONS if part in name and what in problem]
        if excuses:
            reasons.append(f"{problem}: {excuses[0]}")
        else:
            wrong.append(problem)
    return wrong, reasons
