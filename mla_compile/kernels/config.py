"""Choices as data: tile sizes per arch, and the number of KV splits. Pure functions of ints."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from mla_compile.contents import refuse
from mla_compile.dims import Dims
from mla_compile.validate import MAX_SPLITS


@dataclass(frozen=True, slots=True)
class Config:
    block_m: int  # query rows (token × head) of a program
    block_n: int  # keys of a tile
    num_warps: int
    num_stages: int = 1
    kernel: str = "portable"  # or "cdna3", "cdna4", "sm90"
    per_unit: int = 1  # programs a compute unit holds at once
    stream: float = 0.0  # tile-times in which HBM delivers a tile, to all units together
    combine: float = 1 / 60  # tile-times of a full block's partials, written and read back
    late: float = 0.0  # of it at least, where stage 1 leaves hardly a unit for it to wait on
    again: float = 0.0  # of it for each 64 parts of a row after the first
    persistent: bool = False  # as many programs as units, each taking one item after another
    # Tiles of a program from which on a `schedule` saves more than it costs; None: there is none.
    even_from: int | None = None
    early: bool = False  # the combine is launched before stage 1 ends, and waits for it
    tiled: bool = False  # it stores parts of 16 rows as its warps have them
    covers: tuple[str, ...] = ()  # rare features it has, which other Gluon kernels lack
    least: tuple[int, int] = (0, 0)  # not for so few rows with fewer keys than that in the batch
    table_stage: bool = False  # a stage is for the page table: without one, one stage less
    reload_v: bool = False  # load the K_c tile a second time as V
    chunk: int = 0  # columns of Q and K_c that make scores at once, loaded for each tile; 0: all
    options: tuple[tuple[str, Any], ...] = ()  # compiler options of the backend


KEY_MASK = "attn_mask of keys"  # the same for all rows of a sequence, over a dense cache

# From Triton 3.10 on a multiplication and an addition are fused only on demand.
_FUSED = (("enable_fp_fusion", True),)
# AMD: 16×16 MFMA, with packed K loads before CDNA4, as every MI300 MLA kernel in the field has it.
_CDNA3 = (("matrix_instr_nonkdim", 16), ("kpack", 2))
_CDNA4 = (("matrix_instr_nonkdim", 16),)
# LLVM's scheduler for a wave that must hide its own latencies; the default one takes up to 15 %
# longer. Up to Triton 3.7 only this hint asks for it.
_ILP = (*_FUSED, ("llvm_fn_attrs", "amdgpu-sched-strategy=iterative-ilp"))
_ILP_HINT = (*_FUSED, ("schedule_hint", "memory-bound-attention"))
# All 256 registers that each of 8 waves has for any use: of two halves one is full too early.
_ILP_UNIFIED = (
    *_FUSED,
    ("llvm_fn_attrs", "amdgpu-sched-strategy=iterative-ilp,amdgpu-agpr-alloc=0"),
)

# Configs of an arch by the most rows each suits, in rising order; the last takes all that is left.
# sm90 numbers are measured on an H200, gfx numbers come from a timing model of the compiled code;
# both at 128 heads, context 4096, batch 128. A suffix names an older Triton. No loop on AMD spills
# with Triton 3.9. With 3.6, 64 portable rows on gfx950 do, under a mask of keys (69-87 registers)
# and over a large e4m3fn cache (8), and it cannot compile one of e4m3fnuz there; with 3.7, ragged
# queries under a soft cap on gfx942 move 1 register to an accumulation register.
_GFX942 = (
    Config(block_m=16, block_n=16, num_warps=4, num_stages=1, options=_CDNA3),
    # LDS is 64 KB: one 32-key tile of 64 rows. With two stages the transposed V falls to
    # 2-byte LDS reads (10.5-15.9 K clocks a tile against 8.1 K).
    Config(block_m=64, block_n=32, num_warps=4, num_stages=1, options=_CDNA3),
)
# Before Triton 3.8 nothing goes direct to LDS, and the second load spills 90 registers.
_GFX950_SYNC = (
    Config(block_m=16, block_n=16, num_warps=4, num_stages=1, options=_CDNA4),
    Config(block_m=64, block_n=32, num_warps=4, num_stages=3, options=_CDNA4),
)
# Never timed: the largest tiles that compile without spills and within shared memory, with a mask
# and without, on Triton 3.6 and 3.9; two stages and 8 warps as on sm90.
_SM80 = (  # 163 KB of shared memory
    Config(block_m=16, block_n=64, num_warps=8, num_stages=2),
    # 64 rows spill 272-336 bytes with two stages; 64 keys under a mask take 172 KB on 3.6.
    Config(block_m=32, block_n=32, num_warps=8, num_stages=2),
)
_SM89 = (  # 99 KB: under a mask 16 rows of 64 keys take 122-154 on 3.6, 32 of 32 keys 104
    Config(block_m=16, block_n=32, num_warps=8, num_stages=2),
    Config(block_m=32, block_n=16, num_warps=8, num_stages=2),
)
_SM100 = (  # 227 KB
    Config(block_m=16, block_n=64, num_warps=8, num_stages=2),
    # tcgen05 from 64 rows on; 64 keys take 345 KB on 3.6, and 128 rows 576 of the 512 columns of
    # tensor memory.
    Config(block_m=64, block_n=32, num_warps=8, num_stages=2),
)
# In WMMA's layout a whole query fills the 256 registers of gfx11's waves: 200 spill. By chunks
# 64 rows spill 51-80 there, 32 keys 45-150; before Triton 3.9, which keeps all chunks, so do these.
_RDNA = (
    Config(block_m=16, block_n=16, num_warps=8, chunk=64),
    Config(block_m=32, block_n=16, num_warps=8, chunk=64),
)
HALF: dict[str, tuple[Config, ...]] = {
    **dict.fromkeys(("sm80", "sm87"), _SM80),
    **dict.fromkeys(("sm86", "sm89", "sm120", "sm121"), _SM89),
    **dict.fromkeys(("sm100", "sm103"), _SM100),
    **dict.fromkeys(("gfx1100", "gfx1101", "gfx1102", "gfx1150", "gfx1151"), _RDNA),
    **dict.fromkeys(("gfx1200", "gfx1201"), _RDNA),
    "sm90": (
        # Under 64 rows tl.dot falls from wgmma to mma.sync, which is enough where the cache's
        # bandwidth is the limit.
        Config(block_m=16, block_n=64, num_warps=8, num_stages=2),
        # 249-252 TF/s; without the table's stage 242-247. 32 rows 200, BLOCK_N 32 175-219, 16 warps
        # 120, 4 warps 88; 128 rows do not fit.
        Config(block_m=64, block_n=64, num_warps=8, num_stages=3, table_stage=True),
    ),
    **dict.fromkeys(("gfx942", "gfx942-3.8", "gfx942-3.7", "gfx942-3.6"), _GFX942),
    "gfx950": (
        # A second load gives K and V each their own direct-to-LDS layout: 5.6 K -> 3.6 K clocks a
        # tile, for 143 KB of 160 KB LDS.
        Config(block_m=16, block_n=32, num_warps=2, num_stages=2, reload_v=True, options=_CDNA4),
        # With three stages and no table there would be three tiles, 210 KB.
        Config(
            block_m=64,
            block_n=32,
            num_warps=4,
            num_stages=3,
            table_stage=True,
            reload_v=True,
            options=_CDNA4,
        ),
    ),
    **dict.fromkeys(("gfx950-3.7", "gfx950-3.6"), _GFX950_SYNC),
}

# Gluon kernels; clocks of a tile in the same model. 32 rows took as long as 64, 128 spill. Those of
# 16 rows wait for HBM.
_CDNA3_16 = Config(
    block_m=16,
    block_n=16,
    num_warps=2,
    kernel="cdna3",
    per_unit=2,
    even_from=4,  # a tile takes 3 µs, the launch of the combine 5
    stream=1 / 780,
    combine=1 / 220,
    options=_FUSED,
)
# 256 registers are where a third program fits: 4.1 K clocks for three at once, 87 a key; 32 keys of
# 4 waves 101 a key.
_CDNA3_16_DENSE = replace(  # under a schedule a register would be spilled in the loop
    _CDNA3_16, per_unit=3, even_from=None, options=(*_FUSED, ("waves_per_eu", 2))
)
_CDNA3_64 = Config(block_m=64, block_n=32, num_warps=8, kernel="cdna3", even_from=4, options=_ILP)
_CDNA4_16 = replace(
    _CDNA3_16, block_n=32, kernel="cdna4", stream=1 / 290, combine=1 / 160, options=_ILP
)
# Two tiles are 158 of 160 KB LDS.
_CDNA4_64 = Config(
    block_m=64, block_n=64, num_warps=8, kernel="cdna4", even_from=4, options=_ILP_UNIFIED
)
GLUON: dict[str, tuple[Config, ...]] = {
    "sm90": (
        Config(
            block_m=64,
            block_n=64,
            num_warps=4,
            kernel="sm90",
            # 585-643 TF/s with a cold L2 where the portable kernel has 221-255.
            # 1 sequence of 4096: 16.5 µs in 32 splits, 17.6 in 24. 2 of 16 heads 15.6 in 32, 17.3
            # in 64. 1 of 8192 and 16 heads 15.8 in 64, 19.6 in 128.
            combine=1 / 26,
            late=3,
            again=2,
            persistent=True,
            early=True,
            tiled=True,
            # 2 sequences of 8192, 3.9 tiles: 33 µs by a schedule, 27 by splits. A tile takes 2.
            even_from=4,
            covers=(KEY_MASK,),
            # Up to 16 heads: 64 keys take 11 µs where the portable kernel takes 10, one sequence of
            # 512 or 4096 takes 4 % less, many short ones are not timed; from here on less.
            least=(16, 8192),
            options=_FUSED,
        ),
    ),
    # 4.4 K; 4 waves 4.8 K.
    "gfx942": (_CDNA3_16_DENSE, _CDNA3_64),
    # A third program of 16 rows spills 3 registers, 2 accesses in the loop.
    "gfx942-3.8": (_CDNA3_16, _CDNA3_64),
    # 4.5 K; 4 waves 4.9 K.
    "gfx942-3.7": (_CDNA3_16_DENSE, replace(_CDNA3_64, options=_ILP_HINT)),
    # 4.5 K; 4 waves spill 32 registers, and a third program of 16 rows 5.
    "gfx942-3.6": (_CDNA3_16, replace(_CDNA3_64, options=_ILP_HINT)),
    # 3.1 K for two at once, 49 a key; 64 keys of 4 waves 54 a key. 5.1 K; 4 waves 5.2-5.6 K.
    "gfx950": (_CDNA4_16, _CDNA4_64),
    # 5.1 K on 3.7, 5.3 K on 3.6, whose 4 waves move accumulators to and fro: 6.3 K.
    **dict.fromkeys(
        ("gfx950-3.7", "gfx950-3.6"),
        (replace(_CDNA4_16, options=_ILP_HINT), replace(_CDNA4_64, options=_ILP_HINT)),
    ),
}

# One-byte caches. CDNA3 converts OCP's fp8 in dozens of instructions a value: 64 rows spill 146
# registers to memory at 32 keys, none at 16.
_GFX942_BYTE = (
    _GFX942[0],
    Config(block_m=64, block_n=16, num_warps=4, num_stages=1, options=_CDNA3),
)
BYTE = dict.fromkeys(("gfx942", "gfx942-3.8", "gfx942-3.7", "gfx942-3.6"), _GFX942_BYTE)

# Any other arch: 16 rows and one stage fit the 64 KB that every tensor-core GPU has.
FALLBACK = (Config(block_m=16, block_n=16, num_warps=4, num_stages=1),)

# fp32 doubles every tile, and at full precision no arch but AMD's has a matrix unit for it. Scores
# summed in one go err up to 2.5 times as much as a model's expanded form, by 64 columns 1.7.
FULL_FALLBACK: tuple[Config, ...] = (Config(block_m=16, block_n=16, num_warps=8, chunk=64),)
FULL: dict[str, tuple[Config, ...]] = dict.fromkeys(
    ("sm80", "sm87", "sm90", "sm100", "sm103"), (replace(FULL_FALLBACK[0], num_stages=2),)
)


def tuned_arch(arch: str, triton_version: str) -> str:
    """The key of the tables above: the arch, or with an older Triton what they say for that."""
    version = tuple(map(int, triton_version.split(".")[:2]))
    older = (f"{arch}-3.{minor}" for minor in (6, 7, 8) if version <= (3, minor))
    return next((key for key in older if key in GLUON), arch)


def uncovered(
    table: tuple[Config, ...], *, Lkv: int, R: int, q_bytes: int, kv_bytes: int, rare: str
) -> str:
    """What of a call an arch's Gluon kernels leave to the portable one; "" if nothing."""
    if rare and not all(rare in config.covers for config in table):
        return rare
    if (Lkv, R) != (512, 64):
        return f"dims {Lkv} + {R}"
    other = next((size for size in (q_bytes, kv_bytes) if size != 2), 0)
    return f"elements of {other} byte{'s' * (other > 1)}" if other else ""


