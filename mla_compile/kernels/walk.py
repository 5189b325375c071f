"""What a program of `cdna3` and `cdna4` does with its blocks: where each begins and ends, and where
its rows go. A program has one block, or a stretch of a `schedule`, whose blocks it takes in turn.

`queries`, `caches` and `outs` are pointers and their strides. CALL is what Triton knows of the call
as it compiles: the version of CDNA, N, PAGE_SIZE, CAUSAL, SPLIT, BLOCK_M, BLOCK_N, BLOCK_B.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import mla_compile.kernels.cdna as cdna
import mla_compile.kernels.schedule as schedule
from mla_compile.kernels.cdna import LKV, LOWEST

LANES: gl.constexpr = gl.constexpr(64)


@gluon.jit
def _store(outs, sums, out, m_i, l_i, block, max_seqlen_q, N, BLOCK_M, ROW: gl.constexpr):
    """A block's rows, to the output where it is whole, else to the slot of its part."""
    out_ptr, part_out_ptr, strides = outs
    lse_ptr, part_ml_ptr = sums
    A: gl.constexpr = out.type.layout
    if block[3] < 0:
        cdna.store_sums(lse_ptr, m_i, l_i, block, 1, N, False, BLOCK_M, ROW)
        cdna.store_out(out_ptr, out, block, strides, N, BLOCK_M, A)
    else:
        alone = schedule.alone(block)
        part = schedule.part_at(part_ml_ptr, block, max_seqlen_q, N, BLOCK_M, 2)
        cdna.store_sums(part, m_i, l_i, alone, 1, N, True, BLOCK_M, ROW)
        part = schedule.part_at(part_out_ptr, block, max_seqlen_q, N, BLOCK_M, LKV)
        cdna.store_out(part, out, alone, (N * LKV, LKV, 0), N, BLOCK_M, A)


@gluon.jit
def _uniform(block, keys):
    row, q_start, sq, part = block
    lo, hi, kv_len, b, entry = keys
    block = row, cdna.uniform(q_start), cdna.uniform(sq), cdna.uniform(part)
    return block, (lo, cdna.uniform(hi), cdna.uniform(kv_len), b, cdna.uniform(entry))


@gluon.jit
def walk(ATTEND, queries, caches, lengths, outs, sums, sizes, sm_scale, CALL: gl.constexpr):
    """All of a program's blocks. ATTEND gives output, maxima and sums of one that has keys."""
    N: gl.constexpr = CALL[1]
    PAGE_SIZE: gl.constexpr = CALL[2]
    CAUSAL: gl.constexpr = CALL[3]
    SPLIT: gl.constexpr = CALL[4]
    BLOCK_M: gl.constexpr = CALL[5]
    BLOCK_N: gl.constexpr = CALL[6]
    A: gl.constexpr = cdna.out_layout(CALL[0], gl.num_warps())
    ROW: gl.constexpr = gl.SliceLayout(1, cdna.score_layout(CALL[0], BLOCK_M, gl.num_warps()))
    out_ptr, part_out_ptr, strides = outs
    lse_ptr, part_ml_ptr = sums
    num_splits, num_programs, num_items = sizes
    max_seqlen_q = lengths[3]
    pid = cdna.dealt(num_programs)
    if part_out_ptr is None:
        block, keys = cdna.item(pid, num_splits, lengths, N, PAGE_SIZE, CAUSAL, BLOCK_M, BLOCK_N)
        if keys[1] <= keys[0]:
            none = gl.zeros([BLOCK_M], gl.float32, layout=ROW)
            out = gl.zeros([BLOCK_M, LKV], gl.float32, layout=A)
            cdna.store_out(out_ptr, out, block, strides, N, BLOCK_M, A)
            m_i = none + LOWEST
            cdna.store_sums(lse_ptr, m_i, none, block, num_splits, N, SPLIT, BLOCK_M, ROW)
            return
        out, m_i, l_i = ATTEND(block, keys, queries, caches, sm_scale, CALL)
        block = cdna.anew(block)
        ORDERED: gl.constexpr = out.type.layout
        cdna.store_out(out_ptr, out, block, strides, N, BLOCK_M, ORDERED)
        cdna.store_sums(lse_ptr, m_i, l_i, block, num_splits, N, SPLIT, BLOCK_M, ROW)
    else:
        tiles = schedule.count_tiles(lengths, num_items, PAGE_SIZE, BLOCK_N, CALL[7], LANES)
        items, ends = schedule.share(
            tiles, pid, num_programs, max_seqlen_q, num_items, part_ml_ptr, N, BLOCK_M, BLOCK_N
        )
        begin, stop, step = items
        begin, stop, step = cdna.uniform(begin), cdna.uniform(stop), cdna.uniform(step)
        key_begin = cdna.uniform(ends[0])
        work = ((begin, stop, step), num_splits, lengths, cdna.uniform(ends[1]))
        for i in range(begin, stop, step):
            block, keys = schedule.item(
                i, key_begin, pid, work, N, PAGE_SIZE, CAUSAL, BLOCK_M, BLOCK_N
            )
            block, keys = _uniform(block, keys)
            key_begin = 0
            if keys[0] < keys[1]:
                cdna.barrier()  # the tiles' LDS may still be read for the block before
                out, m_i, l_i = ATTEND(block, keys, queries, caches, sm_scale, CALL)
                block = cdna.anew(block)
                _store(outs, sums, out, m_i, l_i, block, max_seqlen_q, N, BLOCK_M, ROW)
            else:
                none = gl.zeros([BLOCK_M], gl.float32, layout=ROW)
                zeros = gl.zeros([BLOCK_M, LKV], gl.float32, layout=A)
                _store(outs, sums, zeros, none + LOWEST, none, block, max_seqlen_q, N, BLOCK_M, ROW)
