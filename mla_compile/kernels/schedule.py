"""Sequences spread evenly over the programs of a persistent kernel, whatever their lengths are.

Only the device knows the lengths, so each program finds its own share. The tiles of all sequences
stand on one line, those of a sequence after OVERHEAD tile-times for beginning it, and the line is
cut into one stretch of equal length for each group. A group is a program for each row block of a
sequence: they read the same keys at the same time.

A sequence that is cut leaves its parts in the workspace, for `combine`. A group leaves two at
most: slot 2 · group has what goes on from the group before, the next slot what begins in it.
Where all lengths are much the same, to begin a second sequence costs more than an even share saves:
then each is cut into as many pieces as there are groups for it, or if there are fewer groups than
sequences, group g takes the sequences g, g + num_groups, ... whole.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import mla_compile.kernels.cdna as cdna

# In tile-times, as measured on an H200 with lengths from 128 to 32 K: 2 and 4 take 9 % longer.
OVERHEAD: gl.constexpr = gl.constexpr(4)  # to begin and end a sequence
CUT: gl.constexpr = gl.constexpr(6)  # to begin once more, and to combine
NEVER: gl.constexpr = gl.constexpr(2**31 - 1)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _at(index, values, b):
    return gl.sum(gl.where(index == b, values, 0), 0)


@gluon.jit
def count_tiles(lengths, num_sequences, PAGE_SIZE, KEYS, BLOCK_B, LANES: gl.constexpr):
    """Of each sequence, [BLOCK_B], all in each warp; a kernel may load them long before `share`."""
    ALL: gl.constexpr = gl.BlockedLayout([BLOCK_B // LANES], [LANES], [gl.num_warps()], [0])
    index = gl.arange(0, BLOCK_B, layout=ALL)
    length, _ = cdna.key_count(gl.minimum(index, num_sequences - 1), lengths, PAGE_SIZE)
    return gl.where(index < num_sequences, gl.cdiv(length, KEYS), 0)


@gluon.jit
def stretch(tiles, num_sequences, group, num_groups, cut_ptr, KEYS):
    """(first sequence, their end, step), (first key of the first, end key of the last).

    To `cut_ptr`, [num_groups, 3], goes what goes on from groups before: its sequence, the group in
    which it begins, and the number of its parts, 0 if there is none.
    """
    index = gl.arange(0, tiles.shape[0], layout=tiles.type.layout)
    real = index < num_sequences
    cost = gl.where(real, tiles + OVERHEAD, 0)
    share = gl.cdiv(gl.sum(cost, 0), num_groups)
    rounds = gl.cdiv(num_sequences, num_groups)
    pieces = gl.maximum(num_groups // num_sequences, 1)
    begin = group
    stop = num_sequences
    step = num_groups
    key_begin = 0
    key_end = NEVER
    began = group
    parts = 0
    if rounds * (gl.cdiv(gl.max(tiles, 0), pieces) + OVERHEAD) > share + CUT:
        first = gl.associative_scan(cost, 0, _add) - cost + (OVERHEAD - 1)
        end = first + gl.maximum(tiles, 1)
        lo = group * share
        hi = lo + share
        begin = gl.sum((real & (end <= lo)).to(gl.int32), 0)
        stop = gl.sum((real & (first < hi)).to(gl.int32), 0)
        step = 1
        begins = _at(index, first, begin)
        if (begin < stop) & (begins < lo):
            key_begin = (lo - begins) * KEYS
            began = begins // share
            parts = gl.cdiv(_at(index, end, begin), share) - began
        if _at(index, end, stop - 1) > hi:
            key_end = (hi - _at(index, first, stop - 1)) * KEYS
    elif pieces > 1:
        begin = group // pieces
        part = group - begin * pieces
        count = _at(index, tiles, begin)
        piece = gl.maximum(gl.cdiv(count, pieces), 1)
        last = gl.maximum(gl.cdiv(count, piece) - 1, 0)
        stop = gl.where(part <= last, gl.minimum(begin + 1, num_sequences), begin)
        step = 1
        key_begin = part * piece * KEYS
        if part < last:
            key_end = key_begin + piece * KEYS
        if (part > 0) & (part <= last):
            began = group - part
            parts = last + 1
    gl.store(cut_ptr + 3 * group, begin.to(gl.float32))
    gl.store(cut_ptr + 3 * group + 1, began.to(gl.float32))
    gl.store(cut_ptr + 3 * group + 2, parts.to(gl.float32))
    return (begin, stop, step), (key_begin, key_end)


@gluon.jit
def share(tiles, pid, programs, max_seqlen_q, num_sequences, part_ml_ptr, N, ROWS, KEYS):
    """A program's items (first, end, step), and (first key of the first, end key of the last)."""
    row_blocks = gl.cdiv(max_seqlen_q * N, ROWS)
    group = pid // row_blocks
    cut_ptr = part_ml_ptr + programs * (4 * ROWS)
    sequences, ends = stretch(tiles, num_sequences, group, programs // row_blocks, cut_ptr, KEYS)
    begin, stop, step = sequences
    return (begin * row_blocks + pid % row_blocks, stop * row_blocks, step * row_blocks), ends


@gluon.jit
def item(i, key_begin, pid, work, N, PAGE_SIZE, CAUSAL, ROWS, KEYS):
    """Block and keys number i of a stretch. The block ends in the slot of its part, -1 if whole."""
    block, keys = cdna.item(i, work[1], work[2], N, PAGE_SIZE, CAUSAL, ROWS, KEYS)
    _, hi, kv_len, b, entry = keys
    row_blocks = gl.cdiv(work[2][3] * N, ROWS)
    key_end = gl.where(i + row_blocks >= work[0][1], work[3], NEVER)
    slot = pid // row_blocks * 2
    part = gl.where(key_begin > 0, slot, gl.where(key_end < kv_len, slot + 1, -1))
    keys = (key_begin, gl.minimum(hi, key_end), kv_len, b, entry)
    return (block[0], block[1], block[2], part), keys


@gluon.jit
def alone(block):
    """The rows of a block counted from the first of its sequence, as parts have them."""
    return block[0], block[1] * 0, block[2], block[2] * 0


@gluon.jit
def part_at(ptr, block, max_seqlen_q, N, ROWS, WIDTH):
    """Where the slot of a block's part begins, of WIDTH numbers a row."""
    return ptr + block[3] * (gl.cdiv(max_seqlen_q * N, ROWS) * ROWS * WIDTH)
