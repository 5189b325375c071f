"""What the Gluon kernels of CDNA3 and CDNA4 share: all but how a tile moves through LDS.

They compute what `split` does and write the same (out, m, l), for the common case alone: latents of
512 + 64 in two bytes, no mask, no soft cap, no scales (see config.covered). A workgroup owns
BLOCK_M rows and one split. QK^T is divided among the waves over rows, and what is left of them over
keys; PV over the columns of V, so that no two waves read the same part of the V tile: P and alpha go
through LDS instead.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LKV: gl.constexpr = gl.constexpr(512)
R: gl.constexpr = gl.constexpr(64)
LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)
LN2: gl.constexpr = gl.constexpr(0.6931471805599453)
XCDS: gl.constexpr = gl.constexpr(8)  # dies of an MI300 or MI350, each with an L2 of its own
MFMA: gl.constexpr = gl.constexpr(16)  # rows and columns of a matrix instruction


@gluon.constexpr_function
def score_layout(version, block_m, num_warps):
    """[BLOCK_M, BLOCK_N] of scores: waves over rows first, over keys with what is left of them."""
    over_rows = min(block_m // 16, num_warps)
    return gl.amd.AMDMFMALayout(
        version=version,
        instr_shape=[16, 16, 16 if version == 3 else 32],
        transposed=True,
        warps_per_cta=[over_rows, num_warps // over_rows],
    )


@gluon.constexpr_function
def out_layout(version, num_warps):
    """[BLOCK_M, LKV] of the accumulator: waves over columns."""
    return gl.amd.AMDMFMALayout(
        version=version,
        instr_shape=[16, 16, 16 if version == 3 else 32],
        transposed=True,
        warps_per_cta=[1, num_warps],
    )


@gluon.constexpr_function
def tile_layout(width, num_warps):
    """[keys, width] in memory: 16 bytes a lane, 1 KB of consecutive columns or rows a wave."""
    lanes = min(width // 8, 64)
    return gl.BlockedLayout([1, 8], [64 // lanes, lanes], [num_warps, 1], [1, 0])


@gluon.jit
def claim(
    starts_ptr,
    lens_ptr,
    qo_indptr_ptr,
    max_seqlen_q,
    page_size,
    num_splits,
    num_programs,
    N: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    CAUSAL: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """This program's b, first row, split, queries (q_start, sq), kv_len, first table entry and keys
    lo..hi; hi <= lo where there is nothing to do."""
    # Programs are dealt round robin to the XCDs; what shares keys should share an L2.
    pid = gl.program_id(0)
    xcd = pid % XCDS
    pid = xcd * (num_programs // XCDS) + gl.minimum(xcd, num_programs % XCDS) + pid // XCDS

    row_blocks = gl.cdiv(max_seqlen_q * N, BLOCK_M)
    row = pid % row_blocks * BLOCK_M
    split = pid // row_blocks % num_splits
    b = (pid // row_blocks // num_splits).to(gl.int64)

    if qo_indptr_ptr is None:
        sq = max_seqlen_q
        q_start = b * max_seqlen_q
    else:
        q_start = gl.load(qo_indptr_ptr + b).to(gl.int64)
        sq = (gl.load(qo_indptr_ptr + b + 1) - q_start).to(gl.int32)

    entry = b * 0
    if starts_ptr is None:
        kv_len = page_size if lens_ptr is None else gl.load(lens_ptr + b).to(gl.int32)
    else:
        entry = gl.load(starts_ptr + b).to(gl.int64)
        pages = (gl.load(starts_ptr + b + 1) - entry).to(gl.int32)
        last = gl.load(lens_ptr + b).to(gl.int32)
        kv_len = gl.where(pages > 0, (pages - 1) * PAGE_SIZE + last, 0)

    kv_end = kv_len
    if CAUSAL:
        last_token = (gl.minimum(row + BLOCK_M, sq * N) - 1) // N
        kv_end = gl.maximum(kv_len - sq + 1 + last_token, 0)
    span = gl.cdiv(gl.cdiv(kv_end, num_splits), BLOCK_N) * BLOCK_N
    lo = split * span
    hi = gl.minimum(lo + span, kv_end)
    hi = gl.where(row < sq * N, hi, lo)
    return b, row, split, q_start, sq, kv_len, entry, lo, hi


@gluon.jit
def split_rows(row, sq, N: gl.constexpr, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    """Token and head of the block's rows; rows past the end repeat the last."""
    rows = gl.minimum(row + gl.arange(0, BLOCK_M, layout=LAYOUT), sq * N - 1)
    return rows // N, rows % N


