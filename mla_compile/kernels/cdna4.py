"""Stage 1 for CDNA4 (gfx950): tiles go from memory straight to LDS, two in turn.

While one tile is worked on the next arrives, without passing through registers. Q · Kᵀ reads it as
it lies, P · V by the transposing LDS read of CDNA4.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.amd.cdna4 import async_copy

import mla_compile.kernels.cdna as cdna
from mla_compile.kernels.cdna import LKV, LOG2E, LOWEST, WIDE, R
from mla_compile.kernels.walk import walk

# LLVM up to Triton 3.7 counts direct-to-LDS loads among LDS accesses, and so waits too little for
# LDS reads before them (llvm-project#179305; the emulator found it). So no read may come before.
MISCOUNTS: gl.constexpr = gl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8))


@gluon.jit
def fence(x):
    """No memory access is moved across it. It takes a scalar, as assembly must, and no time."""
    gl.inline_asm_elementwise("", "=s,0", [x], dtype=x.dtype, is_pure=False, pack=1)


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
    S: gl.constexpr = cdna.score_layout(4, BLOCK_M, W)  # of scores
    A: gl.constexpr = cdna.out_layout(4, W)  # of the accumulator
    ROWS: gl.constexpr = gl.SliceLayout(1, S)
    WAVES: gl.constexpr = cdna.key_waves(BLOCK_M, BLOCK_N, W)
    Q: gl.constexpr = gl.DotOperandLayout(0, S, WIDE)
    K: gl.constexpr = gl.DotOperandLayout(1, S, WIDE)
    P: gl.constexpr = gl.DotOperandLayout(0, A, WIDE)
    V: gl.constexpr = gl.DotOperandLayout(1, A, WIDE)

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

    # A wave writes 1 KB at a time, so only what one write holds can be kept apart.
    kv_smem = gl.allocate_shared_memory(
        DTYPE, [2, BLOCK_N, LKV], cdna.padded(BLOCK_N, LKV, 512, 16)
    )
    pe_smem = gl.allocate_shared_memory(DTYPE, [2, BLOCK_N, R], cdna.padded(BLOCK_N, R, 512, 16))
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
    kv = cdna.tile_at(kv_c_ptr, at_c, b, stride_cp, stride_cs, PAGE_SIZE, LKV, C)
    at_e = cdna.positions(lo, hi, BLOCK_N, E), entries_e
    pe = cdna.tile_at(k_pe_ptr, at_e, b, stride_kp, stride_ks, PAGE_SIZE, R, E)
    async_copy.global_load_to_shared(kv_smem.index(0), kv)
    async_copy.global_load_to_shared(pe_smem.index(0), pe)
    async_copy.commit_group()
    entries_c = cdna.entries_of(table_ptr, lo + BLOCK_N, hi, PAGE_SIZE, BLOCK_N, C)
    entries_e = cdna.entries_of(table_ptr, lo + BLOCK_N, hi, PAGE_SIZE, BLOCK_N, E)
    now = 0
    for start in range(lo, hi, BLOCK_N):
        async_copy.wait_group(0)
        cdna.barrier()
        at_c = cdna.positions(start + BLOCK_N, hi, BLOCK_N, C), entries_c
        kv = cdna.tile_at(kv_c_ptr, at_c, b, stride_cp, stride_cs, PAGE_SIZE, LKV, C)
        at_e = cdna.positions(start + BLOCK_N, hi, BLOCK_N, E), entries_e
        pe = cdna.tile_at(k_pe_ptr, at_e, b, stride_kp, stride_ks, PAGE_SIZE, R, E)
        async_copy.global_load_to_shared(kv_smem.index(1 - now), kv)
        async_copy.global_load_to_shared(pe_smem.index(1 - now), pe)
        async_copy.commit_group()
        if MISCOUNTS:
            fence(start)

        k = async_copy.load_shared_relaxed(kv_smem.index(now).permute([1, 0]), K)
        k_pe = async_copy.load_shared_relaxed(pe_smem.index(now).permute([1, 0]), K)
        s = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=S)
        s = gl.amd.cdna3.mfma(q_pe, k_pe, s)
        s = gl.amd.cdna3.mfma(q_nope, k, s)
        if start + BLOCK_N > all_see:
            s = cdna.hide(s, start, block, keys, N, CAUSAL, BLOCK_M, BLOCK_N, S)
        p, alpha, m_i, l_i = cdna.softmax(s, m_i, l_i, qk_scale, max_smem, WAVES)
        p_smem.store(p.to(DTYPE))
        row_smem.store(alpha)
        cdna.barrier()
        entries_c = cdna.entries_of(table_ptr, start + 2 * BLOCK_N, hi, PAGE_SIZE, BLOCK_N, C)
        entries_e = cdna.entries_of(table_ptr, start + 2 * BLOCK_N, hi, PAGE_SIZE, BLOCK_N, E)
        acc *= row_smem.load(gl.SliceLayout(1, A))[:, None]
        v = async_copy.load_shared_relaxed(kv_smem.index(now), V)  # [BLOCK_N, LKV]
        acc = gl.amd.cdna3.mfma(p_smem.load(P), v, acc)  # [BLOCK_M, LKV]
        now = 1 - now
    async_copy.wait_group(0)

    total = gl.convert_layout(gl.sum(l_i, 1), ROWS)
    row_smem.store(1.0 / gl.where(total > 0, total, 1.0))
    acc *= row_smem.load(gl.SliceLayout(1, A))[:, None]
    return acc, m_i, total


@gluon.jit(
    do_not_specialize=["page_size", "num_splits", "num_programs", "num_items", "stride_table"]
)
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
    CALL: gl.constexpr = (4, N, PAGE_SIZE, CAUSAL, SPLIT, BLOCK_M, BLOCK_N, BLOCK_B)
    walk(_attend, queries, caches, lengths, outs, sums, sizes, sm_scale, CALL)
