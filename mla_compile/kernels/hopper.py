"""What the warpgroups of `sm90` do alike, and the pieces they are made of: which block and keys an
item is, masks of keys, turns in rings of buffers, and what takes a line of PTX.
"""

import os

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

import mla_compile.kernels.cdna as cdna
import mla_compile.kernels.schedule as schedule
from mla_compile.kernels.cdna import LKV, LOG2E
from mla_compile.kernels.split import ABSORBING, FLOOR

ROWS: gl.constexpr = gl.constexpr(64)  # of a block, what one wgmma has
KEYS: gl.constexpr = gl.constexpr(64)  # of a tile
# Built for compute-sanitizer's racecheck. It takes an arrival to say nothing of other threads than
# the one that makes it, so each makes one: 2 % of a large batch's time. And it takes what Triton
# shares with a warpgroup for raced if the first to start has passed more barriers of threads: that
# is `gather` then, which passes fewest, and none before the others start.
CHECKED: gl.constexpr = gl.constexpr(os.environ.get("MLA_COMPILE_RACECHECK") == "1")
ARRIVALS: gl.constexpr = gl.constexpr(1 + 128 * CHECKED.value)  # of a warpgroup that hands on


def _fade_asm(n: int) -> str:
    """Multiply n accumulators unless both factors are 1 in all lanes of the warp.

    A lane's accumulators belong to two rows: of each four, two to the first, two to the second.
    """
    multiply = " ".join(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n))
    return (
        f"{{ .reg .pred p; setp.neu.f32 p, ${2 * n}, 0f3F800000; "
        f"setp.neu.or.f32 p, ${2 * n + 2}, 0f3F800000, p; "
        f"vote.sync.any.pred p, p, 0xffffffff; @!p bra SKIP; {multiply} SKIP: }}"
    )


FADED: gl.constexpr = gl.constexpr(32)  # accumulators an asm statement takes
FADE_ASM: gl.constexpr = gl.constexpr(_fade_asm(32))
FADE_TIES: gl.constexpr = gl.constexpr(",".join(["=f"] * 32 + [*map(str, range(32))] + ["f"] * 32))


@gluon.jit
def item(i, key_begin, work, CALL):
    """Block and keys number i."""
    N: gl.constexpr = CALL[0]
    PAGE_SIZE: gl.constexpr = CALL[1]
    CAUSAL: gl.constexpr = CALL[2]
    if CALL[3] == "even":
        pid = gl.program_id(0)
        block, keys = schedule.item(i, key_begin, pid, work, N, PAGE_SIZE, CAUSAL, ROWS, KEYS)
    else:
        block, keys = cdna.item(i, work[1], work[2], N, PAGE_SIZE, CAUSAL, ROWS, KEYS)
    if CALL[3] == "masked":
        keys = (key_begin, work[3], keys[2], keys[3], keys[4])
    return block, keys


@gluon.jit
def bias_of(pos, mask):
    """What a mask of keys adds to scores, and whether it replaces them instead."""
    row_ptr, stride, fill, _, _ = mask
    value = gl.load(row_ptr + pos.to(gl.int64) * stride)
    IS_BOOL: gl.constexpr = value.dtype == gl.int1
    bias = gl.where(value, 0.0, fill) if IS_BOOL else value.to(gl.float32)
    bias = gl.where(bias == float("-inf"), bias, gl.maximum(bias, FLOOR))
    return bias, gl.where(value, 0, 1).to(gl.int1) if IS_BOOL else bias <= ABSORBING


@gluon.jit
def hull(mask, lo, hi):
    """First key of lo..hi that the mask does not hide, and the end of the last such key."""
    # Checked, each warp reads all: a minimum over warps would take a barrier.
    SCAN: gl.constexpr = gl.BlockedLayout([32 if CHECKED else 8], [32], [4], [0])
    first = gl.full([1024], schedule.NEVER, gl.int32, SCAN)
    end = gl.zeros([1024], gl.int32, SCAN)
    for start in range(lo, hi, 1024):
        pos = start + gl.arange(0, 1024, layout=SCAN)
        bias, _ = bias_of(gl.minimum(pos, hi - 1), mask)
        seen = (bias > mask[3]) & (pos < hi)
        first = gl.minimum(first, gl.where(seen, pos, schedule.NEVER))
        end = gl.maximum(end, gl.where(seen, pos + 1, 0))
    return gl.min(first, 0), gl.max(end, 0)


