"""Stage 1 for Hopper (sm90): four warpgroups, each with one job.

    scores   S = Q · Kᵀ and its softmax; hands P and the fading of each row on in shared memory
    values   two of them: acc = acc · fade + P · V, each for half of the columns
    gather   copies keys from wherever their pages lie, a tile or two ahead

They compute what `split` does and write the same out, m and l, for the common case alone:
`config.uncovered` is the list of what they leave to it. A tile of keys lies in shared memory once:
transposed it is K, as it lies it is V. Its columns arrive and are released in three parts, as the
warpgroups need them. A CTA works through items (row block, split, sequence) one after another, so
that the keys of the next are on their way while the last is written out. Where the lengths are the
device's secret, `schedule` says which: sequences, of which the first and the last may be cut.

A row's m moves only when its scores outgrow it by 2^8: `fade` is 1 nearly always, and a warp whose
rows all keep theirs multiplies nothing.

No wgmma may be in flight where a loop begins again: ptxas would serialise every one of them.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents

import mla_compile.kernels.cdna as cdna
import mla_compile.kernels.hopper as hopper
import mla_compile.kernels.schedule as schedule
from mla_compile.kernels.cdna import LKV, LOG2E, R
from mla_compile.kernels.gather import HALF, LEFT, PART, RIGHT, gather, load_query
from mla_compile.kernels.hopper import ARRIVALS, CHECKED, KEYS, ROWS
from mla_compile.kernels.split import HIDDEN

LAG: gl.constexpr = gl.constexpr(8.0)  # powers of two by which scores may outgrow m
UNSEEN: gl.constexpr = gl.constexpr(-3.3e38)  # m before the first key: -inf - -inf is NaN
# Registers a thread of values, and of gather; scores has what is left of 512. With 32 for gather
# Triton 3.9 spills in the loop of scores, with 24 in that of gather where it reads a mask. Before
# 3.9 24 take up to 1 % longer.
VALUES: gl.constexpr = gl.constexpr(160)
GATHER_MASKED: gl.constexpr = gl.constexpr(32)
SCORES_CHECKED: gl.constexpr = gl.constexpr(168)  # what is left is 24, for gather
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
GATHER: gl.constexpr = gl.constexpr(32 if TRITON < (3, 9) else 24)


@gluon.jit
def _score_left(acc, q, left, left_full, g):
    k = left.index(hopper.arrived(left_full, g, LEFT)).permute((1, 0))
    return warpgroup_mma(q.index(hopper.opaque(0)), k, acc, use_acc=False, is_async=True)


@gluon.jit
def _score_right(acc, q, tiles, full, g):
    q_right, q_last, q_pe = q
    _, right, last, rope = tiles
    _, right_full, last_full = full
    s = hopper.arrived(right_full, g, RIGHT)
    acc = warpgroup_mma(q_right, right.index(s).permute((1, 0)), acc, is_async=True)
    s = hopper.arrived(last_full, g, RIGHT)
    acc = warpgroup_mma(q_last, last.index(s).permute((1, 0)), acc, is_async=True)
    k = rope.index(s).permute((1, 0))
    return warpgroup_mma(q_pe.index(hopper.opaque(0)), k, acc, is_async=True)


@gluon.jit
def _softmax(s, m_i, l_i, p_smem, fade_smem, p_full, p_empty, g):
    """One online step in powers of two. P is handed on as soon as it is there, summed later."""
    top = gl.max(s, 1)
    m_new = gl.where(top > m_i + LAG, top, m_i)
    fade = hopper.exp2(m_i - m_new)
    p = hopper.exp2(s - m_new[:, None])
    mbarrier.wait(p_empty, (g & 1) ^ 1)
    p_smem.store(p.to(p_smem.dtype))
    fade_smem.store(fade)
    fence_async_shared()
    hopper.hand_on(p_full)
    return m_new, l_i * fade, p


@gluon.jit
def _scores(job, CALL, SPLIT):
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    N: gl.constexpr = CALL[0]
    CAUSAL: gl.constexpr = CALL[2]
    MODE: gl.constexpr = CALL[3]
    # With whole blocks of one token's heads, `hi` is where the causal diagonal passes.
    DIAGONAL: gl.constexpr = CAUSAL and N % ROWS != 0
    work, queries, strides, scale, mask, sums, tiles, full, empty, shared = job
    begin, stop, step = work[0]
    lse_ptr, part_ml_ptr = sums
    q_smem = queries[2]
    if CHECKED:
        hopper.begin(full, empty, shared)
    p_smem, fade_smem, sum_smem, p_full, p_empty, scored, sum_full, _begun = shared
    g = 0
    turn = 0
    key_begin = work[4]
    for i in range(begin, stop, step):
        block, keys = hopper.item(i, key_begin, work, CALL)
        key_begin = 0
        lo, hi, _, _, _ = keys
        m_i = gl.full([ROWS], UNSEEN, gl.float32, ROW)
        l_i = gl.zeros([ROWS], gl.float32, ROW)
        if lo < hi:
            ring = (tiles[0], full[0], empty[0])
            q = load_query(queries, strides, block, N, ring, g + turn, S)
            turn += 1
            acc = gl.zeros([ROWS, KEYS], gl.float32, S)
            acc = _score_left(acc, q_smem, tiles[0], full[0], g + turn)
            acc = _score_right(acc, q, tiles, full, g)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(scored, count=1)
            end = lo + (hi - 1 - lo) // KEYS * KEYS  # where the last tile starts
            for start in range(lo, end, KEYS):
                s = acc * scale
                acc = _score_left(acc, q_smem, tiles[0], full[0], g + turn + 1)
                if MODE == "masked":
                    s = hopper.apply_mask(s, start, hi, mask, S)
                if DIAGONAL:
                    s = cdna.hide(s, start, block, keys, N, CAUSAL, ROWS, KEYS, S)
                m_i, l_i, p = _softmax(s, m_i, l_i, p_smem, fade_smem, p_full, p_empty, g)
                acc = _score_right(acc, q, tiles, full, g + 1)
                l_i += gl.sum(p, 1)
                g += 1
                acc = warpgroup_mma_wait(0, deps=[acc])
                mbarrier.arrive(scored, count=1)
            s = acc * scale
            if MODE == "masked":
                s = hopper.apply_mask(s, end, hi, mask, S)
            s = cdna.hide(s, end, block, keys, N, DIAGONAL, ROWS, KEYS, S)
            m_i, l_i, p = _softmax(s, m_i, l_i, p_smem, fade_smem, p_full, p_empty, g)
            l_i += gl.sum(p, 1)
            g += 1
            sum_smem.index(turn & 1).store(l_i)
            hopper.hand_on(sum_full.index(turn & 1))
        m_i = gl.where(l_i > 0, m_i, float("-inf"))
        if MODE != "even":
            cdna.store_sums(lse_ptr, m_i, l_i, block, work[1], N, SPLIT, ROWS, ROW)
        elif block[3] < 0:
            cdna.store_sums(lse_ptr, m_i, l_i, block, 1, N, False, ROWS, ROW)
        else:
            part = schedule.part_at(part_ml_ptr, block, work[2][3], N, ROWS, 2)
            cdna.store_sums(part, m_i, l_i, schedule.alone(block), 1, N, True, ROWS, ROW)


@gluon.jit
def _store(ptr, acc0, acc1, block, strides, N, num_splits, TILED, A: gl.constexpr):
    if TILED:
        hopper.store_tiles(ptr, acc0, block, N, num_splits)
        hopper.store_tiles(ptr + 16 * PART, acc1, block, N, num_splits)
    elif ptr.dtype.element_ty == gl.float32:
        cdna.store_out(ptr, acc0, block, strides, N, ROWS, A)
        cdna.store_out(ptr + PART, acc1, block, strides, N, ROWS, A)
    else:
        hopper.store_out(ptr, acc0, block, strides, N)
        hopper.store_out(ptr + PART, acc1, block, strides, N)


@gluon.jit
def _values(work, CALL, outs, strides, tiles, shared, STAGES, WHOLE, TILED: gl.constexpr):
    """Two accumulators of PART columns. WHOLE: both have their V in one tile, released at once.

    That one begins when the next tile's scores are there: if all three warpgroups were at the
    tensor cores at once, the scores, for which the next tile waits, would come last.
    """
    A: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, A)
    N: gl.constexpr = CALL[0]
    MODE: gl.constexpr = CALL[3]
    begin, stop, step = work[0]
    out_ptr, part_out_ptr = outs
    v, v_empty = tiles
    p_smem, fade_smem, sum_smem, p_full, p_empty, scored, sum_full, begun = shared
    g = 0
    turn = 0
    if CHECKED:
        hopper.hand_on(begun)
        mbarrier.wait(begun, 0)
    key_begin = work[4]
    for i in range(begin, stop, step):
        block, keys = hopper.item(i, key_begin, work, CALL)
        key_begin = 0
        lo, hi = keys[0], keys[1]
        acc0 = gl.zeros([ROWS, PART], gl.float32, A)
        acc1 = gl.zeros([ROWS, PART], gl.float32, A)
        if lo < hi:
            turn += 1
        for start in range(lo, hi, KEYS):
            s, _ = hopper.turn(g + turn if WHOLE else g, STAGES)
            mbarrier.wait(p_full, g & 1)
            fade = fade_smem.load(ROW)
            acc0 = hopper.fade(acc0, fade)
            acc1 = hopper.fade(acc1, fade)
            if WHOLE and start + KEYS < hi:
                mbarrier.wait(scored, (g + 1) & 1)
            v0, v1 = v[0].index(s), v[1].index(s)
            if WHOLE:
                v0, v1 = v0.slice(0, PART, dim=1), v1.slice(PART, PART, dim=1)
            acc0 = warpgroup_mma(p_smem, v0, acc0, is_async=True)
            acc1 = warpgroup_mma(p_smem, v1, acc1, is_async=True)
            if WHOLE:
                acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
            else:
                acc0 = warpgroup_mma_wait(1, deps=[acc0])
                mbarrier.arrive(v_empty[0].index(s), count=1)
                acc1 = warpgroup_mma_wait(0, deps=[acc1])
            if WHOLE:  # in turns with the query, which is not read by wgmma
                hopper.hand_on(v_empty[1].index(s))
            else:
                mbarrier.arrive(v_empty[1].index(s), count=1)
            hopper.hand_on(p_empty)
            g += 1
        if lo < hi:
            mbarrier.wait(sum_full.index(turn & 1), turn - 1 >> 1 & 1)
            l_i = sum_smem.index(turn & 1).load(ROW)
            scale = 1.0 / gl.where(l_i > 0, l_i, 1.0)
            acc0 *= scale[:, None]
            acc1 *= scale[:, None]
        if MODE != "even":
            _store(out_ptr, acc0, acc1, block, strides, N, work[1], TILED, A)
        elif block[3] < 0:
            _store(out_ptr, acc0, acc1, block, strides, N, 1, False, A)
        else:
            part = schedule.part_at(part_out_ptr, block, work[2][3], N, ROWS, LKV)
            alone = schedule.alone(block)
            _store(part, acc0, acc1, alone, (N * LKV, LKV, 0), N, 1, TILED, A)


@gluon.jit
def _barriers(COUNT: gl.constexpr):
    return gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())


@gluon.jit(
    do_not_specialize=[
        "page_size",
        "num_splits",
        "num_items",
        "mask_columns",
        "stride_table",
        "stride_mb",
    ]
)
def sm90_kernel(
    q_nope_ptr,  # [T, N, LKV]
    q_pe_ptr,  # [T, N, R]
    kv_c_ptr,  # [pages, page_size, LKV]
    k_pe_ptr,  # [pages, page_size, R]
    out_ptr,  # [T, N, LKV], or fp32 parts if SPLIT: [T, N, num_splits, LKV], or TILED
    lse_ptr,  # [T, N], or (m, l) as [T, N, num_splits, 2] if SPLIT
    table_ptr,  # None: sequence b owns page b
    starts_ptr,  # [B+1] of a CSR table, else None
    lens_ptr,  # [B], or None: page_size tokens each
    qo_indptr_ptr,  # [B+1], or None: max_seqlen_q tokens each
    mask_ptr,  # [B, 1, 1, mask_columns] by strides over a dense cache, bool or float, or None
    q_scale_ptr,  # None, as the next: a call with one goes to `split`
    k_scale_ptr,
    part_out_ptr,  # of a `schedule`, fp32 [2 * groups, row blocks * ROWS, LKV] or TILED; else None
    part_ml_ptr,  # (m, l) as [2 * groups, row blocks, ROWS, 2], then `schedule`'s cuts
    sm_scale,
    mask_fill,
    max_seqlen_q,
    page_size,
    num_splits,
    num_items,
    mask_columns,
    stride_qt,
    stride_qn,
    stride_pt,
    stride_pn,
    stride_cp,
    stride_cs,
    stride_kp,
    stride_ks,
    stride_ot,
    stride_on,
    stride_os,
    stride_table,
    stride_mb,
    stride_ms,
    N: gl.constexpr,
    PAGE_SIZE: gl.constexpr,  # page_size, or 0 where no table is read
    CAUSAL: gl.constexpr,
    SPLIT: gl.constexpr,  # the KV is split: write what `combine` merges
    TILED: gl.constexpr,  # parts lie as `combine` says
    ALIKE: gl.constexpr,  # kv_c and k_pe have the same strides
    BLOCK_B: gl.constexpr,  # a power of two, from `num_items` on where that counts sequences
):
    gdc_launch_dependents()
    lengths = (starts_ptr, lens_ptr, qo_indptr_ptr, max_seqlen_q, page_size)
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    PARTS_HALF: gl.constexpr = 16 * HALF if TILED else HALF
    outs = (out_ptr, None), (out_ptr + PARTS_HALF, None)
    mask = (None, 0, 0, 0, 0)
    MODE: gl.constexpr = (
        "even" if part_out_ptr is not None else "masked" if mask_ptr is not None else "splits"
    )
    if MODE == "even":
        sequence_tiles = schedule.count_tiles(lengths, num_items, PAGE_SIZE, KEYS, BLOCK_B, 32)
        outs = (out_ptr, part_out_ptr), (out_ptr + HALF, part_out_ptr + PARTS_HALF)
    elif MODE == "masked":
        _, keys = cdna.item(pid, num_splits, lengths, N, PAGE_SIZE, CAUSAL, ROWS, KEYS)
        lo, hi, _, b, _ = keys
        hi = gl.minimum(hi, mask_columns)
        row_ptr = mask_ptr + b * stride_mb
        floor = HIDDEN + 0.0
        first, end = hopper.hull((row_ptr, stride_ms, mask_fill, floor, 0), lo, hi)
        if end == 0:  # finite fills alone: the plain average over them
            floor = float("-inf")
            first, end = hopper.hull((row_ptr, stride_ms, mask_fill, floor, 0), lo, hi)
        mask = (row_ptr, stride_ms, mask_fill, floor, first)
        work = ((pid, pid + 1, 1), num_splits, lengths, end, gl.minimum(first, end) // KEYS * KEYS)
    else:
        work = ((pid, num_items, programs), num_splits, lengths, 0, 0)

    DTYPE: gl.constexpr = kv_c_ptr.dtype.element_ty
    TILE: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_smem = gl.allocate_shared_memory(DTYPE, [1, ROWS, HALF], TILE)  # rings of one, see `opaque`
    q_pe_smem = gl.allocate_shared_memory(DTYPE, [1, ROWS, R], TILE)
    left = gl.allocate_shared_memory(DTYPE, [LEFT, KEYS, HALF], TILE)
    right = gl.allocate_shared_memory(DTYPE, [RIGHT, KEYS, PART], TILE)
    last = gl.allocate_shared_memory(DTYPE, [RIGHT, KEYS, PART], TILE)
    rope = gl.allocate_shared_memory(DTYPE, [RIGHT, KEYS, R], TILE)
    p_smem = gl.allocate_shared_memory(DTYPE, [ROWS, KEYS], TILE)
    fade_smem = gl.allocate_shared_memory(gl.float32, [ROWS], FLAT)
    sum_smem = gl.allocate_shared_memory(gl.float32, [2, ROWS], FLAT)

    left_full = _barriers(LEFT)
    left_empty = _barriers(LEFT)
    right_full = _barriers(RIGHT)
    right_empty = _barriers(RIGHT)
    last_full = _barriers(RIGHT)
    last_empty = _barriers(RIGHT)
    p_full = _barriers(1).index(0)
    p_empty = _barriers(1).index(0)
    scored = _barriers(1).index(0)
    sum_full = _barriers(2)
    begun = _barriers(1).index(0)
    full = (left_full, right_full, last_full)
    empty = (left_empty, right_empty, last_empty)
    shared = (p_smem, fade_smem, sum_smem, p_full, p_empty, scored, sum_full, begun)
    if CHECKED:
        mbarrier.init(begun, count=3 * ARRIVALS)  # `scores` and both `values`
    else:
        hopper.begin(full, empty, shared)

    if MODE == "even":
        items, ends = schedule.share(
            sequence_tiles, pid, programs, max_seqlen_q, num_items, part_ml_ptr, N, ROWS, KEYS
        )
        work = (items, 1, lengths, ends[1], ends[0])
    caches = (kv_c_ptr, k_pe_ptr, table_ptr)
    cache_strides = (stride_cp, stride_cs, stride_kp, stride_ks, stride_table)
    queries = (q_nope_ptr, q_pe_ptr, q_smem, q_pe_smem)
    strides = (stride_qt, stride_qn, stride_pt, stride_pn)
    out_strides = (stride_ot, stride_on, stride_os)
    tiles = (left, right, last, rope)
    near = (left, left), (left_empty, left_empty)
    far = (right, last), (right_empty, last_empty)
    sums = (lse_ptr, part_ml_ptr)
    CALL: gl.constexpr = (N, PAGE_SIZE, CAUSAL, MODE)
    scale = sm_scale * LOG2E
    scoring = (work, queries, strides, scale, mask, sums, tiles, full, empty, shared)
    gathering = (work, caches, cache_strides, mask, tiles, full, empty, begun)
    if CHECKED:
        gl.warp_specialize(
            [
                (gather, (gathering, CALL, ALIKE)),
                (_values, (work, CALL, outs[1], out_strides, far, shared, RIGHT, False, TILED)),
                (_values, (work, CALL, outs[0], out_strides, near, shared, LEFT, True, TILED)),
                (_scores, (scoring, CALL, SPLIT)),
            ],
            [4, 4, 4],
            [VALUES, VALUES, SCORES_CHECKED],
        )
    else:
        gl.warp_specialize(
            [
                (_scores, (scoring, CALL, SPLIT)),
                # This first: 1 % faster than after the other.
                (_values, (work, CALL, outs[1], out_strides, far, shared, RIGHT, False, TILED)),
                (_values, (work, CALL, outs[0], out_strides, near, shared, LEFT, True, TILED)),
                (gather, (gathering, CALL, ALIKE)),
            ],
            [4, 4, 4],
            [VALUES, VALUES, GATHER_MASKED if MODE == "masked" else GATHER],
        )
