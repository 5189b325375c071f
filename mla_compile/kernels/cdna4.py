"""Stage 1 for CDNA4 (gfx950): tiles go from memory straight to LDS, two in turn.

LDS has room for two tiles of 64 keys. While one is worked on the next arrives, past the registers;
keys are read as they lie and values through the transposing LDS read that CDNA4 has.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd.cdna4 import async_copy

from mla_compile.kernels import cdna
from mla_compile.kernels.cdna import LKV, LOG2E, R

WIDE: gl.constexpr = gl.constexpr(8)  # elements of a 16-byte LDS read, keys of a lane in one MFMA
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # its name before Triton 3.7


@gluon.jit(do_not_specialize=["page_size", "num_splits", "num_programs", "stride_table"])
def cdna4_kernel(
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
    QK: gl.constexpr = cdna.score_layout(4, BLOCK_M, W)
    PV: gl.constexpr = cdna.out_layout(4, W)
    Q: gl.constexpr = gl.DotOperandLayout(0, QK, WIDE)
    K: gl.constexpr = gl.DotOperandLayout(1, QK, WIDE)
    P: gl.constexpr = gl.DotOperandLayout(0, PV, WIDE)
    V: gl.constexpr = gl.DotOperandLayout(1, PV, WIDE)
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

    kv_smem = gl.allocate_shared_memory(DTYPE, [2, BLOCK_N, LKV], gl.PaddedSharedLayout.with_identity_for([[512, 16]], [BLOCK_N, LKV], [1, 0]))
    pe_smem = gl.allocate_shared_memory(DTYPE, [2, BLOCK_N, R], gl.PaddedSharedLayout.with_identity_for([[512, 16]], [BLOCK_N, R], [1, 0]))
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
    async_copy.global_load_to_shared(kv_smem.index(0), cdna.key_pointers(kv_c_ptr, at_c, pos_c, b, stride_cp, stride_cs, LKV, PAGED, PAGE_SIZE, C))
    async_copy.global_load_to_shared(pe_smem.index(0), cdna.key_pointers(k_pe_ptr, at_e, pos_e, b, stride_kp, stride_ks, R, PAGED, PAGE_SIZE, E))
    async_copy.commit_group()
    pos_c = gl.minimum(lo + BLOCK_N + keys_c, hi - 1)
    pos_e = gl.minimum(lo + BLOCK_N + keys_e, hi - 1)
    at_c = cdna.read_table(table_ptr, pos_c, PAGE_SIZE)
    at_e = cdna.read_table(table_ptr, pos_e, PAGE_SIZE)
    now = 0
    for start in range(lo, hi, BLOCK_N):
        async_copy.wait_group(0)
        barrier()
        after_c = gl.minimum(start + 2 * BLOCK_N + keys_c, hi - 1)
        after_e = gl.minimum(start + 2 * BLOCK_N + keys_e, hi - 1)
        after_at_c = cdna.read_table(table_ptr, after_c, PAGE_SIZE)
        after_at_e = cdna.read_table(table_ptr, after_e, PAGE_SIZE)
        async_copy.global_load_to_shared(kv_smem.index(1 - now), cdna.key_pointers(kv_c_ptr, at_c, pos_c, b, stride_cp, stride_cs, LKV, PAGED, PAGE_SIZE, C))
        async_copy.global_load_to_shared(pe_smem.index(1 - now), cdna.key_pointers(k_pe_ptr, at_e, pos_e, b, stride_kp, stride_ks, R, PAGED, PAGE_SIZE, E))
        async_copy.commit_group()
        pos_c, pos_e, at_c, at_e = after_c, after_e, after_at_c, after_at_e
        s = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=QK)
        s = gl.amd.cdna3.mfma(q_pe, async_copy.load_shared_relaxed(pe_smem.index(now).permute([1, 0]), K), s)
        s = gl.amd.cdna3.mfma(q_nope, async_copy.load_shared_relaxed(kv_smem.index(now).permute([1, 0]), K), s)
        s = cdna.hide(s, start, row, sq, kv_len, hi, N, CAUSAL, BLOCK_M, BLOCK_N, QK)
        p, alpha, m_i, l_i = cdna.softmax(s, m_i, l_i, qk_scale, CAUSAL)
        p_smem.store(p.to(DTYPE))
        alpha_smem.store(alpha)
        barrier()
        acc *= alpha_smem.load(gl.SliceLayout(1, PV))[:, None]
        acc = gl.amd.cdna3.mfma(p_smem.load(P), async_copy.load_shared_relaxed(kv_smem.index(now), V), acc)
        now = 1 - now
    async_copy.wait_group(0)

    alpha_smem.store(1.0 / gl.where(l_i > 0, l_i, 1.0))
    acc *= alpha_smem.load(gl.SliceLayout(1, PV))[:, None]
    cdna.store_out(out_ptr, acc, row, q_start, sq, split, stride_ot, stride_on, stride_os, N, BLOCK_M, PV)
    cdna.store_sums(lse_ptr, m_i, l_i, row, q_start, sq, split, num_splits, N, SPLIT, BLOCK_M, ROWS)
