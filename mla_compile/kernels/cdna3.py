"""Stage 1 for CDNA3 (gfx942): one LDS tile is K and V, and V is transposed in registers.

LDS has room for one tile of 64 + 512 columns; the next waits in registers. Q · Kᵀ reads it as it
lies. P · V wants it transposed, which LDS here can give only two bytes at a time. So each lane
reads 16 bytes of each of 4 keys, and takes what it then holds for the operand of 8 matrix
instructions: their columns are 8 apart in V. The columns of the accumulator are permuted likewise,
and are put in order, by renaming registers alone, when it is stored.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import mla_compile.kernels.cdna as cdna
from mla_compile.kernels.cdna import LKV, LOG2E, LOWEST, WIDE, R
from mla_compile.kernels.walk import walk

DEEP: gl.constexpr = gl.constexpr(4)  # keys of a lane in one matrix instruction
MFMA: gl.constexpr = gl.constexpr(16)  # its columns


@gluon.constexpr_function
def value_layout(block_n, num_warps):
    """[BLOCK_N, LKV] of V as read: the bit of key or column of each register, lane and wave bit."""

    def keys(first, end):
        return [[1 << i, 0] for i in range(first, end)]

    def columns(first, end):
        return [[0, 1 << i] for i in range(first, end)]

    waves = 9 - (num_warps.bit_length() - 1)  # from this bit on columns go to different waves
    return gl.DistributedLinearLayout(
        reg_bases=columns(0, waves - 4) + keys(0, 2) + keys(4, block_n.bit_length() - 1),
        lane_bases=columns(waves - 4, waves) + keys(2, 4),
        warp_bases=columns(waves, 9),
        block_bases=[],
        shape=[block_n, 512],
    )


@gluon.jit
def _attend(block, keys, queries, caches, sm_scale, CALL: gl.constexpr):
    """Output, maxima and sums of a block that has keys."""
    N: gl.constexpr = CALL[1]
    PAGE_SIZE: gl.constexpr = CALL[2]
    CAUSAL: gl.constexpr = CALL[3]
    BLOCK_M: gl.constexpr = CALL[5]
    BLOCK_N: gl.constexpr = CALL[6]
    W: gl.constexpr = gl.num_warps()
    DTYPE: gl.constexpr = caches[0].dtype.element_ty
    C: gl.constexpr = cdna.tile_layout(LKV, W)  # of kv_c, in memory
    E: gl.constexpr = cdna.tile_layout(R, W)  # of k_pe, in memory
    S: gl.constexpr = cdna.score_layout(3, BLOCK_M, W)  # of scores
    A: gl.constexpr = cdna.out_layout(3, W)  # of the accumulator
    ROWS: gl.constexpr = gl.SliceLayout(1, S)
    WAVES: gl.constexpr = cdna.key_waves(BLOCK_M, BLOCK_N, W)
    Q: gl.constexpr = gl.DotOperandLayout(0, S, WIDE)
    K: gl.constexpr = gl.DotOperandLayout(1, S, WIDE)
    P: gl.constexpr = gl.DotOperandLayout(0, A, DEEP)
    V: gl.constexpr = gl.DotOperandLayout(1, A, DEEP)

    lo, hi, _, b, entry = keys
    q_nope_ptr, q_pe_ptr, q_strides = queries
    stride_qt, stride_qn, stride_pt, stride_pn = q_strides
    kv_c_ptr, k_pe_ptr, table_ptr, starts_ptr, kv_strides = caches
    stride_cp, stride_cs, stride_kp, stride_ks, stride_table = kv_strides
    if PAGE_SIZE > 0:
        table_ptr += b * stride_table if starts_ptr is None else entry
    m_i = gl.full([BLOCK_M], LOWEST, gl.float32, layout=ROWS)
    l_i = cdna.wave_sums(gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=S), WAVES)
    acc = gl.zeros([BLOCK_M, LKV], gl.float32, layout=A)
    q_nope = cdna.load_query(q_nope_ptr, block, stride_qt, stride_qn, N, BLOCK_M, LKV, Q)
    q_pe = cdna.load_query(q_pe_ptr, block, stride_pt, stride_pn, N, BLOCK_M, R, Q)
    qk_scale = sm_scale * LOG2E
    all_see = cdna.seen_by_all(block, keys, N, CAUSAL)

    kv_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_N, LKV], cdna.padded(BLOCK_N, LKV, LKV, WIDE))
    pe_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_N, R], cdna.padded(BLOCK_N, R, R, WIDE))
    p_smem = gl.allocate_shared_memory(
        DTYPE, [BLOCK_M, BLOCK_N], cdna.padded(BLOCK_M, BLOCK_N, BLOCK_N, WIDE)
    )
    row_smem = gl.allocate_shared_memory(
        gl.float32, [BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    max_smem = gl.allocate_shared_memory(
        gl.float32, [BLOCK_M, WAVES], gl.SwizzledSharedLayout(1, 1, 1, [0, 1])
    )

    entries_c = cdna.entries_of(table_ptr, lo, hi, PAGE_SIZE, BLOCK_N, C)
    entries_e = cdna.entries_of(table_ptr, lo, hi, PAGE_SIZE, BLOCK_N, E)
    at_c = cdna.positions(lo, hi, BLOCK_N, C), entries_c
    kv = gl.load(cdna.tile_at(kv_c_ptr, at_c, b, stride_cp, stride_cs, PAGE_SIZE, LKV, C))
    at_e = cdna.positions(lo, hi, BLOCK_N, E), entries_e
    pe = gl.load(cdna.tile_at(k_pe_ptr, at_e, b, stride_kp, stride_ks, PAGE_SIZE, R, E))
    entries_c = cdna.entries_of(table_ptr, lo + BLOCK_N, hi, PAGE_SIZE, BLOCK_N, C)
    entries_e = cdna.entries_of(table_ptr, lo + BLOCK_N, hi, PAGE_SIZE, BLOCK_N, E)
    for start in range(lo, hi, BLOCK_N):
        kv_smem.store(kv)
        pe_smem.store(pe)
        s = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=S)
        s = gl.amd.cdna3.mfma(q_pe, pe_smem.permute([1, 0]).load(K), s)
        s = gl.amd.cdna3.mfma(q_nope, kv_smem.permute([1, 0]).load(K), s)
        v = kv_smem.load(value_layout(BLOCK_N, W))  # [BLOCK_N, LKV]

        at_c = cdna.positions(start + BLOCK_N, hi, BLOCK_N, C), entries_c
        kv = gl.load(cdna.tile_at(kv_c_ptr, at_c, b, stride_cp, stride_cs, PAGE_SIZE, LKV, C))
        at_e = cdna.positions(start + BLOCK_N, hi, BLOCK_N, E), entries_e
        pe = gl.load(cdna.tile_at(k_pe_ptr, at_e, b, stride_kp, stride_ks, PAGE_SIZE, R, E))
        entries_c = cdna.entries_of(table_ptr, start + 2 * BLOCK_N, hi, PAGE_SIZE, BLOCK_N, C)
        entries_e = cdna.entries_of(table_ptr, start + 2 * BLOCK_N, hi, PAGE_SIZE, BLOCK_N, E)

        if start + BLOCK_N > all_see:
            s = cdna.hide(s, start, block, keys, N, CAUSAL, BLOCK_M, BLOCK_N, S)
        p, alpha, m_i, l_i = cdna.softmax(s, m_i, l_i, qk_scale, max_smem, WAVES)
        p_smem.store(p.to(DTYPE))
        row_smem.store(alpha)
        acc *= row_smem.load(gl.SliceLayout(1, A))[:, None]
        v = v.reshape([BLOCK_N, W, MFMA, LKV // (W * MFMA)]).permute([0, 3, 1, 2])
        v = gl.convert_layout(v.reshape([BLOCK_N, LKV]), V)
        acc = gl.amd.cdna3.mfma(p_smem.load(P), v, acc)  # [BLOCK_M, LKV]

    total = gl.convert_layout(gl.sum(l_i, 1), ROWS)
    row_smem.store(1.0 / gl.where(total > 0, total, 1.0))
    acc *= row_smem.load(gl.SliceLayout(1, A))[:, None]
    acc = acc.reshape([BLOCK_M, LKV // (W * MFMA), W, MFMA]).permute([0, 2, 3, 1])
    out = acc.reshape([BLOCK_M, LKV])
    return out, m_i, total


@gluon.jit(
    do_not_specialize=["page_size", "num_splits", "num_programs", "num_items", "stride_table"]
)
def cdna3_kernel(
    q_nope_ptr,  # [T, N, LKV]
    q_pe_ptr,  # [T, N, R]
    kv_c_ptr,  # [pages, page_size, LKV]
    k_pe_ptr,  # [pages, page_size, R]
    out_ptr,  # [T, N, LKV], or fp32 [T, N, num_splits, LKV] if SPLIT
    lse_ptr,  # [T, N], or (m, l) as [T, N, num_splits, 2] if SPLIT
    table_ptr,  # None: sequence b owns page b
    starts_ptr,  # [B+1] of a CSR table, else None
    lens_ptr,  # [B], or None: page_size tokens each
    qo_indptr_ptr,  # [B+1], or None: max_seqlen_q tokens each
    mask_ptr,  # None, as the scales: a call with one goes to `split`
    q_scale_ptr,
    k_scale_ptr,
    part_out_ptr,  # fp32 [2 * groups, row blocks, BLOCK_M, LKV] of a `schedule`, else None
    part_ml_ptr,  # (m, l) as [2 * groups, row blocks, BLOCK_M, 2], then `schedule`'s cuts
    sm_scale,
    max_seqlen_q,
    page_size,
    num_splits,
    num_programs,
    num_items,
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
    N: gl.constexpr,
    PAGE_SIZE: gl.constexpr,  # page_size, or 0 where no table is read
    CAUSAL: gl.constexpr,
    SPLIT: gl.constexpr,  # the KV is split: write what `combine` merges
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_B: gl.constexpr,  # a power of two, from `num_items` on where that counts sequences
):
    queries = (q_nope_ptr, q_pe_ptr, (stride_qt, stride_qn, stride_pt, stride_pn))
    strides = (stride_cp, stride_cs, stride_kp, stride_ks, stride_table)
    caches = (kv_c_ptr, k_pe_ptr, table_ptr, starts_ptr, strides)
    lengths = (starts_ptr, lens_ptr, qo_indptr_ptr, max_seqlen_q, page_size)
    outs = (out_ptr, part_out_ptr, (stride_ot, stride_on, stride_os))
    sums = (lse_ptr, part_ml_ptr)
    sizes = (num_splits, num_programs, num_items)
    CALL: gl.constexpr = (3, N, PAGE_SIZE, CAUSAL, SPLIT, BLOCK_M, BLOCK_N, BLOCK_B)
    walk(_attend, queries, caches, lengths, outs, sums, sizes, sm_scale, CALL)
