"""Choices as data: tile sizes per arch, and the number of KV splits. Pure functions of ints."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from mla_compile.dims import Dims
from mla_compile.validate import MAX_SPLITS


@dataclass(frozen=True, slots=True)
class Config:
    block_m: int  # query rows (token × head) of a program
    block_n: int  # keys of a tile
    num_warps: int
    num_stages: int
    reload_v: bool = False  # load the K_c tile a second time as V
    options: tuple[tuple[str, int], ...] = ()  # compiler options of the backend


# AMD: 16×16 MFMA, with packed K loads before CDNA4, as every MI300 MLA kernel in the field has it.
_CDNA3 = (("matrix_instr_nonkdim", 16), ("kpack", 2))
_CDNA4 = (("matrix_instr_nonkdim", 16),)

# Configs of an arch by the most rows each suits, in rising order; the last takes all that is left.
# sm90 numbers are measured on an H200, gfx numbers come from a timing model of the compiled code;
# both at 128 heads, context 4096, batch 128. None of these spills on Triton 3.6 or 3.9.
HALF: dict[str, tuple[Config, ...]] = {
    "sm90": (
        # Under 64 rows tl.dot falls from wgmma to mma.sync, which is enough where the cache's
        # bandwidth is the limit.
        Config(block_m=16, block_n=64, num_warps=8, num_stages=2),
        # 244-250 TF/s. 32 rows 200, BLOCK_N 32 177, 16 warps 120, 4 warps 88; 128 rows do not fit.
        Config(block_m=64, block_n=64, num_warps=8, num_stages=2),
    ),
    "gfx942": (
        Config(block_m=16, block_n=16, num_warps=4, num_stages=1, options=_CDNA3),
        # LDS is 64 KB: one 32-key tile of 64 rows. With two stages the transposed V falls to
        # 2-byte LDS reads (10.5-15.9 K clocks a tile against 8.1 K).
        Config(block_m=64, block_n=32, num_warps=4, num_stages=1, options=_CDNA3),
    ),
    "gfx950": (
        # A second load gives K and V each their own direct-to-LDS layout: 5.6 K -> 3.6 K clocks a
        # tile, for 143 KB of 160 KB LDS.
        Config(block_m=16, block_n=32, num_warps=2, num_stages=2, reload_v=True, options=_CDNA4),
        Config(block_m=64, block_n=32, num_warps=4, num_stages=3, reload_v=True, options=_CDNA4),
    ),
    # Before Triton 3.8 nothing goes direct to LDS, and the second load spills 90 registers.
    "gfx950-sync": (
        Config(block_m=16, block_n=16, num_warps=4, num_stages=1, options=_CDNA4),
        Config(block_m=64, block_n=32, num_warps=4, num_stages=3, options=_CDNA4),
    ),
}

# fp32 doubles every tile, and at full precision no arch but AMD's has a matrix unit for it.
FULL: dict[str, tuple[Config, ...]] = {
    "sm90": (Config(block_m=16, block_n=16, num_warps=8, num_stages=2),),
}

# Any other arch: 16 rows and one stage fit the 64 KB that every tensor-core GPU has.
FALLBACK = (Config(block_m=16, block_n=16, num_warps=4, num_stages=1),)


def tuned_arch(arch: str, triton_version: str) -> str:
    """The key of the tables above."""
    old = tuple(map(int, triton_version.split(".")[:2])) < (3, 8)
    return "gfx950-sync" if arch == "gfx950" and old else arch


def pick(arch: str, *, rows: int, Lkv: int, q_bytes: int, kv_bytes: int) -> Config:
    """The tile for `rows` query rows of a sequence; sizes in bytes of one element."""
    table = (FULL if max(q_bytes, kv_bytes) > 2 else HALF).get(arch, FALLBACK)
    if Lkv > 512:  # the tables are sized for DeepSeek's 512
        table = FALLBACK
    return next((c for c in table if rows <= c.block_m), table[-1])


def workspace_numel(dims: Dims, splits: int) -> int:
    """fp32 elements that hold (out, m, l) of every row and split."""
    return dims.T * dims.N * splits * (dims.Lkv + 2)


def combine_blocks(splits: int, Lkv: int) -> tuple[int, int]:
    """BLOCK_S, BLOCK_L of the combine: at most 8192 fp32 partials in registers at once."""
    block_s = ceil_pow2(splits)
    return block_s, max(16, min(ceil_pow2(Lkv), 8192 // block_s))


# In units of the time one tile takes (4.7 µs on an H200 at 64 rows × 64 keys).
PROLOGUE = 2.0  # a program's launch, query load and epilogue
COMBINE = 1.0  # launch of the second kernel
COMBINE_PER_PROGRAM = 1 / 60  # its traffic: 256 KB written and read back per program


@lru_cache(maxsize=4096)
def num_splits(programs: int, tiles: int, units: int) -> int:
    """KV splits for `programs` = B × row blocks of `tiles` tiles each, on `units` compute units.

    The fewest splits that minimise the waves of programs times what each program does.
    """
    best, best_cost = 1, float("inf")
    for splits in range(1, max(1, min(tiles, MAX_SPLITS // 2)) + 1):
        waves = -(-programs * splits // units)
        cost = waves * (-(-tiles // splits) + PROLOGUE)
        if splits > 1:
            cost += COMBINE + COMBINE_PER_PROGRAM * programs * splits
        if cost < best_cost * (1 - 1e-9):
            best, best_cost = splits, cost
    return best


def ceil_pow2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
