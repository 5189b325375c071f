"""Instructions across lanes, against AMD's ISA documents: DPP, swaps, matrices, LDS."""

from __future__ import annotations

import struct
from collections.abc import Callable

import numpy as np
import pytest

from tests.cdna.formats import Array
from tests.cdna.golden import machine
from tests.cdna.machine import Machine

LANES = np.arange(64)


@pytest.mark.parametrize(
    ("control", "source"),
    [
        ("quad_perm:[1,0,3,2]", lambda lane: lane ^ 1),
        ("quad_perm:[2,3,0,1]", lambda lane: lane ^ 2),
        ("row_half_mirror", lambda lane: lane ^ 7),
        ("row_mirror", lambda lane: lane ^ 15),
        ("row_shr:4", lambda lane: lane - 4 if lane % 16 >= 4 else None),
        ("row_shl:8", lambda lane: lane + 8 if lane % 16 < 8 else None),
        ("row_ror:12", lambda lane: lane // 16 * 16 + (lane - 12) % 16),
        ("row_newbcast:3", lambda lane: lane // 16 * 16 + 3),
        ("row_bcast:15", lambda lane: lane // 16 * 16 - 1 if lane > 15 else None),
        ("row_bcast:31", lambda lane: 31 if lane > 31 else None),
    ],
)
def test_dpp_moves_lanes(control: str, source: Callable[[int], int | None]) -> None:
    m = machine(f"v_mov_b32_dpp v3, v0 {control} row_mask:0xf bank_mask:0xf bound_ctrl:1")
    m.define(0, (LANES + 100).astype(np.uint32)[None])
    m.run()
    expected = [0 if (at := source(lane)) is None else at + 100 for lane in range(64)]
    assert m.V[3, 0].tolist() == expected


def test_dpp_without_bound_control_keeps_lanes_that_have_no_source() -> None:
    m = machine("v_mov_b32_dpp v3, v0 row_shr:1 row_mask:0x5 bank_mask:0xf")
    m.define(0, (LANES + 100).astype(np.uint32)[None])
    m.define(3, np.full((1, 64), 7, np.uint32))
    m.run()
    expected = [lane + 99 if lane % 16 and lane // 16 in (0, 2) else 7 for lane in range(64)]
    assert m.V[3, 0].tolist() == expected


@pytest.mark.parametrize("rows", [16, 32])
def test_permlane_swap_trades_odd_rows_for_even_ones(rows: int) -> None:
    m = machine(f"v_permlane{rows}_swap_b32_e32 v0, v1")
    m.define(0, LANES.astype(np.uint32)[None])
    m.define(1, (LANES + 100).astype(np.uint32)[None])
    m.run()
    odd = [lane // rows % 2 == 1 for lane in range(64)]
    assert m.V[0, 0].tolist() == [lane - rows + 100 if odd[lane] else lane for lane in range(64)]
    assert m.V[1, 0].tolist() == [lane + 100 if odd[lane] else lane + rows for lane in range(64)]


def test_lanes_by_number() -> None:
    m = machine(
        "s_mov_b64 exec, 0xf0\nv_readfirstlane_b32 s2, v0\nv_readlane_b32 s3, v0, 9\n"
        "v_writelane_b32 v1, s3, 63\nv_mbcnt_lo_u32_b32 v2, -1, 0"
    )
    m.define(0, (LANES + 100).astype(np.uint32)[None])
    m.run()
    assert m.S[2:4, 0].tolist() == [104, 109] and m.V[1, 0, 63] == 109
    assert m.V[2, 0, 4:8].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("M", "K", "fmt", "arch"),
    [
        (16, 16, "bf16", "gfx942"),
        (32, 8, "bf16", "gfx942"),
        (16, 16, "f16", "gfx942"),
        (16, 4, "f32", "gfx942"),
        (32, 2, "f32", "gfx942"),
        (16, 32, "bf16", "gfx950"),
        (32, 16, "f16", "gfx950"),
    ],
)
def test_mfma_is_a_matrix_product(M: int, K: int, fmt: str, arch: str) -> None:
    """Elements at the lanes and registers that AMD's matrix instruction calculator gives."""
    rng = np.random.default_rng(0)
    A, B = rng.integers(-8, 8, (M, K)), rng.integers(-8, 8, (K, M))
    C = rng.integers(-99, 99, (M, M))
    groups = 64 // M
    per_lane = K // groups
    bytes_each = 4 if fmt == "f32" else 2
    count = per_lane * bytes_each // 4
    results = M * M // 64

    def encode(x: int) -> bytes:
        if fmt == "f32":
            return struct.pack("<f", x)
        return struct.pack("<e", x) if fmt == "f16" else struct.pack("<f", x)[2:]

    def register(matrix_at: Callable[[int, int], int]) -> Array:
        lanes = [
            b"".join(encode(matrix_at(lane % M, lane // M * per_lane + k)) for k in range(per_lane))
            for lane in range(64)
        ]
        words = np.frombuffer(b"".join(lanes), np.uint32).reshape(64, count)
        return words.T[:, None]

    def place(lane: int, r: int) -> tuple[int, int]:
        return 4 * groups * (r // 4) + 4 * (lane // M) + r % 4, lane % M

    a, b = register(lambda i, k: int(A[i, k])), register(lambda j, k: int(B[k, j]))
    v = [f"v[{at}:{at + n - 1}]" if n > 1 else f"v{at}" for at, n in ((0, count), (8, count))]
    m = machine(
        f"v_mfma_f32_{M}x{M}x{K}_{fmt} v[32:{31 + results}], {v[0]}, {v[1]}, v[16:{15 + results}]",
        arch,
    )
    for k in range(count):
        m.define(k, a[k])
        m.define(8 + k, b[k])
    for r in range(results):
        values = [float(C[place(lane, r)]) for lane in range(64)]
        m.define(16 + r, np.array([values], np.float32).view(np.uint32))
    m.V[32 : 32 + results] = 0
    m.run()
    D = A @ B + C
    for r in range(results):
        expected = [float(D[place(lane, r)]) for lane in range(64)]
        assert m.V[32 + r, 0].view(np.float32).tolist() == expected


def test_mfma_ignores_exec() -> None:
    m = machine("s_mov_b64 exec, 1\nv_mfma_f32_16x16x4_f32 v[4:7], v0, v1, 1.0")
    m.run()
    assert (m.V[4:8, 0].view(np.float32) == 1).all()


def lds_machine(text: str, words: Array, arch: str = "gfx950") -> Machine:
    m = machine(text, arch, lds=4 * len(words))
    m.lds.data[0, : len(words)] = words
    m.lds.writer[:] = 0
    return m


def test_lds_reads_of_every_width() -> None:
    text = """ds_read_b128 v[4:7], v0 offset:16
ds_read_u16 v8, v0 offset:6
ds_read_i8 v9, v0 offset:1
ds_read_u16_d16_hi v10, v0 offset:2
ds_read2_b32 v[12:13], v0 offset0:1 offset1:3
ds_read2st64_b64 v[14:17], v0 offset1:1
s_waitcnt lgkmcnt(0)"""
    words = np.arange(256, dtype=np.uint32) * 0x01010101
    words[0] = 0x8765F321
    m = lds_machine(text, words)
    m.define(0, np.zeros((1, 64), np.uint32))
    m.define(10, np.full((1, 64), 0xAAAABBBB, np.uint32))
    m.run()
    got = [hex(m.V[reg, 0, 5]) for reg in (4, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17)]
    expected = [words[4], words[7], 0x0101, 0xFFFFFFF3, 0x8765BBBB, words[1], words[3]]
    expected += [words[0], words[1], words[128], words[129]]
    assert got == [hex(x) for x in expected]


def test_transposed_lds_reads_give_lane_j_column_j() -> None:
    """16 lanes hold 4 rows of 16 elements, 4 lanes a row; lane j gets column j."""
    m = lds_machine(
        "ds_read_b64_tr_b16 v[4:5], v0\ns_waitcnt lgkmcnt(0)",
        np.arange(256, dtype=np.uint16).view(np.uint32),
    )
    m.define(0, (LANES * 8).astype(np.uint32)[None])
    m.run()
    for lane in range(64):
        block, column = divmod(lane, 16)
        elements = [block * 64 + row * 16 + column for row in range(4)]
        assert m.V[4, 0, lane] == elements[0] | elements[1] << 16
        assert m.V[5, 0, lane] == elements[2] | elements[3] << 16


def test_lane_permutes_through_the_lds_crossbar() -> None:
    m = machine(
        "ds_bpermute_b32 v2, v1, v0\nds_permute_b32 v3, v1, v0\n"
        "ds_swizzle_b32 v4, v0 offset:swizzle(SWAP,16)\ns_waitcnt lgkmcnt(0)"
    )
    m.define(0, (LANES + 100).astype(np.uint32)[None])
    m.define(1, ((LANES * 5 + 3) % 64 * 4).astype(np.uint32)[None])
    m.run()
    assert m.V[2, 0].tolist() == [(5 * lane + 3) % 64 + 100 for lane in range(64)]
    assert [m.V[3, 0, (5 * lane + 3) % 64] for lane in range(64)] == [x + 100 for x in range(64)]
    assert m.V[4, 0].tolist() == [(lane ^ 16) + 100 for lane in range(64)]
