"""Stage 2: merge the parts of every query row.

    m = max_i m_i,   l = Σ_i l_i · 2^(m_i - m),   out = Σ_i out_i · l_i · 2^(m_i - m) / l

A part with l_i = 0 and out_i = 0 is the identity. If all are, out = 0 and lse = -inf. Parts are the
splits of a row, equally many everywhere, or what a `schedule` cut its sequence into: none where it
was not cut, whose out is in place.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _cut_of(b, part_ml_ptr, qo_indptr_ptr, max_seqlen_q, num_slots, N, ROWS: tl.constexpr):
    """Parts of sequence b, their first slot, its first row in [T, N] and the number of its rows."""
    cut_ptr = part_ml_ptr + num_slots * (2 * ROWS) + b * 2
    parts = tl.load(cut_ptr).to(tl.int32)
    slot = tl.load(cut_ptr + 1).to(tl.int64)
    if qo_indptr_ptr is None:
        q_start = b * max_seqlen_q
        sq = max_seqlen_q
    else:
        q_start = tl.load(qo_indptr_ptr + b).to(tl.int64)
        sq = (tl.load(qo_indptr_ptr + b + 1) - q_start).to(tl.int32)
    return parts, slot, q_start * N, sq * N


@triton.jit
def _apart(i, ROWS: tl.constexpr):
    """Rows between the first part of a sequence and its i-th. Of a group's two slots one is for
    what goes on from before, one for what begins in it."""
    return (2 * i - (i > 0)) * ROWS


@triton.jit
def _load(part_ml_ptr, part_out_ptr, part, real, cols, LKV: tl.constexpr):
    m = tl.load(part_ml_ptr + part * 2, mask=real, other=float("-inf"))
    l = tl.load(part_ml_ptr + part * 2 + 1, mask=real, other=0.0)  # noqa: E741
    mask = real[:, None] & (cols < LKV)[None, :]
    out = tl.load(part_out_ptr + part[:, None] * LKV + cols[None, :], mask=mask, other=0.0)
    return m, l, out


@triton.jit
def _finite(m):
    return tl.where(m == float("-inf"), 0.0, m)  # -inf - -inf is NaN


@triton.jit(do_not_specialize=["num_splits", "num_slots"])
def combine_kernel(
    part_out_ptr,  # [T, N, num_splits, LKV] fp32; CUT: [num_slots, ROWS, LKV]
    part_ml_ptr,  # [T, N, num_splits, 2] fp32; CUT: [num_slots, ROWS, 2], then `schedule`'s cuts
    out_ptr,  # [T, N, LKV]
    lse_ptr,  # [T, N]
    qo_indptr_ptr,  # CUT: [B+1], or None: max_seqlen_q tokens each
    max_seqlen_q,
    num_splits,
    num_slots,
    stride_ot,
    stride_on,
    N: tl.constexpr,
    LKV: tl.constexpr,
    ROWS: tl.constexpr,  # of a slot: all of a sequence, in whole row blocks
    CUT: tl.constexpr,
    EARLY: tl.constexpr,  # launched while stage 1 runs
    BLOCK_S: tl.constexpr,  # parts read at once
    BLOCK_L: tl.constexpr,
):
    """A program owns one row and BLOCK_L of its columns."""
    if EARLY:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    if CUT:
        b = row // (max_seqlen_q * N)
        within = row % (max_seqlen_q * N)
        parts, slot, first_row, count = _cut_of(
            b, part_ml_ptr, qo_indptr_ptr, max_seqlen_q, num_slots, N, ROWS
        )
        if parts == 0 or within >= count:
            return
        row = first_row + within
        first = slot * ROWS + within
    else:
        parts = num_splits
        first = row * num_splits
    cols = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)

    m = -float("inf")
    total = 0.0
    out = tl.zeros([BLOCK_L], tl.float32)
    for start in tl.range(0, parts, BLOCK_S):
        i = start + tl.arange(0, BLOCK_S)
        part = first + (_apart(i, ROWS) if CUT else i)
        part_m, part_l, part_out = _load(part_ml_ptr, part_out_ptr, part, i < parts, cols, LKV)
        m_new = tl.maximum(m, tl.max(part_m, 0))
        weight = part_l * tl.exp2(part_m - _finite(m_new))  # [BLOCK_S]
        fade = tl.exp2(m - _finite(m_new))
        out = out * fade + tl.sum(part_out * weight[:, None], 0)
        total = total * fade + tl.sum(weight, 0)
        m = m_new

    safe = tl.where(total > 0, total, 1.0)
    at = row // N * stride_ot + row % N * stride_on + cols
    tl.store(out_ptr + at, (out / safe).to(out_ptr.dtype.element_ty), mask=cols < LKV)
    if tl.program_id(1) == 0:
        lse = tl.where(total > 0, (m + tl.log2(safe)) * LN2, float("-inf"))
        tl.store(lse_ptr + row, lse)


@triton.jit(do_not_specialize=["num_slots"])
def combine_rows_kernel(
    part_out_ptr,
    part_ml_ptr,
    out_ptr,
    lse_ptr,
    qo_indptr_ptr,
    max_seqlen_q,
    num_slots,
    stride_ot,
    stride_on,
    N: tl.constexpr,
    LKV: tl.constexpr,
    ROWS: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows at once
    BLOCK_L: tl.constexpr,
):
    """As `combine_kernel` where CUT, for many sequences in few parts, most of them not cut.

    A program owns BLOCK_ROWS rows of a sequence: to start one takes an SM 0.1 µs, seen on an H200.
    """
    if EARLY:
        gdc_wait()
    blocks = tl.cdiv(max_seqlen_q * N, BLOCK_ROWS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    parts, slot, first_row, count = _cut_of(
        b, part_ml_ptr, qo_indptr_ptr, max_seqlen_q, num_slots, N, ROWS
    )
    if parts == 0:
        return
    cols = tl.arange(0, BLOCK_L)
    begin = tl.program_id(0) % blocks * BLOCK_ROWS
    for block in tl.range(begin, tl.minimum(begin + BLOCK_ROWS, count), BLOCK_R):
        within = block + tl.arange(0, BLOCK_R)
        row_ok = within < count
        part = slot * ROWS + within
        m = tl.full([BLOCK_R], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_R], tl.float32)
        out = tl.zeros([BLOCK_R, BLOCK_L], tl.float32)
        for i in tl.range(0, parts, 2):
            real = row_ok & (within * 0 + i + 1 < parts)
            m0, l0, out0 = _load(
                part_ml_ptr, part_out_ptr, part + _apart(i, ROWS), row_ok, cols, LKV
            )
            m1, l1, out1 = _load(
                part_ml_ptr, part_out_ptr, part + _apart(i + 1, ROWS), real, cols, LKV
            )
            m_new = tl.maximum(m, tl.maximum(m0, m1))
            base = _finite(m_new)
            fade, w0, w1 = tl.exp2(m - base), l0 * tl.exp2(m0 - base), l1 * tl.exp2(m1 - base)
            out = out * fade[:, None] + out0 * w0[:, None] + out1 * w1[:, None]
            total = total * fade + w0 + w1
            m = m_new

        safe = tl.where(total > 0, total, 1.0)
        rows = first_row + within
        at = (rows // N * stride_ot + rows % N * stride_on)[:, None] + cols[None, :]
        mask = row_ok[:, None] & (cols < LKV)[None, :]
        tl.store(out_ptr + at, (out / safe[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
        lse = tl.where(total > 0, (m + tl.log2(safe)) * LN2, float("-inf"))
        tl.store(lse_ptr + rows, lse, mask=row_ok)
