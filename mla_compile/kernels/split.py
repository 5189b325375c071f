"""Stage 1: a block of query rows against one KV split of one sequence.

The query tokens and heads of a sequence are folded into rows (row = token · N + head), since all
of them read the same latent. A program owns BLOCK_M rows and one split; row blocks of a sequence
stand next to each other in launch order, so that they meet in L2. Per tile of BLOCK_N keys

    S = (Q_nope · K_cᵀ + Q_pe · K_peᵀ) · sm_scale · log2(e)     [BLOCK_M, BLOCK_N]
    m, l, acc = online softmax of S in powers of two; acc += P · K_c

where the K_c tile is loaded once and serves as keys and values. Rows and keys past the end are
clamped to the last valid one: memory nobody owns is never read, so NaN there cannot enter. A split
writes its own normalised out with (m, l), not with lse: where finite mask fills are all a row has,
m is so large that m + log2(l) would lose l. A split without a visible key writes the identity of
the combine: out = 0, m = -inf, l = 0.
"""

import triton
import triton.language as tl

from mla_compile import reference

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
FLOOR: tl.constexpr = tl.constexpr(reference.FLOOR)
ABSORBING: tl.constexpr = tl.constexpr(reference.ABSORBING)
HIDDEN: tl.constexpr = tl.constexpr(reference.HIDDEN)
NO_KEY: tl.constexpr = tl.constexpr(2**31 - 1)
SCAN: tl.constexpr = tl.constexpr(1024)  # mask columns looked at in one go


