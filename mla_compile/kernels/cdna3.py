"""Stage 1 for CDNA3 (gfx942): one padded LDS tile is K and V, V is transposed in registers.

Rows of the tile come through registers, one tile ahead; LDS has room for one. Keys are read from it
as they lie. As values they are wanted transposed, which LDS here could only give two bytes at a
time; so each lane reads 16 bytes of 4 keys, and what it then holds is, register by register, the
operand of a matrix instruction for every 8th (of its wave's) column: the columns of the accumulator
are permuted and put in order, again without moving anything, before they are stored.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mla_compile.kernels import cdna
from mla_compile.kernels.cdna import LKV, LOG2E, MFMA, R

WIDE: gl.constexpr = gl.constexpr(8)  # elements of a 16-byte LDS read
DEEP: gl.constexpr = gl.constexpr(4)  # keys of a lane in one matrix instruction


@gluon.constexpr_function
def value_layout(block_n, num_warps):
    """[BLOCK_N, LKV] of V as read: registers, lanes and waves by the bits of (key, column)."""

    def keys(first, end):
        return [[1 << i, 0] for i in range(first, end)]

    def columns(first, end):
        return [[0, 1 << i] for i in range(first, end)]

    wave = 9 - (num_warps.bit_length() - 1)  # the first bit of the column that selects a wave
    return gl.DistributedLinearLayout(
        reg_bases=columns(0, wave - 4) + keys(0, 2) + keys(4, block_n.bit_length() - 1),
        lane_bases=columns(wave - 4, wave) + keys(2, 4),
        warp_bases=columns(wave, 9),
        block_bases=[],
        shape=[block_n, 512],
    )


@gluon.jit(do_not_specialize=["page_size", "num_splits", "num_programs", "stride_table"])
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
    sm_scale,
    max_seqlen_q,
    page_size,
    num_splits,
    num_programs,
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
):
    W: gl.constexpr = gl.num_warps()
    QK: gl.constexpr = cdna.score_layout(3, BLOCK_M, W)
    PV: gl.constexpr = cdna.out_layout(3, W)
    Q: gl.constexpr = gl.DotOperandLayout(0, QK, WIDE)
    K: gl.constexpr = gl.DotOperandLayout(1, QK, WIDE)
    P: gl.constexpr = gl.DotOperandLayout(0, PV, DEEP)
    V: gl.constexpr = gl.DotOperandLayout(1, PV, DEEP)
    ROWS: gl.constexpr = gl.SliceLayout(1, QK)
    C: gl.constexpr = cdna.tile_layout(LKV, W)
    E: gl.constexpr = cdna.tile_layout(R, W)
    DTYPE: gl.constexpr = kv_c_ptr.dtype.element_ty
    PAGED: gl.constexpr = table_ptr is not None

    b, row, split, q_start, sq, kv_len, entry, lo, hi = cdna.claim(
        starts_ptr,
        lens_ptr,
        qo_indptr_ptr,
        max_seqlen_q,
        page_size,
        num_splits,
        num_programs,
        N,
        PAGE_SIZE,
        CAUSAL,
        BLOCK_M,
        BLOCK_N,
    )
    m_i = gl.full([BLOCK_M], float("-inf"), gl.float32, layout=ROWS)
    l_i = gl.zeros([BLOCK_M], gl.float32, layout=ROWS)
    acc = gl.zeros([BLOCK_M, LKV], gl.float32, layout=PV)
    if hi <= lo:
        cdna.store_out(out_ptr, acc, row, q_start, sq, split, stride_ot, stride_on, stride_os, N, BLOCK_M, PV)
        cdna.store_sums(lse_ptr, m_i, l_i, row, q_start, sq, split, num_splits, N, SPLIT, BLOCK_M, ROWS)
        return
    if PAGED:
        table_ptr += entry if starts_ptr is not None else b * stride_table

    kv_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_N, LKV], gl.PaddedSharedLayout.with_identity_for([[LKV, WIDE]], [BLOCK_N, LKV], [1, 0]))
    pe_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_N, R], gl.PaddedSharedLayout.with_identity_for([[R, WIDE]], [BLOCK_N, R], [1, 0]))
    p_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_M, BLOCK_N], gl.PaddedSharedLayout.with_identity_for([[BLOCK_N, WIDE]], [BLOCK_M, BLOCK_N], [1, 0]))
    alpha_smem = gl.allocate_shared_memory(gl.float32, [BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))

    q_nope = cdna.load_query(q_nope_ptr, row, q_start, sq, stride_qt, stride_qn, N, LKV, BLOCK_M, Q)
    q_pe = cdna.load_query(q_pe_ptr, row, q_start, sq, stride_pt, stride_pn, N, R, BLOCK_M, Q)
    qk_scale = sm_scale * LOG2E

    keys_c = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, C))
    keys_e = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, E))
    pos_c = gl.minimum(lo + keys_c, hi - 1)
    pos_e = gl.minimum(lo + keys_e, hi - 1)
    at_c = cdna.read_table(table_ptr, pos_c, PAGE_SIZE)
    at_e = cdna.read_table(table_ptr, pos_e, PAGE_SIZE)
    kv = gl.load(cdna.key_pointers(kv_c_ptr, at_c, pos_c, b, stride_cp, stride_cs, LKV, PAGED, PAGE_SIZE, C))
    pe = gl.load(cdna.key_pointers(k_pe_ptr, at_e, pos_e, b, stride_kp, stride_ks, R, PAGED, PAGE_SIZE, E))
    pos_c = gl.minimum(lo + BLOCK_N + keys_c, hi - 1)
    pos_e = gl.minimum(lo + BLOCK_N + keys_e, hi - 1)
    at_c = cdna.read_table(table_ptr, pos_c, PAGE_SIZE)
    at_e = cdna.read_table(table_ptr, pos_e, PAGE_SIZE)
    for start in range(lo, hi, BLOCK_N):
        kv_smem.store(kv)
        pe_smem.store(pe)
        s = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=QK)
        s = gl.amd.cdna3.mfma(q_pe, pe_smem.permute([1, 0]).load(K), s)
        s = gl.amd.cdna3.mfma(q_nope, kv_smem.permute([1, 0]).load(K), s)  # [BLOCK_M, BLOCK_N]
        s = cdna.hide(s, start, row, sq, kv_len, hi, N, CAUSAL, BLOCK_M, BLOCK_N, QK)
        p, alpha, m_i, l_i = cdna.softmax(s, m_i, l_i, qk_scale, CAUSAL)
        p_smem.store(p.to(DTYPE))
        alpha_smem.store(alpha)
        acc *= alpha_smem.load(gl.SliceLayout(1, PV))[:, None]
        v = kv_smem.load(value_layout(BLOCK_N, W))  # [BLOCK_N, LKV]
        v = v.reshape([BLOCK_N, W, MFMA, LKV // (MFMA * W)]).permute([0, 3, 1, 2])
        v = gl.convert_layout(v.reshape([BLOCK_N, LKV]), V)
        acc = gl.amd.cdna3.mfma(p_smem.load(P), v, acc)  # [BLOCK_M, LKV], columns permuted as v's
        # The next tile is on its way while this one is still worked on, see SCHEDULE in config.
        kv = gl.load(cdna.key_pointers(kv_c_ptr, at_c, pos_c, b, stride_cp, stride_cs, LKV, PAGED, PAGE_SIZE, C))
        pe = gl.load(cdna.key_pointers(k_pe_ptr, at_e, pos_e, b, stride_kp, stride_ks, R, PAGED, PAGE_SIZE, E))
        pos_c = gl.minimum(start + 2 * BLOCK_N + keys_c, hi - 1)
        pos_e = gl.minimum(start + 2 * BLOCK_N + keys_e, hi - 1)
        at_c = cdna.read_table(table_ptr, pos_c, PAGE_SIZE)
        at_e = cdna.read_table(table_ptr, pos_e, PAGE_SIZE)

    alpha_smem.store(1.0 / gl.where(l_i > 0, l_i, 1.0))
    acc *= alpha_smem.load(gl.SliceLayout(1, PV))[:, None]
    out = acc.reshape([BLOCK_M, LKV // (MFMA * W), W, MFMA]).permute([0, 2, 3, 1]).reshape([BLOCK_M, LKV])
    OUT: gl.constexpr = out.type.layout
    cdna.store_out(out_ptr, out, row, q_start, sq, split, stride_ot, stride_on, stride_os, N, BLOCK_M, OUT)
    cdna.store_sums(lse_ptr, m_i, l_i, row, q_start, sq, split, num_splits, N, SPLIT, BLOCK_M, ROWS)
