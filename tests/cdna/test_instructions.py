"""Single instructions against what AMD's ISA documents say, with results worked out by hand or
spelled out element by element; never by the emulator's own functions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.cdna.asm import SGPR, Unknown
from tests.cdna.golden import bits, machine

ONE, TWO, HALF, NAN, INF = 0x3F800000, 0x40000000, 0x3F000000, 0x7FC00000, 0x7F800000


SCALAR = [  # text, s0, s1 (and SCC before) -> s2, SCC after; None: as it was
    ("s_add_u32 s2, s0, s1", 0xFFFFFFFF, 2, 0, 1, 1),
    ("s_add_u32 s2, s0, s1", 5, 7, 0, 12, 0),
    ("s_addc_u32 s2, s0, s1", 5, 7, 1, 13, 0),
    ("s_addc_u32 s2, s0, s1", 0xFFFFFFFF, 0, 1, 0, 1),
    ("s_sub_u32 s2, s0, s1", 3, 5, 0, 0xFFFFFFFE, 1),
    ("s_subb_u32 s2, s0, s1", 5, 3, 1, 1, 0),
    ("s_add_i32 s2, s0, s1", 0x7FFFFFFF, 1, 0, 0x80000000, 1),
    ("s_sub_i32 s2, s0, s1", 0, 0x80000000, 0, 0x80000000, 1),
    ("s_mul_i32 s2, s0, s1", 0xFFFFFFFF, 7, 1, 0xFFFFFFF9, None),
    ("s_mul_hi_u32 s2, s0, s1", 0xFFFFFFFF, 0xFFFFFFFF, 1, 0xFFFFFFFE, None),
    ("s_mul_hi_i32 s2, s0, s1", 0xFFFFFFFF, 5, 1, 0xFFFFFFFF, None),
    ("s_ashr_i32 s2, s0, s1", 0x80000000, 31, 0, 0xFFFFFFFF, 1),
    ("s_lshr_b32 s2, s0, s1", 0x80000000, 31, 0, 1, 1),
    ("s_lshl_b32 s2, s0, s1", 3, 33, 0, 6, 1),  # five bits of the amount count
    ("s_and_b32 s2, s0, s1", 12, 3, 1, 0, 0),
    ("s_andn2_b32 s2, s0, s1", 0xFF, 0x0F, 0, 0xF0, 1),
    ("s_xor_b32 s2, s0, s1", 5, 5, 1, 0, 0),
    ("s_bfe_u32 s2, s0, 0x80004", 0x12345678, 0, 0, 0x67, 1),
    ("s_bfe_i32 s2, s0, 0x40004", 0x000000F0, 0, 0, 0xFFFFFFFF, 1),
    ("s_min_i32 s2, s0, s1", 0xFFFFFFFF, 1, 0, 0xFFFFFFFF, 1),
    ("s_max_u32 s2, s0, s1", 0xFFFFFFFF, 1, 0, 0xFFFFFFFF, 1),
    ("s_abs_i32 s2, s0", 0xFFFFFFFB, 0, 0, 5, 1),
    ("s_cselect_b32 s2, s0, s1", 11, 22, 1, 11, None),
    ("s_cselect_b32 s2, s0, s1", 11, 22, 0, 22, None),
    ("s_lshl2_add_u32 s2, s0, s1", 3, 5, 0, 17, 0),
    ("s_movk_i32 s2, 0x8000", 0, 0, 1, 0xFFFF8000, None),
    ("s_bcnt1_i32_b32 s2, s0", 0xF0F0, 0, 0, 8, 1),
    ("s_ff1_i32_b32 s2, s0", 0x00000100, 0, 1, 8, None),
    ("s_ff1_i32_b32 s2, s0", 0, 0, 1, 0xFFFFFFFF, None),
    ("s_flbit_i32_b32 s2, s0", 0x00010000, 0, 1, 15, None),
    ("s_brev_b32 s2, s0", 0x80000001, 0, 0, 0x80000001, None),
    ("s_brev_b32 s2, s0", 0x00000002, 0, 0, 0x40000000, None),
    ("s_cmp_lt_i32 s0, s1", 0xFFFFFFFF, 0, 0, 0, 1),
    ("s_cmp_lt_u32 s0, s1", 0xFFFFFFFF, 0, 1, 0, 0),
    ("s_bitcmp1_b32 s0, s1", 4, 2, 0, 0, 1),
]


@pytest.mark.parametrize(("text", "x", "y", "scc", "expected", "scc_after"), SCALAR)
def test_scalar(text: str, x: int, y: int, scc: int, expected: int, scc_after: int | None) -> None:
    m = machine(text)
    m.define(SGPR, np.full(1, x, np.uint32))
    m.define(SGPR + 1, np.full(1, y, np.uint32))
    m.scc[:] = scc
    m.run()
    assert hex(m.S[2, 0]) == hex(expected)
    assert m.scc[0] == (scc if scc_after is None else scc_after)


VECTOR = [  # text, v0, v1, v2 -> v3
    ("v_add_f32_e32 v3, v0, v1", ONE, TWO, 0, bits(3.0)),
    ("v_sub_f32_e64 v3, v0, |v1|", ONE, bits(-2.0), 0, bits(-1.0)),
    ("v_add_f32_e64 v3, v0, -v1 clamp", ONE, TWO, 0, 0),
    ("v_sub_u32_e64 v3, v0, v1 clamp", 7, 9, 0, 0),
    ("v_sub_u32_e64 v3, v0, v1 clamp", 9, 7, 0, 2),
    ("v_mul_f32_e64 v3, v0, v1 mul:2", TWO, TWO, 0, bits(8.0)),
    ("v_mul_f32_e64 v3, v0, v1 div:2", TWO, TWO, 0, bits(2.0)),
    ("v_fma_f32 v3, v0, v1, -v2", bits(1 + 2**-23), bits(1 + 2**-23), ONE, bits(2**-22 + 2**-46)),
    ("v_max_f32_e32 v3, v0, v1", NAN, ONE, 0, ONE),
    ("v_max3_f32 v3, v0, v1, v2", ONE, TWO, HALF, TWO),
    ("v_med3_f32 v3, v0, v1, v2", ONE, TWO, HALF, ONE),
    ("v_exp_f32_e32 v3, v0", bits(-3.0), 0, 0, bits(0.125)),
    ("v_exp_f32_e32 v3, v0", bits(-math.inf), 0, 0, 0),
    ("v_log_f32_e32 v3, v0", bits(8.0), 0, 0, bits(3.0)),
    ("v_rcp_f32_e32 v3, v0", bits(-4.0), 0, 0, bits(-0.25)),
    ("v_ldexp_f32 v3, v0, v1", bits(1.5), 0xFFFFFFFF, 0, bits(0.75)),
    ("v_div_fixup_f32 v3, v0, v1, v2", bits(7.0), 0, ONE, INF),  # 1 / 0
    ("v_div_fixup_f32 v3, v0, v1, v2", bits(7.0), TWO, bits(-0.0), bits(-0.0)),
    ("v_cvt_f32_i32_e32 v3, v0", 0xFFFFFFFE, 0, 0, bits(-2.0)),
    ("v_cvt_f32_u32_e32 v3, v0", 0xFFFFFFFF, 0, 0, bits(2.0**32)),
    ("v_cvt_i32_f32_e32 v3, v0", bits(-2.9), 0, 0, 0xFFFFFFFE),
    ("v_cvt_i32_f32_e32 v3, v0", bits(3e9), 0, 0, 0x7FFFFFFF),
    ("v_cvt_u32_f32_e32 v3, v0", bits(-1.0), 0, 0, 0),
    ("v_cvt_u32_f32_e32 v3, v0", NAN, 0, 0, 0),
    ("v_cvt_f32_f16_e32 v3, v0", 0x3C00, 0, 0, ONE),
    ("v_cvt_f16_f32_e32 v3, v0", bits(65520.0), 0, 0, 0x7C00),
    ("v_cvt_pkrtz_f16_f32 v3, v0, v1", bits(1 + 2**-10 + 2**-11), ONE, 0, 0x3C003C01),
    # Halfway between two bf16: to the even one, up and down.
    ("v_cvt_pk_bf16_f32 v3, v0, v1", 0x3F808000, 0x3F818000, 0, 0x3F823F80),
    ("v_fma_mixlo_f16 v3, v0, v1, v2 op_sel_hi:[1,0,0]", 0x4000, bits(3.0), ONE, 0x4700),
    ("v_and_or_b32 v3, v0, v1, v2", 0xFF00, 0x0FF0, 0x000F, 0x0F0F),
    ("v_lshl_or_b32 v3, v0, v1, v2", 3, 4, 1, 0x31),
    ("v_lshl_add_u32 v3, v0, v1, v2", 3, 4, 2, 50),
    ("v_add_lshl_u32 v3, v0, v1, v2", 3, 4, 2, 28),
    ("v_xad_u32 v3, v0, v1, v2", 6, 3, 10, 15),
    ("v_add3_u32 v3, v0, v1, v2", 0xFFFFFFFF, 1, 5, 5),
    ("v_or3_b32 v3, v0, v1, v2", 1, 2, 4, 7),
    ("v_lshlrev_b32_e32 v3, v0, v1", 36, 1, 0, 16),  # the amount comes first, five bits of it
    ("v_ashrrev_i32_e32 v3, v0, v1", 4, 0x80000000, 0, 0xF8000000),
    ("v_subrev_u32_e32 v3, v0, v1", 3, 10, 0, 7),
    ("v_mul_lo_u32 v3, v0, v1", 0x10001, 0x10001, 0, 0x20001),
    ("v_mul_hi_u32 v3, v0, v1", 0x80000000, 6, 0, 3),
    ("v_mul_hi_i32 v3, v0, v1", 0xFFFFFFFF, 6, 0, 0xFFFFFFFF),
    ("v_mul_u32_u24_e32 v3, v0, v1", 0xFF000003, 5, 0, 15),
    ("v_mad_i32_i24 v3, v0, v1, v2", 0x00FFFFFF, 5, 7, 2),
    ("v_bfe_u32 v3, v0, v1, v2", 0x12345678, 8, 8, 0x56),
    ("v_bfe_i32 v3, v0, v1, v2", 0x0000F000, 12, 4, 0xFFFFFFFF),
    ("v_bfi_b32 v3, v0, v1, v2", 0x0000FFFF, 0x11111111, 0x22222222, 0x22221111),
    ("v_alignbit_b32 v3, v0, v1, v2", 0x1, 0x80000000, 31, 3),
    ("v_alignbyte_b32 v3, v0, v1, v2", 0x11223344, 0xAABBCCDD, 1, 0x44AABBCC),
    # Selectors 0-3 take bytes of v1, 4-7 of v0, 8-11 signs, 12 zero, 13 and above ones.
    ("v_perm_b32 v3, v0, v1, v2", 0x77665544, 0x33221100, 0x07040300, 0x77443300),
    ("v_perm_b32 v3, v0, v1, v2", 0x80000000, 0x00008000, 0x0D0C0B08, 0xFF00FFFF),
    ("v_bitop3_b32 v3, v0, v1, v2 bitop3:0x6c", 0xF0F0F0F0, 0xCCCCCCCC, 0xAAAAAAAA, 0x6C6C6C6C),
    ("v_bitop3_b32 v3, v0, v1, v2 bitop3:0x96", 0xF, 0x3, 0x1, 0xF ^ 0x3 ^ 0x1),
    ("v_bcnt_u32_b32 v3, v0, v1", 0xFF, 3, 0, 11),
    ("v_bfrev_b32_e32 v3, v0", 0x1, 0, 0, 0x80000000),
    ("v_ffbh_u32_e32 v3, v0", 0x00008000, 0, 0, 16),
    ("v_cndmask_b32_e64 v3, v0, v1, vcc", 1, 2, 0, 1),  # VCC is zero
    ("v_add_u16_e32 v3, v0, v1", 0xFFFF, 2, 0, 1),
    ("v_pack_b32_f16 v3, v0, v1", 0x1111, 0x2222, 0, 0x22221111),
    ("v_pk_add_u16 v3, v0, v1", 0x0001FFFF, 0x00020001, 0, 0x00030000),
    ("v_pk_mul_f16 v3, v0, v1 op_sel_hi:[0,1]", 0x00004000, 0x42004400, 0, 0x46004800),
    ("v_cvt_f32_ubyte2_e32 v3, v0", 0x00FF0000, 0, 0, bits(255.0)),
    (
        "v_and_b32_sdwa v3, v0, v1 dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:WORD_1 "
        "src1_sel:DWORD",
        0xABCD1234,
        0xFFFF,
        0,
        0xABCD,
    ),
    (
        "v_add_u32_sdwa v3, v0, v1 dst_sel:BYTE_1 dst_unused:UNUSED_PAD src0_sel:BYTE_0 "
        "src1_sel:BYTE_3",
        0x11,
        0x22000000,
        0,
        0x3300,
    ),
]


@pytest.mark.parametrize(("text", "x", "y", "z", "expected"), VECTOR)
def test_vector(text: str, x: int, y: int, z: int, expected: int) -> None:
    m = machine(text)
    for reg, value in enumerate((x, y, z)):
        m.define(reg, np.full((1, 64), value, np.uint32))
    m.run()
    assert {hex(v) for v in m.V[3, 0]} == {hex(expected)}


def test_vector_instructions_leave_dead_lanes_alone() -> None:
    m = machine("s_mov_b64 exec, 5\nv_mov_b32_e32 v3, 7")
    m.run()
    assert m.V[3, 0].nonzero()[0].tolist() == [0, 2]


def test_compares_write_zero_for_dead_lanes() -> None:
    m = machine("s_mov_b64 exec, 5\nv_cmp_eq_u32_e32 vcc, 0, v0\ns_mov_b64 s[2:3], vcc")
    m.run()
    assert m.S[2:4, 0].tolist() == [5, 0]


@pytest.mark.parametrize(
    ("op", "x", "y", "expected"),
    [
        ("lt_f32", bits(1.0), bits(2.0), True),
        ("lt_f32", NAN, bits(2.0), False),
        ("nge_f32", NAN, bits(2.0), True),
        ("u_f32", NAN, ONE, True),
        ("o_f32", ONE, ONE, True),
        ("lg_f32", NAN, ONE, False),
        ("neq_f32", NAN, ONE, True),
        ("gt_i32", 1, 0xFFFFFFFF, True),
        ("gt_u32", 1, 0xFFFFFFFF, False),
        ("lt_i16", 0x0000FFFF, 0, True),
    ],
)
def test_compare(op: str, x: int, y: int, expected: bool) -> None:
    m = machine(f"v_cmp_{op}_e32 vcc, v0, v1\ns_mov_b64 s[2:3], vcc")
    m.define(0, np.full((1, 64), x, np.uint32))
    m.define(1, np.full((1, 64), y, np.uint32))
    m.run()
    assert m.S[2:4, 0].tolist() == [0xFFFFFFFF * expected] * 2


def test_carries_chain_through_vcc() -> None:
    m = machine("v_add_co_u32_e32 v3, vcc, v0, v1\nv_addc_co_u32_e32 v4, vcc, v2, v2, vcc")
    for reg, value in enumerate((0xFFFFFFFF, 1, 7)):
        m.define(reg, np.full((1, 64), value, np.uint32))
    m.run()
    assert (m.V[3, 0] == 0).all() and (m.V[4, 0] == 15).all()


def test_64_bit_multiply_add() -> None:
    m = machine(
        "v_mad_u64_u32 v[4:5], s[0:1], v0, v1, v[2:3]\nv_mad_i64_i32 v[6:7], s[0:1], v0, v1, 0"
    )
    for reg, value in enumerate((0xFFFFFFFF, 3, 5, 1)):
        m.define(reg, np.full((1, 64), value, np.uint32))
    m.run()
    unsigned = 0xFFFFFFFF * 3 + (1 << 32) + 5
    assert (m.V[4, 0, 0], m.V[5, 0, 0]) == (unsigned & 0xFFFFFFFF, unsigned >> 32)
    assert (m.V[6, 0, 0], m.V[7, 0, 0]) == (0xFFFFFFFD, 0xFFFFFFFF)


def test_division_by_the_sequence_of_the_compiler() -> None:
    """x / y correctly rounded, also where the quotient or the reciprocal is denormal."""
    text = """v_div_scale_f32 v3, s[0:1], v1, v1, v0