@triton.jit
def _load_tile(ptr, rows, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """[rows, BLOCK] at element offsets `rows`; columns past SIZE are zero."""
    cols = tl.arange(0, BLOCK)
    if SIZE >= BLOCK:
        tile = tl.load(ptr + rows[:, None] + cols[None, :])
    else:
        tile = tl.load(ptr + rows[:, None] + cols[None, :], mask=(cols < SIZE)[None, :], other=0.0)
    return tile


@triton.jit
def _scores(
    q_ptr,
    q_rows,
    k_ptr,
    k_rows,
    scale,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Q · Kᵀ · scale, CHUNK columns at a time: fewer registers, and no sum is longer than that."""
    s = tl.zeros([q_rows.shape[0], k_rows.shape[0]], tl.float32)
    for col in tl.static_range(0, SIZE, CHUNK):
        q = _load_tile(q_ptr + col, q_rows, SIZE - col, CHUNK).to(COMPUTE)
        k = _load_tile(k_ptr + col, k_rows, SIZE - col, CHUNK).to(COMPUTE)
        # Without a factor of its own Triton makes it the accumulator's next term: one long sum.
        s += tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    return s


@triton.jit
def _locate(pos, start, b, table_ptr, PAGE_SIZE: tl.constexpr, ONE_PAGE: tl.constexpr):
    """Page and slot of keys `pos` of the tile that begins at `start`."""
    if table_ptr is None:
        page = b
        slot = pos
    elif PAGE_SIZE == 1:
        page = tl.load(table_ptr + pos)
        slot = pos * 0
    elif ONE_PAGE:
        page = tl.load(table_ptr + start // PAGE_SIZE)
        slot = pos % PAGE_SIZE
    else:
        page = tl.load(table_ptr + pos // PAGE_SIZE)
        slot = pos % PAGE_SIZE
    return page.to(tl.int64), slot.to(tl.int64)


@triton.jit
def _tanh(x):
    """Near 0 a polynomial (Cephes tanhf), for 1 - 2 / (e^2x + 1) cancels there."""
    y = x * x
    p = -5.70498872745e-3 * y + 2.06390887954e-2
    p = (p * y - 5.37397155531e-2) * y + 1.33314422036e-1
    p = (p * y - 3.33332819422e-1) * y * x + x
    return tl.where(tl.abs(x) < 0.625, p, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0))


@triton.jit
def _bias(mask, fill):
    """What a mask tile adds to scores, kept clear of overflow in log2 units."""
    bias = tl.where(mask, 0.0, fill) if mask.dtype == tl.int1 else mask.to(tl.float32)
    return tl.where(bias == float("-inf"), bias, tl.maximum(bias, FLOOR))


@triton.jit
def _apply_mask(s, mask, fill):
    """Scores in log2 units under a mask tile: a bool mask replaces, so does what absorbs them."""
    bias = _bias(mask, fill)
    if mask.dtype == tl.int1:
        s = tl.where(mask, s, bias * LOG2E)
    else:
        s = tl.where(bias > ABSORBING, s, 0.0) + bias * LOG2E
    return s


@triton.jit
def _hull(mask_ptr, stride_ms, fill, floor, lo, hi):
    """First key of lo..hi whose bias is above `floor`, and the end of the last such key."""
    first = tl.full([SCAN], NO_KEY, tl.int32)
    end = tl.zeros([SCAN], tl.int32)
    for start in tl.range(lo, hi, SCAN):
        pos = start + tl.arange(0, SCAN)
        mask = tl.load(mask_ptr + tl.minimum(pos, hi - 1).to(tl.int64) * stride_ms)
        seen = (_bias(mask, fill) > floor) & (pos < hi)
        first = tl.minimum(first, tl.where(seen, pos, NO_KEY))
        end = tl.maximum(end, tl.where(seen, pos + 1, 0))
    return tl.min(first, 0), tl.max(end, 0)


@triton.jit(
    do_not_specialize=[
        "page_size",
        "num_splits",
        "mask_columns",
        "stride_table",
        "stride_mb",
        "stride_mn",
        "stride_mq",
        "stride_ms",
    ]
)
def split_kernel(
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
    mask_ptr,  # [B, N, Sq, mask_columns] by strides, bool or float, or None
    q_scale_ptr,  # [1] or None
    k_scale_ptr,  # [1] or None
    sm_scale,
    logit_cap,  # None: off
    mask_fill,
    max_seqlen_q,
    page_size,
    num_splits,
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
    stride_mn,
    stride_mq,
    stride_ms,
    N: tl.constexpr,
    LKV: tl.constexpr,
    R: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # page_size, or 0 where no table is read
    CAUSAL: tl.constexpr,
    MASK_ROWS: tl.constexpr,  # what the mask hides differs between rows
    SPLIT: tl.constexpr,  # the KV is split: write what `combine` merges
    RELOAD_V: tl.constexpr,  # load K_c again for the second matmul
    CHUNK: tl.constexpr,  # columns of Q and K_c at once, both loaded for each tile; 0: all
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    COMPUTE: tl.constexpr = (
        tl.bfloat16 if q_nope_ptr.dtype.element_ty.is_fp8() else q_nope_ptr.dtype.element_ty
    )
    MASK_KEYS: tl.constexpr = mask_ptr is not None and not MASK_ROWS
    ONE_PAGE: tl.constexpr = PAGE_SIZE > 0 and PAGE_SIZE % BLOCK_N == 0 and not MASK_KEYS

    row_blocks = tl.cdiv(max_seqlen_q * N, BLOCK_M)
    pid = tl.program_id(0)
    block = pid % row_blocks
    split = pid // row_blocks % num_splits
    b = (pid // row_blocks // num_splits).to(tl.int64)

    if qo_indptr_ptr is None:
        sq = max_seqlen_q
        q_start = b * max_seqlen_q
    else:
        q_start = tl.load(qo_indptr_ptr + b).to(tl.int64)
        sq = (tl.load(qo_indptr_ptr + b + 1) - q_start).to(tl.int32)
        if block * BLOCK_M >= sq * N:
            return
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < sq * N
    rows = tl.minimum(rows, sq * N - 1)
    token = rows // N  # [BLOCK_M], within the sequence
    head = (rows % N).to(tl.int64)
    query = q_start + token.to(tl.int64)  # [BLOCK_M], within T

    if table_ptr is None:
        kv_len = page_size if lens_ptr is None else tl.load(lens_ptr + b).to(tl.int32)
    elif starts_ptr is None:
        kv_len = tl.load(lens_ptr + b).to(tl.int32)
        table_ptr += b * stride_table
    else:
        first_page = tl.load(starts_ptr + b).to(tl.int64)
        pages = (tl.load(starts_ptr + b + 1) - first_page).to(tl.int32)
        last = tl.load(lens_ptr + b).to(tl.int32)
        kv_len = tl.where(pages > 0, (pages - 1) * PAGE_SIZE + last, 0)
        table_ptr += first_page

    kv_end = kv_len
    if CAUSAL:
        last_token = (tl.minimum(block * BLOCK_M + BLOCK_M, sq * N) - 1) // N
        kv_end = tl.maximum(kv_len - sq + 1 + last_token, 0)
    if mask_ptr is not None:
        kv_end = tl.minimum(kv_end, mask_columns)
        mask_ptr += b * stride_mb
    span = tl.cdiv(tl.cdiv(kv_end, num_splits), BLOCK_N) * BLOCK_N
    lo = split * span
    hi = tl.minimum(lo + span, kv_end)

    if MASK_KEYS:
        floor = HIDDEN
        first, end = _hull(mask_ptr, stride_ms, mask_fill, floor, lo, hi)
        if end == 0:  # finite fills alone: the plain average over them
            floor = float("-inf")
            first, end = _hull(mask_ptr, stride_ms, mask_fill, floor, lo, hi)
        lo = tl.minimum(first, end) // BLOCK_N * BLOCK_N
        hi = end

    qk_scale = sm_scale
    v_scale = 1.0
    if q_scale_ptr is not None:
        qk_scale *= tl.load(q_scale_ptr)
    if k_scale_ptr is not None:
        v_scale = tl.load(k_scale_ptr)
        qk_scale *= v_scale
    if logit_cap is None:
        qk_scale *= LOG2E
    else:
        qk_scale /= logit_cap

    q_rows = query * stride_qt + head * stride_qn  # [BLOCK_M]
    q_pe_rows = query * stride_pt + head * stride_pn
    if CHUNK == 0:
        q_nope = _load_tile(q_nope_ptr, q_rows, LKV, BLOCK_L).to(COMPUTE)
        if R > 0:
            q_pe = _load_tile(q_pe_ptr, q_pe_rows, R, BLOCK_R).to(COMPUTE)
    if MASK_ROWS:
        mask_rows = token.to(tl.int64) * stride_mq + head * stride_mn  # [BLOCK_M]

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_L], tl.float32)
    # Invariants hoisted into registers made sm90 spill 224 bytes a thread on Triton 3.9.
    for start in tl.range(lo, hi, BLOCK_N, disable_licm=True):
        pos = start + tl.arange(0, BLOCK_N)
        visible = (pos < hi)[None, :]
        pos = tl.minimum(pos, hi - 1)
        if CAUSAL:
            visible = visible & (pos[None, :] <= (token + (kv_len - sq))[:, None])
        if MASK_KEYS:
            mask = tl.load(mask_ptr + pos.to(tl.int64) * stride_ms)  # [BLOCK_N]
            kept = _bias(mask, mask_fill) > floor
            visible = visible & kept[None, :]
            pos = tl.where(kept, pos, first)
        if MASK_ROWS:
            mask = tl.load(mask_ptr + mask_rows[:, None] + (pos.to(tl.int64) * stride_ms)[None, :])
            top = tl.max(tl.where(visible, _bias(mask, mask_fill), float("-inf")))
            live = (top > HIDDEN) | ((top > float("-inf")) & (tl.min(m_i) <= HIDDEN))
        else:
            live: tl.constexpr = True  # type: ignore[no-redef]
        if live:
            page, slot = _locate(pos, start, b, table_ptr, PAGE_SIZE, ONE_PAGE)
            kv_rows = page * stride_cp + slot * stride_cs  # [BLOCK_N]
            k_pe_rows = page * stride_kp + slot * stride_ks
            if CHUNK > 0:
                s = _scores(q_nope_ptr, q_rows, kv_c_ptr, kv_rows, qk_scale, LKV, CHUNK, COMPUTE)
                if R > 0:
                    s += _scores(
                        q_pe_ptr, q_pe_rows, k_pe_ptr, k_pe_rows, qk_scale, R, CHUNK, COMPUTE
                    )
                kv = _load_tile(kv_c_ptr, kv_rows, LKV, BLOCK_L).to(COMPUTE)
            else:
                if RELOAD_V:
                    cols = tl.arange(0, BLOCK_L)
                    k = tl.load(
                        kv_c_ptr + kv_rows[None, :] + cols[:, None],
                        mask=(cols < LKV)[:, None] if LKV != BLOCK_L else None,
                    ).to(COMPUTE)
                    s = tl.dot(q_nope, k, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
                    kv = _load_tile(kv_c_ptr, kv_rows, LKV, BLOCK_L).to(COMPUTE)
                else:
                    kv = _load_tile(kv_c_ptr, kv_rows, LKV, BLOCK_L).to(COMPUTE)
                    s = tl.dot(q_nope, tl.trans(kv), input_precision="ieee")
                if R > 0:
                    k_pe = _load_tile(k_pe_ptr, k_pe_rows, R, BLOCK_R).to(COMPUTE)
                    s = tl.dot(q_pe, tl.trans(k_pe), s, input_precision="ieee")
                s *= qk_scale
            if logit_cap is not None:
                s = _tanh(s) * (logit_cap * LOG2E)
            if MASK_KEYS:
                s = _apply_mask(s, mask[None, :], mask_fill)
            if MASK_ROWS:
                s = _apply_mask(s, mask, mask_fill)
            s = tl.where(visible, s, float("-inf"))

            m_new = tl.maximum(m_i, tl.max(s, 1))
            base = m_new
            if CAUSAL or MASK_ROWS:  # a row may have seen no key yet; -inf - -inf is NaN
                base = tl.where(m_new == float("-inf"), 0.0, m_new)
            alpha = tl.exp2(m_i - base)
            p = tl.exp2(s - base[:, None])
            l_i = l_i * alpha + tl.sum(p, 1)
            acc = acc * alpha[:, None]
            acc = tl.dot(p.to(COMPUTE), kv, acc, input_precision="ieee")
            m_i = m_new

    l_safe = tl.where(l_i == 0, 1.0, l_i)
    acc *= (v_scale / l_safe)[:, None]
    cols = tl.arange(0, BLOCK_L)
    out_rows = query * stride_ot + head * stride_on + split.to(tl.int64) * stride_os
    tl.store(
        out_ptr + out_rows[:, None] + cols[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=row_ok[:, None] & (cols < LKV)[None, :],
    )
    if SPLIT:
        part = lse_ptr + ((query * N + head) * num_splits + split) * 2
        tl.store(part, m_i, mask=row_ok)
        tl.store(part + 1, l_i, mask=row_ok)
    else:
        lse = tl.where(l_i == 0, float("-inf"), (m_i + tl.log2(l_safe)) * LN2)
        tl.store(lse_ptr + query * N + head, lse, mask=row_ok)
