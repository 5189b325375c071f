"""What `sm90` copies: keys from wherever their pages lie, a tile or two ahead, by a warpgroup for
that alone; a query by the warpgroup that scores.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

import mla_compile.kernels.cdna as cdna
from mla_compile.kernels.hopper import CHECKED, KEYS, ROWS, bias_of, hand_on, item, turn

# Triton 3.6 has it by its first name alone.
copy = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared

HALF: gl.constexpr = gl.constexpr(256)  # columns of V of a warpgroup: 128 registers a thread
PART: gl.constexpr = gl.constexpr(128)  # columns of V of one wgmma; 256 do not fit 128 registers
# Tiles in shared memory: 225 of its 227 KB. The left half is wanted earlier by half a tile-time.
LEFT: gl.constexpr = gl.constexpr(3)
RIGHT: gl.constexpr = gl.constexpr(2)


@gluon.constexpr_function
def gather_layout():
    """[KEYS, columns] in pieces of 128 bytes, 16 a lane: what the swizzled tile has as one row."""
    return gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])


@gluon.jit
def copy_rows(tile, rows, LAYOUT: gl.constexpr, real=None):
    """From pointers to rows; those that are not `real` become zero."""
    cols = gl.arange(0, tile.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    mask = None if real is None else real[:, None]
    copy(tile, rows[:, None] + cols[None, :], mask=mask)


@gluon.jit
def _look_up(table, start, hi, mask, PAGE_SIZE, MODE, LAYOUT: gl.constexpr):
    """As `cdna.look_up`; keys that the mask hides repeat the first that it does not."""
    if MODE == "masked":
        pos = cdna.positions(start, hi, KEYS, LAYOUT)
        bias, _ = bias_of(pos, mask)
        pos = gl.where(bias > mask[3], pos, mask[4].to(gl.uint32))
        at = (pos, pos)
    else:
        at = cdna.look_up(table, start, hi, PAGE_SIZE, KEYS, LAYOUT)
    return at


@gluon.jit
def _again(entries, start, hi, PAGE_SIZE, LAYOUT: gl.constexpr):
    """`at` of entries looked up before: positions cost more registers than they save."""
    if PAGE_SIZE == 0:
        at = (entries, entries)
    else:
        at = (cdna.positions(start, hi, KEYS, LAYOUT), entries)
    return at


@gluon.jit
def _fetch_left(rows, left, left_full, left_empty, g, LAYOUT: gl.constexpr, real=None):
    s, phase = turn(g, LEFT)
    mbarrier.wait(left_empty.index(s), phase ^ 1)
    copy_rows(left.index(s), rows, LAYOUT, real)
    async_copy.mbarrier_arrive(left_full.index(s), increment_count=False)


@gluon.jit
def load_query(queries, strides, block, N, ring, g, S: gl.constexpr):
    """The left half of q_nope in shared memory, the right half in registers: on its way there it
    takes a turn in the ring of keys."""
    Q: gl.constexpr = gl.DotOperandLayout(0, S, 2)
    C: gl.constexpr = gather_layout()
    q_nope_ptr, q_pe_ptr, q_smem, q_pe_smem = queries
    left, left_full, left_empty = ring
    stride_qt, stride_qn, stride_pt, stride_pn = strides
    token, head = cdna.rows_of(block, N, ROWS, gl.SliceLayout(1, C))
    query = block[1] + token
    head = head.to(gl.int64)
    # Rows past the end stay zero: repeated, 128 CTAs would ask L2 for the same line.
    real = None if N % ROWS == 0 else cdna.owned(block, N, ROWS, gl.SliceLayout(1, C))
    rows = q_nope_ptr + (query * stride_qt + head * stride_qn)
    _fetch_left(rows + HALF, left, left_full, left_empty, g, C, real)
    copy_rows(q_smem.index(0), rows, C, real)
    copy_rows(q_pe_smem.index(0), q_pe_ptr + (query * stride_pt + head * stride_pn), C, real)
    async_copy.commit_group()
    s, phase = turn(g, LEFT)
    mbarrier.wait(left_full.index(s), phase)
    q_right = left.index(s).slice(0, PART, dim=1).load(Q)
    q_last = left.index(s).slice(PART, PART, dim=1).load(Q)
    hand_on(left_empty.index(s))
    async_copy.wait_group(0)
    fence_async_shared()
    return q_right, q_last, q_pe_smem


@gluon.jit
def gather(job, CALL, ALIKE: gl.constexpr):
    C: gl.constexpr = gather_layout()
    PAGE_SIZE: gl.constexpr = CALL[1]
    MODE: gl.constexpr = CALL[3]
    work, caches, strides, mask, tiles, full, empty, begun = job
    if CHECKED:
        mbarrier.wait(begun, 0)
    begin, stop, step = work[0]
    lengths = work[2]
    kv_c_ptr, k_pe_ptr, table_ptr = caches
    stride_cp, stride_cs, stride_kp, stride_ks, stride_table = strides
    left, right, last, rope = tiles
    # In elements, 8 at a time: one set of pointers in registers serves both.
    apart = (k_pe_ptr.to(gl.int64) - kv_c_ptr.to(gl.int64)) // 16 * 8
    g = 0
    items = 0  # each has a query in the ring, before its keys
    key_begin = work[4]
    for i in range(begin, stop, step):
        _, keys = item(i, key_begin, work, CALL)
        key_begin = 0
        lo, hi, _, b, entry = keys
        table = table_ptr
        if PAGE_SIZE > 0:
            table += b * stride_table if lengths[0] is None else entry
        if lo < hi:
            at = _look_up(table, lo, hi, mask, PAGE_SIZE, MODE, C)
            items += 1
            entries = at[1]
            rows = cdna.keys_at(kv_c_ptr, at, b, stride_cp, stride_cs, PAGE_SIZE)
            _fetch_left(rows, left, full[0], empty[0], g + items, C)
            for start in range(lo, hi, KEYS):
                s, phase = turn(g, RIGHT)
                then = start + KEYS
                at_then = _look_up(table, then, hi, mask, PAGE_SIZE, MODE, C)
                mbarrier.wait(empty[1].index(s), phase ^ 1)
                copy_rows(right.index(s), rows + HALF, C)
                async_copy.mbarrier_arrive(full[1].index(s), increment_count=False)
                mbarrier.wait(empty[2].index(s), phase ^ 1)
                copy_rows(last.index(s), rows + (HALF + PART), C)
                if ALIKE:
                    rows += apart
                else:
                    at = _again(entries, start, hi, PAGE_SIZE, C)
                    rows = cdna.keys_at(k_pe_ptr, at, b, stride_kp, stride_ks, PAGE_SIZE)
                copy_rows(rope.index(s), rows, C)
                async_copy.mbarrier_arrive(full[2].index(s), increment_count=False)
                entries = at_then[1]
                at = _again(entries, then, hi, PAGE_SIZE, C)
                rows = cdna.keys_at(kv_c_ptr, at, b, stride_cp, stride_cs, PAGE_SIZE)
                g += 1
                if then < hi:
                    _fetch_left(rows, left, full[0], empty[0], g + items, C)