@gluon.jit
def load_query(ptr, row, q_start, sq, stride_t, stride_n, N, WIDTH, BLOCK_M, LAYOUT):
    """[BLOCK_M, WIDTH], straight into the registers of a matrix operand."""
    token, head = split_rows(row, sq, N, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    rows = (q_start + token) * stride_t + head.to(gl.int64) * stride_n
    cols = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    return gl.load(ptr + rows[:, None] + cols[None, :])


@gluon.jit
def read_table(table_ptr, pos, PAGE_SIZE: gl.constexpr):
    """Entries of keys `pos`, or `pos` where there is no table."""
    if table_ptr is None:
        entries = pos
    elif PAGE_SIZE == 1:
        entries = gl.load(table_ptr + pos)
    else:
        entries = gl.load(table_ptr + pos // PAGE_SIZE)
    return entries


@gluon.jit
def key_pointers(ptr, entries, pos, b, stride_p, stride_s, WIDTH, PAGED, PAGE_SIZE, LAYOUT):
    """[keys, WIDTH] pointers to keys `pos`, whose table entries are `entries`."""
    if not PAGED:
        rows = b * stride_p + pos.to(gl.int64) * stride_s
    elif PAGE_SIZE == 1:
        rows = entries.to(gl.int64) * stride_p
    else:
        rows = entries.to(gl.int64) * stride_p + (pos % PAGE_SIZE).to(gl.int64) * stride_s
    cols = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    return ptr + rows[:, None] + cols[None, :]


@gluon.jit
def hide(s, start, row, sq, kv_len, hi, N, CAUSAL, BLOCK_M, BLOCK_N, LAYOUT):
    """Scores of keys past the end, or later than a row's query, are -inf."""
    pos = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    visible = (pos < hi)[None, :]
    if CAUSAL:
        token, _ = split_rows(row, sq, N, BLOCK_M, gl.SliceLayout(1, LAYOUT))
        visible = visible & (pos[None, :] <= (token + (kv_len - sq))[:, None])
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def softmax(s, m_i, l_i, qk_scale, CAUSAL: gl.constexpr):
    """One step of the online softmax in powers of two: p, alpha and the new m_i, l_i."""
    m_new = gl.maximum(m_i, gl.max(s, 1) * qk_scale)
    base = m_new
    if CAUSAL:  # a row may have seen no key yet; -inf - -inf is NaN
        base = gl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = gl.exp2(m_i - base)
    p = gl.exp2(s * qk_scale - base[:, None])
    return p, alpha, m_new, l_i * alpha + gl.sum(p, 1)


@gluon.jit
def store_out(
    out_ptr,
    out,
    row,
    q_start,
    sq,
    split,
    stride_t,
    stride_n,
    stride_s,
    N: gl.constexpr,
    BLOCK_M: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    token, head = split_rows(row, sq, N, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    rows = (q_start + token) * stride_t + head.to(gl.int64) * stride_n
    rows += split.to(gl.int64) * stride_s
    cols = gl.arange(0, LKV, layout=gl.SliceLayout(0, LAYOUT))
    owned = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT)) < sq * N
    gl.store(
        out_ptr + rows[:, None] + cols[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=owned[:, None],
    )


@gluon.jit
def store_sums(
    lse_ptr,
    m_i,
    l_i,
    row,
    q_start,
    sq,
    split,
    num_splits,
    N: gl.constexpr,
    SPLIT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """lse, or (m, l) for `combine`."""
    token, head = split_rows(row, sq, N, BLOCK_M, LAYOUT)
    rows = (q_start + token) * N + head
    owned = row + gl.arange(0, BLOCK_M, layout=LAYOUT) < sq * N
    if SPLIT:
        part = lse_ptr + (rows * num_splits + split) * 2
        gl.store(part, m_i, mask=owned)
        gl.store(part + 1, l_i, mask=owned)
    else:
        lse = gl.where(l_i > 0, (m_i + gl.log2(l_i)) * LN2, float("-inf"))
        gl.store(lse_ptr + rows, lse, mask=owned)