def choose(
    arch: str,
    *,
    rows: int,
    Lkv: int,
    R: int,
    q_bytes: int,
    kv_bytes: int,
    keys: int | None = None,
    rare: str = "",
    pinned: str | None = None,
) -> tuple[Config, str]:
    """The config of a call, and why.

    `keys` are those of the batch, if known. `rare` names a feature that Gluon kernels lack, but for
    those whose config covers it.
    """
    table = GLUON.get(arch, ())
    missing = uncovered(table, Lkv=Lkv, R=R, q_bytes=q_bytes, kv_bytes=kv_bytes, rare=rare)
    if pinned and pinned not in {"portable", *(c.kernel for c in table)}:
        has = " or ".join(["portable", *sorted({c.kernel for c in table})])
        refuse("MLA_COMPILE_KERNEL", f"{has} on {arch}", pinned, "Unset it to let the table pick.")
    if pinned and pinned != "portable" and missing:
        remedy = "Unset it, or pin portable."
        refuse("MLA_COMPILE_KERNEL", f"a kernel that has {missing}", pinned, remedy)
    if table and not missing and pinned != "portable":
        config = _fitting(table, rows)
        few = keys is not None and keys < config.least[1] and rows <= config.least[0]
        if pinned or not few:
            return config, "pinned" if pinned else f"the table of {arch}"
        missing = f"speed below {config.least[1]} keys"
    config = pick(arch, rows=rows, Lkv=Lkv, q_bytes=q_bytes, kv_bytes=kv_bytes)
    if pinned:
        return config, "pinned"
    return config, f"{table[0].kernel} lacks {missing}" if table else f"all there is for {arch}"


