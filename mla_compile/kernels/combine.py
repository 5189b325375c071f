"""Stage 2: merge the parts of every query row.

    m = max_i m_i,   l = Σ_i l_i · 2^(m_i - m),   out = Σ_i out_i · l_i · 2^(m_i - m) / l

A part with l_i = 0 and out_i = 0 is the identity. If all are, out = 0 and lse = -inf. Parts are the
splits of a row, equally many everywhere, or what a `schedule` cut its sequence into: none where it
was not cut, whose out is in place.

EARLY: it was launched while stage 1 still ran. TILED: the parts of 16 rows lie as a warp of wgmma
has them, [LKV / 8, 8 rows, 4 lanes, 2 rows, 2 columns], where it stores 512 adjacent bytes at once.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _finite(m):
    return tl.where(m == float("-inf"), 0.0, m)  # -inf - -inf is NaN


@triton.jit
def _tile_rows(pair, PAIRS: tl.constexpr):
    """Rows r and r + 8 of a tile are side by side in it: those of some adjacent pairs."""
    i = tl.arange(0, 2 * PAIRS)
    return pair // 8 * 16 + pair % 8 + i // PAIRS * 8 + i % PAIRS


@triton.jit
def _load_tiles(ptr, apart, there, PAIRS: tl.constexpr, COLS: tl.constexpr):
    """Parts of adjacent pairs of rows, [rows, parts, cols]; of each, 64 bytes are adjacent."""
    flat = tl.arange(0, 2 * PAIRS * COLS)
    # Were the two rows of a pair in different lanes, Triton 3.6 would reduce over the wrong ones.
    tl.static_assert(apart.shape[0] * flat.shape[0] >= 4 * 128, "fewer than 4 numbers a thread")
    at = flat // (16 * PAIRS) * 128 + flat % (16 * PAIRS)
    part_out = tl.load(ptr + apart[:, None] + at[None, :], mask=there[:, None], other=0.0)
    part_out = part_out.reshape(apart.shape[0], COLS // 8, PAIRS, 4, 2, 2)
    return part_out.permute(4, 2, 0, 1, 3, 5).reshape(2 * PAIRS, apart.shape[0], COLS)


@triton.jit
def _merge(
    part_out_ptr,
    part_ml_ptr,
    first,  # [rows]: where the parts of each begin
    tile_ptr,  # where those of the first row begin in tiles, else None
    real,  # [rows]
    parts,
    cols,
    LKV: tl.constexpr,
    APART: tl.constexpr,  # rows from a part's slot to the next, 0: the parts of a row are adjacent
    BLOCK_S: tl.constexpr,  # parts at once
):
    """out [rows, cols], l and m."""
    m = tl.full([first.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([first.shape[0]], tl.float32)
    out = tl.zeros([first.shape[0], cols.shape[0]], tl.float32)
    for start in tl.range(0, parts, BLOCK_S):
        i = start + tl.arange(0, BLOCK_S)
        # Of a group's two slots one is for what goes on from before, one for what begins in it.
        apart = i if APART == 0 else (2 * i - (i > 0)) * APART
        part = first[:, None] + apart[None, :]
        there = real[:, None] & (i < parts)[None, :]
        part_m = tl.load(part_ml_ptr + part * 2, mask=there, other=float("-inf"))
        part_l = tl.load(part_ml_ptr + part * 2 + 1, mask=there, other=0.0)
        if tile_ptr is None:
            part_out = tl.load(
                part_out_ptr + (part * LKV)[:, :, None] + cols[None, None, :],
                mask=there[:, :, None] & (cols < LKV)[None, None, :],
                other=0.0,
            )
        else:
            apart *= 16 * LKV if APART == 0 else LKV
            PAIRS: tl.constexpr = first.shape[0] // 2
            part_out = _load_tiles(tile_ptr, apart, i < parts, PAIRS, cols.shape[0])
        m_new = tl.maximum(m, tl.max(part_m, 1))
        weight = part_l * tl.exp2(part_m - _finite(m_new)[:, None])
        fade = tl.exp2(m - _finite(m_new))
        out = out * fade[:, None] + tl.sum(part_out * weight[:, :, None], 1)
        total = total * fade + tl.sum(weight, 1)
        m = m_new
    return out, total, m


@triton.jit
def _store(
    out_ptr, lse_ptr, merged, row, real, cols, stride_ot, stride_on, N: tl.constexpr, LKV, LSE
):
    out, total, m = merged
    safe = tl.where(total == 0, 1.0, total)
    at = (row // N * stride_ot + row % N * stride_on)[:, None] + cols[None, :]
    mask = real[:, None] & (cols < LKV)[None, :]
    tl.store(out_ptr + at, (out / safe[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    lse = tl.where(total == 0, float("-inf"), (m + tl.log2(safe)) * LN2)
    tl.store(lse_ptr + row, lse, mask=real & LSE)


@triton.jit(do_not_specialize=["num_splits"])
def combine_kernel(
    part_out_ptr,  # [T, N, num_splits, LKV] fp32, if TILED [T * N / 16, num_splits, 16 * LKV]
    part_ml_ptr,  # [T, N, num_splits, 2] fp32
    out_ptr,  # [T, N, LKV]
    lse_ptr,  # [T, N]
    num_splits,
    stride_ot,
    stride_on,
    N: tl.constexpr,
    LKV: tl.constexpr,
    EARLY: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """A program owns BLOCK_L columns of a row, or of the two that a tile has side by side."""
    if EARLY:
        gdc_wait()
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    if TILED:
        row = _tile_rows(pid, 1)
        tile_ptr = part_out_ptr + pid // 8 * num_splits * (16 * LKV) + pid % 8 * 16
        tile_ptr += tl.program_id(1) * (16 * BLOCK_L)
    else:
        row = pid + tl.arange(0, 1)
        tile_ptr = None
    real = row >= 0
    first = row * num_splits
    merged = _merge(
        part_out_ptr,
        part_ml_ptr,
        first,
        tile_ptr,
        real,
        num_splits,
        cols,
        LKV,
        0,
        BLOCK_S,
    )
    lse = tl.program_id(1) + tl.arange(0, 1) == 0
    _store(out_ptr, lse_ptr, merged, row, real, cols, stride_ot, stride_on, N, LKV, lse)


@triton.jit
def _merge_cut(
    at,  # of a sequence: (parts' out, parts' m and l, out, lse, stride_ot, stride_on)
    begin,  # rows, or halves of the columns of pairs that a tile has side by side
    end,
    parts,
    N: tl.constexpr,
    LKV: tl.constexpr,
    ROWS: tl.constexpr,
    TILED: tl.constexpr,
    BLOCK: tl.constexpr,  # 1 or 4 of them at once
    BLOCK_S: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    part_out_ptr, part_ml_ptr, out_ptr, lse_ptr, stride_ot, stride_on = at
    COLS: tl.constexpr = BLOCK_L // 2 if TILED and BLOCK == 1 else BLOCK_L
    for block in tl.range(begin, end, BLOCK):
        first_col = block % (BLOCK_L // COLS) * COLS
        cols = first_col + tl.arange(0, COLS)
        if TILED:
            pair = block // 2
            row = _tile_rows(pair, (BLOCK + 1) // 2)
            real = row >= 0
            tile_ptr = part_out_ptr + pair // 8 * (16 * LKV) + pair % 8 * 16 + first_col * 16
        else:
            row = block + tl.arange(0, BLOCK)
            real = row < end
            tile_ptr = None
        merged = _merge(
            part_out_ptr, part_ml_ptr, row, tile_ptr, real, parts, cols, LKV, ROWS, BLOCK_S
        )
        row = row.to(tl.int64)
        lse = real & (first_col + tl.arange(0, 1) == 0)
        _store(out_ptr, lse_ptr, merged, row, real, cols, stride_ot, stride_on, N, LKV, lse)


@triton.jit(do_not_specialize=["num_groups"])
def combine_cut_kernel(
    part_out_ptr,  # fp32 [2 * num_groups, ROWS, LKV], or TILED in each slot
    part_ml_ptr,  # [2 * num_groups, ROWS, 2] fp32, then `schedule`'s [num_groups, 3]
    out_ptr,  # [T, N, LKV]
    lse_ptr,  # [T, N]
    qo_indptr_ptr,  # [B+1], or None: max_seqlen_q tokens each
    max_seqlen_q,
    num_groups,
    stride_ot,
    stride_on,
    N: tl.constexpr,
    LKV: tl.constexpr,
    ROWS: tl.constexpr,  # of a slot: all of a sequence, in whole row blocks
    EARLY: tl.constexpr,
    TILED: tl.constexpr,
    SHARES: tl.constexpr,  # programs of a group
    BLOCK_L: tl.constexpr,
):
    """The groups in which a sequence goes on share its rows: more parts, more groups."""
    if EARLY:
        gdc_wait()
    group = tl.program_id(0) // SHARES
    cut_ptr = part_ml_ptr + num_groups * (4 * ROWS) + group * 3
    b = tl.load(cut_ptr).to(tl.int64)
    began = tl.load(cut_ptr + 1).to(tl.int32)
    parts = tl.load(cut_ptr + 2).to(tl.int32)
    if parts == 0:
        return
    if qo_indptr_ptr is None:
        q_start = b * max_seqlen_q
        sq = max_seqlen_q
    else:
        q_start = tl.load(qo_indptr_ptr + b).to(tl.int64)
        sq = (tl.load(qo_indptr_ptr + b + 1) - q_start).to(tl.int32)
    share = tl.cdiv(sq * N, (parts - 1) * SHARES)
    if parts <= 4:
        share = tl.cdiv(share, 4) * 4  # whole blocks, see below
    begin = ((group - began - 1) * SHARES + tl.program_id(0) % SHARES) * share
    end = tl.minimum(begin + share, sq * N)
    slot = (2 * began + 1).to(tl.int64) * ROWS
    at = (
        part_out_ptr + slot * LKV,
        part_ml_ptr + slot * 2,
        out_ptr + q_start * stride_ot,
        lse_ptr + q_start * N,
        stride_ot,
        stride_on,
    )
    # 4096 numbers at once: 32 registers a thread of 128, and no sum between warps.
    if parts <= 4:
        _merge_cut(at, begin, end, parts, N, LKV, ROWS, TILED, 4, 2, BLOCK_L)
    else:
        _merge_cut(at, begin, end, parts, N, LKV, ROWS, TILED, 1, 8, BLOCK_L)