@gluon.jit
def apply_mask(s, start, hi, mask, LAYOUT: gl.constexpr):
    """Scores in log2 units under a mask of keys: what absorbs them replaces them, the rest adds."""
    pos = gl.minimum(start + gl.arange(0, KEYS, layout=gl.SliceLayout(0, LAYOUT)), hi - 1)
    bias, replaced = bias_of(pos, mask)
    s = gl.where(replaced[None, :], 0.0, s) + (bias * LOG2E)[None, :]
    return gl.where((bias > mask[3])[None, :], s, float("-inf"))


@gluon.jit
def turn(g, COUNT: gl.constexpr):
    """Which of COUNT buffers step g takes, and the phase of its barriers."""
    g = g.to(gl.uint32)  # signed division by 2 costs registers
    return (g % COUNT).to(gl.int32), (g // COUNT & 1).to(gl.int32)


@gluon.jit
def opaque(x):
    """x, of which the compiler knows nothing: descriptors made of it are made where they are used.
    Else they are made ahead and spilled: with Triton 3.9, 128 sequences of 4096 took 31 % longer.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def hand_on(bar):
    """What this warpgroup wrote is there, or what it read may be written over."""
    mbarrier.arrive(bar, count=1)
    if CHECKED:
        async_copy.mbarrier_arrive(bar, increment_count=False)


@gluon.jit
def _ring(bars, arrivals):
    COUNT: gl.constexpr = bars.shape[0]
    for i in gl.static_range(COUNT):
        mbarrier.init(bars.index(i), count=arrivals)


@gluon.jit
def begin(full, empty, shared):
    """The barriers, by how many arrive at each."""
    _, _, _, p_full, p_empty, scored, sum_full, begun = shared
    _ring(full[0], 128)  # each thread of `gather` arrives
    _ring(empty[0], ARRIVALS)
    _ring(full[1], 128)
    _ring(empty[1], 1)
    _ring(full[2], 128)
    _ring(empty[2], 1)
    mbarrier.init(p_full, count=ARRIVALS)
    mbarrier.init(p_empty, count=2 * ARRIVALS)  # both `values`
    mbarrier.init(scored, count=1)
    _ring(sum_full, ARRIVALS)
    if CHECKED:
        hand_on(begun)


@gluon.jit
def arrived(full, g, COUNT: gl.constexpr):
    """Which of COUNT buffers step g takes, once its tile is there for wgmma to read."""
    s, phase = turn(g, COUNT)
    mbarrier.wait(full.index(s), phase)
    fence_async_shared()
    return opaque(s)


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def fade(acc, factor):
    acc, factor = gl.broadcast(acc, factor[:, None])
    return gl.inline_asm_elementwise(
        FADE_ASM, FADE_TIES, [acc, factor], dtype=gl.float32, is_pure=True, pack=FADED
    )


@gluon.constexpr_function
def _adjacent():
    """[ROWS, 128] as wgmma has it, but for 4 adjacent columns in a lane where it has twice 2."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64]],
        lane_bases=[[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 128],
    )


@gluon.jit
def store_out(ptr, acc, block, strides, N):
    """Sectors of 32 bytes at once, where the accumulators as they lie have halves of two."""
    L: gl.constexpr = _adjacent()
    out = gl.convert_layout(acc.to(ptr.dtype.element_ty), L)
    cdna.store_out(ptr, out, block, strides, N, ROWS, L)


@gluon.jit
def store_tiles(ptr, acc, block, N, num_splits):
    """Columns of a part as `combine` reads them: a warp has a tile of 16 rows."""
    COLS: gl.constexpr = acc.shape[1]
    acc = acc.reshape([4, 2, 8, COLS // 8, 4, 2]).permute((0, 3, 2, 4, 1, 5))
    acc = acc.reshape([4, 16 * COLS])
    L: gl.constexpr = acc.type.layout
    row = block[0] + 16 * gl.arange(0, 4, layout=gl.SliceLayout(1, L))
    tile = (block[1] * N + row) // 16 * num_splits + block[3]
    cols = gl.arange(0, 16 * COLS, layout=gl.SliceLayout(0, L))
    at = (tile * (16 * LKV))[:, None] + cols[None, :]
    gl.store(ptr + at, acc, mask=(row < block[2] * N)[:, None])