def pick(arch: str, *, rows: int, Lkv: int, q_bytes: int, kv_bytes: int) -> Config:
    """The portable tile for `rows` query rows of a sequence; sizes in bytes of one element."""
    full = max(q_bytes, kv_bytes) > 2
    tables, table = (FULL, FULL_FALLBACK) if full else (HALF, FALLBACK)
    if Lkv <= 512:  # DeepSeek's, which the tables are sized for
        table = tables.get(arch, table)
        if kv_bytes == 1:
            table = BYTE.get(arch, table)
    return _fitting(table, rows)


def _fitting(table: tuple[Config, ...], rows: int) -> Config:
    return next((c for c in table if rows <= c.block_m), table[-1])


def workspace_numel(dims: Dims, splits: int) -> int:
    """fp32 elements that hold (out, m, l) of every row and split."""
    return dims.T * dims.N * splits * (dims.Lkv + 2)


def combine_blocks(parts: int, Lkv: int, tiled: bool = False) -> tuple[int, int, int]:
    """Rows, BLOCK_S and BLOCK_L of the combine: a program is a warp with at most 2048 fp32 partials
    at once, in tiles of two rows with twice as many where it has 64 parts.

    One sequence of 4096 in 32 splits on an H200: 16.5 µs by 32 columns, 17.6 by 16; of 32768 in 64
    splits 29.9 and 30.7.
    """
    block_s = min(ceil_pow2(parts), 64)
    if tiled:
        return 2, block_s, min(Lkv, max(1024 // block_s, 32))
    return 1, block_s, min(ceil_pow2(Lkv), 2048 // block_s)


MAX_EVEN = 1024  # sequences of a `schedule`; more are even enough, and every program looks at all

# In units of the time one tile takes (4.7 µs on an H200 at 64 rows × 64 keys).
PROLOGUE = 2.0  # a program's launch, query load and epilogue
COMBINE = 1.0  # launch of the second kernel


@lru_cache(maxsize=4096)
def num_splits(
    programs: int,
    tiles: int,
    units: int,
    stream: float = 0.0,
    combine: float = 1 / 60,
    late: float = 0.0,
    again: float = 0.0,
) -> int:
    """KV splits for `programs` = B × row blocks of `tiles` tiles each, `units` of them at a time.

    The fewest splits that minimise the waves of programs times what each program does, or what
    HBM needs to deliver the tiles. The rates are Config's.
    """
    best, best_cost = 1, float("inf")
    for splits in range(1, max(1, min(tiles, MAX_SPLITS // 2)) + 1):
        waves = -(-programs * splits // units)
        cost = max(waves * (-(-tiles // splits) + PROLOGUE), programs * tiles * stream)
        if splits > 1:
            busy = programs * splits > 0.9 * units
            cost += COMBINE + max(combine * programs * splits, late * busy)
            cost += again * ((splits - 1) // 64)
        if cost < best_cost * (1 - 1e-9):
            best, best_cost = splits, cost
    return best


def combine_of(config: Config, rows: int) -> float:
    """`combine` where `rows` query rows of a sequence may leave some of a block empty."""
    blocks = -(-rows // config.block_m)
    return config.combine * rows / (blocks * config.block_m)


def evenly(config: Config, programs: int, tiles: int, units: int) -> bool:
    """Whether lengths that only the device knows are shared out there, by a `schedule`."""
    return config.even_from is not None and programs * tiles >= config.even_from * units


def ceil_pow2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
