"""What the Gluon kernels of CDNA3 and CDNA4 share: all but how a tile moves through LDS. `sm90` too
finds its rows and keys by it and writes its sums as it does.

They compute what `split` does and write the same out, m and l, for the common case alone:
`config.uncovered` is the list of what they leave to it. A workgroup owns BLOCK_M query rows and one
KV split. Its waves divide Q · Kᵀ by rows, and what is left of them by keys; P · V they divide by
columns, so that no part of a V tile is read by two waves. P and alpha change hands through LDS.

`block` is (first row, q_start, Sq of the sequence, split), `keys` is (lo, hi, kv_len, b, where the
sequence's table entries start). A tile's `at` is its keys' positions and their table entries.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # Triton 3.6 has the second name
LKV: gl.constexpr = gl.constexpr(512)
R: gl.constexpr = gl.constexpr(64)
WIDE: gl.constexpr = gl.constexpr(8)  # elements of 16 bytes, the widest access there is
XCDS: gl.constexpr = gl.constexpr(8)  # dies of an MI300 or MI350, each with an L2 of its own
LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)
LOWEST: gl.constexpr = gl.constexpr(-3.4028234663852886e38)  # finite: -inf - -inf is NaN
LN2: gl.constexpr = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def _matrix_layout(version, waves):
    shape = [16, 16, 16 if version == 3 else 32]
    return gl.amd.AMDMFMALayout(
        version=version, instr_shape=shape, transposed=True, warps_per_cta=waves
    )


@gluon.constexpr_function
def score_layout(version, block_m, num_warps):
    """[BLOCK_M, BLOCK_N]: 16 rows a wave; waves that are left divide the keys."""
    over_rows = min(block_m // 16, num_warps)
    return _matrix_layout(version, [over_rows, num_warps // over_rows])


@gluon.constexpr_function
def key_waves(block_m, block_n, num_warps):
    """How many waves divide the keys of a row of scores, 16 each at least."""
    return min(num_warps // min(block_m // 16, num_warps), block_n // 16)


@gluon.constexpr_function
def out_layout(version, num_warps):
    """[BLOCK_M, LKV]: every wave has all rows of its columns."""
    return _matrix_layout(version, [1, num_warps])


@gluon.constexpr_function
def tile_layout(width, num_warps):
    """[BLOCK_N, width] as it lies in memory: a wave takes whole rows, 16 bytes a lane."""
    lanes = min(width // 8, 64)
    return gl.BlockedLayout([1, 8], [64 // lanes, lanes], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def padded(rows, width, every, by):
    """Row-major in LDS with a gap of `by` elements after each `every`, against bank conflicts."""
    return gl.PaddedSharedLayout.with_identity_for([[every, by]], [rows, width], [1, 0])


@gluon.jit
def dealt(num_programs):
    """This program's place. Programs are dealt to the XCDs in turn; what shares keys is to share an
    L2."""
    pid = gl.program_id(0)
    xcd = pid % XCDS
    return xcd * (num_programs // XCDS) + gl.minimum(xcd, num_programs % XCDS) + pid // XCDS


@gluon.jit
def uniform(x):
    """A scalar, in a scalar register. The compiler takes what a vector is reduced to, or what is
    loaded after a store, for one of each lane."""
    if x.dtype == gl.int64:
        high = uniform((x >> 32).to(gl.int32)).to(gl.int64)
        return high << 32 | uniform(x.to(gl.int32)).to(gl.uint32).to(gl.int64)
    return gl.inline_asm_elementwise(
        "v_readfirstlane_b32 $0, $1", "=s,v", [x], dtype=x.dtype, is_pure=True, pack=1
    )


@gluon.jit
def item(pid, num_splits, lengths, N, PAGE_SIZE, CAUSAL, BLOCK_M, BLOCK_N: gl.constexpr):
    """Block and keys number `pid`."""
    row_blocks = gl.cdiv(lengths[3] * N, BLOCK_M)
    row = pid % row_blocks * BLOCK_M
    split = pid // row_blocks % num_splits
    b = pid // row_blocks // num_splits
    return share(b, row, split, num_splits, lengths, N, PAGE_SIZE, CAUSAL, BLOCK_M, BLOCK_N)


@gluon.jit
def key_count(b, lengths, PAGE_SIZE: gl.constexpr):
    """Skv of sequence `b`, and where its table entries start; `b` may be a tensor."""
    starts_ptr, lens_ptr, _, _, page_size = lengths
    entry = b.to(gl.int64) * 0
    if starts_ptr is None:
        kv_len = page_size if lens_ptr is None else gl.load(lens_ptr + b).to(gl.int32)
    else:
        entry = gl.load(starts_ptr + b).to(gl.int64)
        pages = (gl.load(starts_ptr + b + 1) - entry).to(gl.int32)
        last = gl.load(lens_ptr + b).to(gl.int32)
        kv_len = gl.where(pages > 0, (pages - 1) * PAGE_SIZE + last, 0)
    return kv_len, entry


@gluon.jit
def share(b, row, split, num_splits, lengths, N, PAGE_SIZE, CAUSAL, BLOCK_M, BLOCK_N: gl.constexpr):
    """Block and keys of a split; hi <= lo where there is nothing to attend to."""
    _, _, qo_indptr_ptr, max_seqlen_q, _ = lengths
    b = b.to(gl.int64)
    if qo_indptr_ptr is None:
        sq = max_seqlen_q
        q_start = b * max_seqlen_q
    else:
        q_start = gl.load(qo_indptr_ptr + b).to(gl.int64)
        sq = (gl.load(qo_indptr_ptr + b + 1) - q_start).to(gl.int32)
    kv_len, entry = key_count(b, lengths, PAGE_SIZE)
    kv_end = kv_len
    if CAUSAL:
        last_token = (gl.minimum(row + BLOCK_M, sq * N) - 1) // N
        kv_end = gl.maximum(kv_len - sq + 1 + last_token, 0)
    span = gl.cdiv(gl.cdiv(kv_end, num_splits), BLOCK_N) * BLOCK_N
    lo = split * span
    hi = gl.minimum(lo + span, kv_end)
    hi = gl.where(row < sq * N, hi, lo)  # a row block past this sequence's queries
    return (row, q_start, sq, split), (lo, hi, kv_len, b, entry)


@gluon.jit
def anew(block):
    """The block, of which the compiler knows nothing yet: what the epilogue needs it computes again
    instead of keeping it from the prologue on, for which the loop has no registers."""
    row = gl.inline_asm_elementwise("", "=s,0", [block[0]], block[0].dtype, is_pure=True, pack=1)
    return row, block[1], block[2], block[3]


@gluon.jit
def rows_of(block, N: gl.constexpr, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    """Token within the sequence and head of each row; rows past the end repeat the last."""
    rows = gl.minimum(block[0] + gl.arange(0, BLOCK_M, layout=LAYOUT), block[2] * N - 1)
    return rows // N, rows % N


@gluon.jit
def owned(block, N: gl.constexpr, BLOCK_M: gl.constexpr, LAYOUT: gl.constexpr):
    return block[0] + gl.arange(0, BLOCK_M, layout=LAYOUT) < block[2] * N


@gluon.jit
def load_query(ptr, block, stride_t, stride_n, N, BLOCK_M, WIDTH, LAYOUT: gl.constexpr):
    """[BLOCK_M, WIDTH], into the registers where the matrix instruction wants it."""
    token, head = rows_of(block, N, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    rows = (block[1] + token) * stride_t + head.to(gl.int64) * stride_n
    cols = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    return gl.load(ptr + rows[:, None] + cols[None, :])


@gluon.jit
def positions(start, hi, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """Those of the keys of the tile at `start`; keys past the end repeat the last."""
    pos = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT))
    return gl.minimum(pos, hi - 1).to(gl.uint32)  # unsigned: // and % are one instruction each


@gluon.jit
def look_up(table_ptr, start, hi, PAGE_SIZE, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """`at` of the tile at `start`."""
    pos = positions(start, hi, BLOCK_N, LAYOUT)
    if PAGE_SIZE == 0:
        entries = pos
    elif PAGE_SIZE == 1:
        entries = gl.load(table_ptr + pos)
    elif PAGE_SIZE % BLOCK_N == 0:  # the tile lies in one page
        entries = gl.load(table_ptr + gl.minimum(start, hi - 1) // PAGE_SIZE)
    else:
        entries = gl.load(table_ptr + pos // PAGE_SIZE)
    return pos, entries


@gluon.jit
def entries_of(table_ptr, start, hi, PAGE_SIZE, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """`at` of the tile at `start` but for the positions: what is worth a register until then.
    2^31 pages are 2 TB, so a number of a page has 32 bits."""
    _, entries = look_up(table_ptr, start, hi, PAGE_SIZE, BLOCK_N, LAYOUT)
    return entries.to(gl.int32)


@gluon.jit
def keys_at(ptr, at, b, stride_p, stride_s, PAGE_SIZE):
    """[BLOCK_N] pointers."""
    pos, entries = at
    if PAGE_SIZE == 0:
        rows = b * stride_p + pos.to(gl.int64) * stride_s
    elif PAGE_SIZE == 1:
        rows = entries.to(gl.int64) * stride_p
    else:
        rows = entries.to(gl.int64) * stride_p + (pos % PAGE_SIZE).to(gl.int64) * stride_s
    return ptr + rows


@gluon.jit
def tile_at(ptr, at, b, stride_p, stride_s, PAGE_SIZE, WIDTH, LAYOUT: gl.constexpr):
    """[BLOCK_N, WIDTH] pointers."""
    cols = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, LAYOUT))
    return keys_at(ptr, at, b, stride_p, stride_s, PAGE_SIZE)[:, None] + cols[None, :]


@gluon.jit
def seen_by_all(block, keys, N, CAUSAL: gl.constexpr):
    """Where the keys end that no row of the block has to hide."""
    end = keys[1]
    if CAUSAL:
        end = gl.minimum(end, keys[2] - block[2] + 1 + block[0] // N)
    return end


@gluon.jit
def hide(s, start, block, keys, N, CAUSAL, BLOCK_M, BLOCK_N, LAYOUT: gl.constexpr):
    """-inf for keys past the end or later than a row's query."""
    pos = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    visible = (pos < keys[1])[None, :]
    if CAUSAL:
        token, _ = rows_of(block, N, BLOCK_M, gl.SliceLayout(1, LAYOUT))
        visible = visible & (pos[None, :] <= (token + (keys[2] - block[2]))[:, None])
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def by_wave(s, WAVES: gl.constexpr):
    """[BLOCK_M, BLOCK_N] with the waves that share a row as axis 2."""
    return s.reshape([s.shape[0], s.shape[1] // (16 * WAVES), WAVES, 16])


@gluon.jit
def wave_sums(s, WAVES: gl.constexpr):
    """[BLOCK_M, WAVES]"""
    return gl.sum(gl.sum(by_wave(s, WAVES), 3), 1)


@gluon.jit
def row_max(s, smem, WAVES: gl.constexpr):
    """[BLOCK_M], through smem [BLOCK_M, WAVES]. Triton's own exchange takes two barriers more, and
    LLVM has it wait for the next tile."""
    if WAVES == 1:
        return gl.max(s, 1)
    smem.store(gl.max(gl.max(by_wave(s, WAVES), 3), 1))
    top = gl.max(smem.slice(0, 1, 1).load(s.type.layout), 1)
    for wave in gl.static_range(1, WAVES):
        top = gl.maximum(top, gl.max(smem.slice(wave, 1, 1).load(s.type.layout), 1))
    return top


@gluon.jit
def softmax(s, m_i, l_i, qk_scale, smem, WAVES: gl.constexpr):
    """One online step in powers of two: p, alpha and the new m_i, l_i.

    l_i is [BLOCK_M, WAVES]: each wave adds up its own keys.
    """
    m_new = gl.maximum(m_i, row_max(s, smem, WAVES) * qk_scale)
    alpha = gl.exp2(m_i - m_new)
    p = gl.exp2(s * qk_scale - m_new[:, None])
    fade = gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))
    return p, alpha, m_new, l_i * fade[:, None] + wave_sums(p, WAVES)


@gluon.jit
def store_out(ptr, out, block, strides, N, BLOCK_M, LAYOUT: gl.constexpr):
    token, head = rows_of(block, N, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    rows = (block[1] + token) * strides[0] + head.to(gl.int64) * strides[1]
    rows += block[3].to(gl.int64) * strides[2]
    cols = gl.arange(0, out.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    mine = owned(block, N, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    gl.store(ptr + rows[:, None] + cols[None, :], out.to(ptr.dtype.element_ty), mask=mine[:, None])


@gluon.jit
def store_sums(ptr, m_i, l_i, block, num_splits, N, SPLIT, BLOCK_M, LAYOUT: gl.constexpr):
    """lse, or (m, l) for `combine`."""
    token, head = rows_of(block, N, BLOCK_M, LAYOUT)
    rows = (block[1] + token) * N + head
    mine = owned(block, N, BLOCK_M, LAYOUT)
    if SPLIT:
        part = ptr + (rows * num_splits + block[3]) * 2
        gl.store(part, m_i, mask=mine)
        gl.store(part + 1, l_i, mask=mine)
    else:
        lse = gl.where(l_i == 0, float("-inf"), (m_i + gl.log2(l_i)) * LN2)
        gl.store(ptr + rows, lse, mask=mine)
