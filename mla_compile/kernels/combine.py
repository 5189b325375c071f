"""Stage 2: merge the splits of every query row.

    m = max_s m_s,   l = Σ_s l_s · 2^(m_s - m),   out = Σ_s out_s · l_s · 2^(m_s - m) / l

A split with l_s = 0 is the identity: its out_s is not read. If all are, out = 0 and lse = -inf.
A program owns one row and BLOCK_L of its columns.
"""

import triton
import triton.language as tl

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["num_splits"])
def combine_kernel(
    part_out_ptr,  # [T, N, num_splits, LKV] fp32
    part_ml_ptr,  # [T, N, num_splits, 2] fp32
    out_ptr,  # [T, N, LKV]
    lse_ptr,  # [T, N]
    num_splits,
    stride_ot,
    stride_on,
    N: tl.constexpr,
    LKV: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    part = row * num_splits + tl.arange(0, BLOCK_S)  # [BLOCK_S]
    real = tl.arange(0, BLOCK_S) < num_splits

    part_m = tl.load(part_ml_ptr + part * 2, mask=real, other=float("-inf"))
    part_l = tl.load(part_ml_ptr + part * 2 + 1, mask=real, other=0.0)
    m = tl.max(part_m, 0)
    m = tl.where(m == float("-inf"), 0.0, m)  # -inf - -inf is NaN
    weight = part_l * tl.exp2(part_m - m)  # [BLOCK_S]
    total = tl.sum(weight, 0)
    safe = tl.where(total > 0, total, 1.0)
    part_out = tl.load(
        part_out_ptr + part[:, None] * LKV + cols[None, :],
        mask=(weight > 0)[:, None] & (cols < LKV)[None, :],
        other=0.0,
    )  # [BLOCK_S, BLOCK_L]
    out = tl.sum(part_out * weight[:, None], 0) / safe

    out_row = row // N * stride_ot + row % N * stride_on
    tl.store(out_ptr + out_row + cols, out.to(out_ptr.dtype.element_ty), mask=cols < LKV)
    if tl.program_id(1) == 0:
        lse = tl.where(total > 0, (m + tl.log2(safe)) * LN2, float("-inf"))
        tl.store(lse_ptr + row, lse)