v_div_scale_f32 v4, vcc, v0, v1, v0
v_rcp_f32_e32 v5, v3
v_fma_f32 v6, -v3, v5, 1.0
v_fmac_f32_e32 v5, v6, v5
v_mul_f32_e32 v6, v4, v5
v_fma_f32 v7, -v3, v6, v4
v_fmac_f32_e32 v6, v7, v5
v_fma_f32 v3, -v3, v6, v4
v_div_fmas_f32 v3, v3, v5, v6
v_div_fixup_f32 v3, v3, v1, v0"""
    x = np.array([1, 3, 1e-38, 1e38, 1, 0, 1, 5e-39, 2, -7], np.float32)
    y = np.array([3, 7, 3, 1e-3, 1e38, 5, 0, 2, 3e38, 3], np.float32)
    m = machine(text)
    for reg, values in enumerate((x, y)):
        m.define(reg, np.resize(values, (1, 64)).view(np.uint32))
    m.run()
    with np.errstate(all="ignore"):
        expected = (x.astype(np.float64) / y).astype(np.float32)
    assert m.V[3, 0, :10].view(np.float32).tolist() == expected.tolist()


def test_packed_fp32_picks_halves_and_signs() -> None:
    m = machine("v_pk_fma_f32 v[6:7], v[0:1], v[2:3], v[4:5] op_sel_hi:[0,1,1] neg_lo:[0,0,1]")
    for reg, value in enumerate((2.0, 99.0, 3.0, 5.0, 1.0, 7.0)):
        m.define(reg, np.full((1, 64), bits(value), np.uint32))
    m.run()
    assert m.V[6:8, 0, 0].view(np.float32).tolist() == [2 * 3 - 1, 2 * 5 + 7]


FP8 = [  # arch, format, code -> value; the first two of CDNA3, the others OCP
    ("gfx942", "fp8", 0x38, 0.5),
    ("gfx942", "fp8", 0x7F, 240.0),
    ("gfx942", "fp8", 0x80, math.nan),
    ("gfx942", "bf8", 0x7F, 57344.0),
    ("gfx950", "fp8", 0x38, 1.0),
    ("gfx950", "fp8", 0x7E, 448.0),
    ("gfx950", "fp8", 0x7F, math.nan),
    ("gfx950", "fp8", 0x01, 2.0**-9),
    ("gfx950", "bf8", 0x7B, 57344.0),
    ("gfx950", "bf8", 0xFC, -math.inf),
]


@pytest.mark.parametrize(("arch", "fmt", "code", "value"), FP8)
def test_fp8_to_float(arch: str, fmt: str, code: int, value: float) -> None:
    m = machine(f"v_cvt_pk_f32_{fmt}_e32 v[2:3], v0", arch)
    m.define(0, np.full((1, 64), code << 8, np.uint32))
    m.run()
    low, high = m.V[2:4, 0, 0].view(np.float32).tolist()
    assert low == 0 and (high == value or (math.isnan(value) and math.isnan(high)))


@pytest.mark.parametrize(
    ("arch", "fmt", "value", "code"),
    [
        ("gfx950", "fp8", 1.0625, 0x38),  # halfway between 1 and 1.125: to even
        ("gfx950", "fp8", 1.1875, 0x3A),  # halfway between 1.125 and 1.25: to even
        ("gfx950", "fp8", 1e6, 0x7E),
        ("gfx950", "fp8", -0.0, 0x80),
        ("gfx942", "fp8", -0.0, 0x00),
        ("gfx942", "fp8", math.nan, 0x80),
    ],
)
def test_float_to_fp8(arch: str, fmt: str, value: float, code: int) -> None:
    m = machine(f"v_cvt_pk_{fmt}_f32 v3, v0, v1 op_sel:[0,0,1]", arch)
    m.define(0, np.full((1, 64), bits(value), np.uint32))
    m.define(3, np.full((1, 64), 0x1234, np.uint32))
    m.run()
    assert hex(m.V[3, 0, 0]) == hex(code << 16 | 0x1234)


def test_an_unknown_instruction_is_named() -> None:
    with pytest.raises(Unknown, match="v_frobnicate_b32 v0, v1"):
        machine("v_frobnicate_b32 v0, v1").run()
