"""Vector arithmetic: one table of functions, and the modifiers that VOP3, SDWA and DPP put around it.

Type letters: u, i, f of 32 bits; w, s, h of the low 16; U, I, F of a pair of registers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.cdna import lanes
from tests.cdna.asm import VCC, Instruction, Operand, Unknown
from tests.cdna.formats import (
    FP8,
    Array,
    f32,
    f64,
    from_bf16,
    from_f16,
    halves,
    i32,
    i64,
    lanes_of,
    mask_of,
    pair,
    to_bf16,
    to_f16,
    to_fp8,
    u32,
    u64,
)
from tests.cdna.machine import Machine, Step, constant
from tests.cdna.scalar import (
    FIVE,
    field,
    first_one,
    high,
    high_unsigned,
    leading_zeros,
    reverse,
    signed_field,
)

Fn = Callable[..., Any]
SIX = u32(63)
DTYPES: dict[str, Any] = {"u": u32, "i": i32, "f": f32, "U": u64, "I": i64, "F": f64}
SIGN = {"f": u32(1 << 31), "h": u32(1 << 15), "F": u64(1 << 63)}


def fma(x: Array, y: Array, z: Array) -> Array:
    return (x.astype(f64) * y + z).astype(f32)


def limits(x: Array, low: int, high: int) -> Array:
    """Truncate to an integer, saturate, NaN to 0."""
    return np.clip(np.trunc(np.nan_to_num(x.astype(f64), nan=0.0)), low, high).astype(i64)


def low24(x: Array) -> Array:
    return x & u32(0xFFFFFF)


def signed24(x: Array) -> Array:
    return (x << 8 >> 8).astype(i64)


def permute_bytes(x: Array, y: Array, select: Array) -> Array:
    """Bytes of y, then of x, then signs, 0x00 and 0xff, by each byte of select."""
    source, result = pair(y, x), u32(0)
    for at in range(4):
        choice = (select >> u32(8 * at) & u32(255)).astype(u64)
        octet = source >> (np.minimum(choice, u64(7)) * u64(8)) & u64(255)
        odd = (np.clip(choice, u64(8), u64(11)) - u64(8)) * u64(16) + u64(15)
        sign = np.where(source >> odd & u64(1), u64(255), u64(0))
        octet = np.where(choice >= 8, sign, octet)
        octet = np.where(choice == 12, u64(0), np.where(choice > 12, u64(255), octet))
        result = result | octet.astype(u32) << u32(8 * at)
    return np.asarray(result)


def median(x: Array, y: Array, z: Array) -> Array:
    return np.fmax(np.fmin(x, y), np.fmin(np.fmax(x, y), z))


def div_fixup(quotient: Array, denominator: Array, numerator: Array) -> Array:
    sign = np.where(np.signbit(denominator) != np.signbit(numerator), f32(-1), f32(1))
    result = np.abs(quotient) * sign
    result = np.where((denominator == 0) | np.isinf(numerator), f32(np.inf) * sign, result)
    result = np.where((numerator == 0) | np.isinf(denominator), f32(0) * sign, result)
    zeros = (denominator == 0) & (numerator == 0)
    infinities = np.isinf(denominator) & np.isinf(numerator)
    nan = np.isnan(denominator) | np.isnan(numerator) | zeros | infinities
    return np.where(nan, f32(np.nan), result)


def div_scale(x: Array, denominator: Array, numerator: Array) -> tuple[Array, Array]:
    """x (one of the other two) scaled out of the way of denormals; True where the quotient must be."""
    tiny = f32(np.finfo(f32).tiny)
    exponent = [np.frexp(v)[1] for v in (numerator, denominator)]
    inverse = np.abs(1.0 / denominator.astype(f64)) < tiny
    quotient = np.abs(numerator.astype(f64) / denominator) < tiny
    far = exponent[0] - exponent[1] >= 96
    cases = [
        ((denominator == 0) | (numerator == 0), f32(np.nan) * x, False),
        (far, np.where(x == denominator, np.ldexp(x, 64), x), True),
        (np.abs(denominator) < tiny, np.ldexp(x, 64), False),
        (inverse & quotient, np.where(x == denominator, np.ldexp(x, 64), x), True),
        (inverse, np.ldexp(x, -64), False),
        (quotient, np.where(x == numerator, np.ldexp(x, 64), x), True),
        (exponent[0] + 126 <= 23, np.ldexp(x, 64), False),
    ]
    result, flag = x, np.zeros(np.shape(x), bool)
    for condition, value, scaled in reversed(cases):
        result = np.where(condition, value, result)
        flag = np.where(condition, scaled, flag)
    return result.astype(f32), flag


def toward_zero_f16(x: Array) -> Array:
    bits = to_f16(x)
    beyond = np.abs(from_f16(bits)) > np.abs(x)
    return np.where(beyond, bits - u32(1), bits)


def packed(convert: Fn) -> Fn:
    return lambda x, y: convert(x) | convert(y) << u32(16)


def dot2(x: Array, y: Array, z: Array) -> Array:
    low = from_bf16(x & u32(0xFFFF)) * from_bf16(y & u32(0xFFFF))
    return low + from_bf16(x >> u32(16)) * from_bf16(y >> u32(16)) + z


def byte_to_float(at: int) -> Fn:
    return lambda x: (x >> u32(8 * at) & u32(255)).astype(f32)


def shift(fn: Fn) -> Fn:
    """Shifts take the amount first."""
    return lambda by, x: fn(x, (by & u32(8 * x.itemsize - 1)).astype(x.dtype))


TABLE: dict[str, tuple[str, str, Fn]] = {
    "v_mov_b32": ("u", "u", lambda x: x),
    "v_mov_b64": ("U", "U", lambda x: x),
    "v_accvgpr_read_b32": ("u", "u", lambda x: x),
    "v_accvgpr_write_b32": ("u", "u", lambda x: x),
    "v_accvgpr_mov_b32": ("u", "u", lambda x: x),
    "v_not_b32": ("u", "u", lambda x: ~x),
    "v_bfrev_b32": ("u", "u", reverse),
    "v_ffbh_u32": ("u", "u", leading_zeros),
    "v_ffbl_b32": ("u", "u", first_one),
    # floats
    "v_add_f32": ("f", "ff", np.add),
    "v_sub_f32": ("f", "ff", np.subtract),
    "v_subrev_f32": ("f", "ff", lambda x, y: y - x),
    "v_mul_f32": ("f", "ff", np.multiply),
    "v_mul_legacy_f32": ("f", "ff", lambda x, y: np.where((x == 0) | (y == 0), f32(0), x * y)),
    "v_max_f32": ("f", "ff", np.fmax),
    "v_min_f32": ("f", "ff", np.fmin),
    "v_max3_f32": ("f", "fff", lambda x, y, z: np.fmax(np.fmax(x, y), z)),
    "v_min3_f32": ("f", "fff", lambda x, y, z: np.fmin(np.fmin(x, y), z)),
    "v_med3_f32": ("f", "fff", median),
    "v_maximum3_f32": ("f", "fff", lambda x, y, z: np.maximum(np.maximum(x, y), z)),
    "v_minimum3_f32": ("f", "fff", lambda x, y, z: np.minimum(np.minimum(x, y), z)),
    "v_fma_f32": ("f", "fff", fma),
    "v_fmamk_f32": ("f", "fff", fma),
    "v_fmaak_f32": ("f", "fff", fma),
    "v_div_fixup_f32": ("f", "fff", div_fixup),
    "v_exp_f32": ("f", "f", lambda x: np.exp2(x.astype(f64)).astype(f32)),
    "v_log_f32": ("f", "f", lambda x: np.log2(x.astype(f64)).astype(f32)),
    "v_rcp_f32": ("f", "f", lambda x: (1 / x.astype(f64)).astype(f32)),
    "v_rcp_iflag_f32": ("f", "f", lambda x: (1 / x.astype(f64)).astype(f32)),
    "v_rsq_f32": ("f", "f", lambda x: (1 / np.sqrt(x.astype(f64))).astype(f32)),
    "v_sqrt_f32": ("f", "f", np.sqrt),
    "v_floor_f32": ("f", "f", np.floor),
    "v_ceil_f32": ("f", "f", np.ceil),
    "v_trunc_f32": ("f", "f", np.trunc),
    "v_rndne_f32": ("f", "f", np.rint),
    "v_fract_f32": ("f", "f", lambda x: x - np.floor(x)),
    "v_ldexp_f32": ("f", "fi", lambda x, e: np.ldexp(x.astype(f64), e).astype(f32)),
    "v_frexp_mant_f32": ("f", "f", lambda x: np.frexp(x)[0]),
    "v_frexp_exp_i32_f32": ("i", "f", lambda x: np.frexp(x)[1].astype(i32)),
    "v_add_f16": ("h", "hh", np.add),
    "v_sub_f16": ("h", "hh", np.subtract),
    "v_mul_f16": ("h", "hh", np.multiply),
    "v_max_f16": ("h", "hh", np.fmax),
    "v_min_f16": ("h", "hh", np.fmin),
    # conversions
    "v_cvt_f32_i32": ("f", "i", lambda x: x.astype(f32)),
    "v_cvt_f32_u32": ("f", "u", lambda x: x.astype(f32)),
    "v_cvt_i32_f32": ("i", "f", lambda x: limits(x, -(2**31), 2**31 - 1).astype(i32)),
    "v_cvt_u32_f32": ("u", "f", lambda x: limits(x, 0, 2**32 - 1).astype(u32)),
    "v_cvt_f32_f16": ("f", "h", lambda x: x),
    "v_cvt_f16_f32": ("h", "f", lambda x: x),
    "v_cvt_f32_bf16": ("f", "u", from_bf16),
    "v_cvt_pk_bf16_f32": ("u", "ff", packed(to_bf16)),
    "v_cvt_pk_f16_f32": ("u", "ff", packed(to_f16)),
    "v_cvt_pkrtz_f16_f32": ("u", "ff", packed(toward_zero_f16)),
    **{f"v_cvt_f32_ubyte{at}": ("f", "u", byte_to_float(at)) for at in range(4)},
    "v_cvt_f64_i32": ("F", "i", lambda x: x.astype(f64)),
    "v_cvt_f64_u32": ("F", "u", lambda x: x.astype(f64)),
    "v_cvt_f64_f32": ("F", "f", lambda x: x.astype(f64)),
    # integers
    "v_add_u32": ("u", "uu", np.add),
    "v_sub_u32": ("u", "uu", np.subtract),
    "v_subrev_u32": ("u", "uu", lambda x, y: y - x),
    "v_add_i32": ("u", "uu", np.add),
    "v_sub_i32": ("u", "uu", np.subtract),
    "v_add3_u32": ("u", "uuu", lambda x, y, z: x + y + z),
    "v_lshl_add_u32": ("u", "uuu", lambda x, by, z: (x << (by & FIVE)) + z),
    "v_add_lshl_u32": ("u", "uuu", lambda x, y, by: x + y << (by & FIVE)),
    "v_lshl_or_b32": ("u", "uuu", lambda x, by, z: x << (by & FIVE) | z),
    "v_and_or_b32": ("u", "uuu", lambda x, y, z: x & y | z),
    "v_or3_b32": ("u", "uuu", lambda x, y, z: x | y | z),
    "v_xad_u32": ("u", "uuu", lambda x, y, z: (x ^ y) + z),
    "v_and_b32": ("u", "uu", lambda x, y: x & y),
    "v_or_b32": ("u", "uu", lambda x, y: x | y),
    "v_xor_b32": ("u", "uu", lambda x, y: x ^ y),
    "v_xnor_b32": ("u", "uu", lambda x, y: ~(x ^ y)),
    "v_lshlrev_b32": ("u", "uu", shift(np.left_shift)),
    "v_lshrrev_b32": ("u", "uu", shift(np.right_shift)),
    "v_ashrrev_i32": ("i", "ui", shift(np.right_shift)),
    "v_lshlrev_b64": ("U", "uU", shift(np.left_shift)),
    "v_lshrrev_b64": ("U", "uU", shift(np.right_shift)),
    "v_ashrrev_i64": ("I", "uI", shift(np.right_shift)),
    "v_lshl_add_u64": ("U", "UuU", lambda x, by, z: (x << (by & u32(7)).astype(u64)) + z),
    "v_mul_lo_u32": ("u", "uu", np.multiply),
    "v_mul_hi_u32": ("u", "uu", high_unsigned),
    "v_mul_hi_i32": ("u", "ii", high),
    "v_mul_u32_u24": ("u", "uu", lambda x, y: low24(x) * low24(y)),
    "v_mul_i32_i24": ("i", "ii", lambda x, y: (signed24(x) * signed24(y)).astype(i32)),
    "v_mad_u32_u24": ("u", "uuu", lambda x, y, z: low24(x) * low24(y) + z),
    "v_mad_i32_i24": ("i", "iii", lambda x, y, z: (signed24(x) * signed24(y) + z).astype(i32)),
    "v_mad_u32_u16": ("u", "wwu", lambda x, y, z: x * y + z),
    "v_bfe_u32": ("u", "uuu", lambda x, at, n: field(x, at & FIVE, n & FIVE)),
    "v_bfe_i32": ("u", "uuu", lambda x, at, n: signed_field(x, at & FIVE, n & FIVE)),
    "v_bfi_b32": ("u", "uuu", lambda mask, x, y: mask & x | ~mask & y),
    "v_bfm_b32": ("u", "uu", lambda n, at: (u32(1) << (n & FIVE)) - u32(1) << (at & FIVE)),
    "v_bcnt_u32_b32": ("u", "uu", lambda x, y: np.bitwise_count(x).astype(u32) + y),
    "v_perm_b32": ("u", "uuu", permute_bytes),
    "v_alignbit_b32": (
        "u",
        "uuu",
        lambda x, y, by: (pair(y, x) >> (by & FIVE).astype(u64)).astype(u32),
    ),
    "v_alignbyte_b32": (
        "u",
        "uuu",
        lambda x, y, by: (pair(y, x) >> (by & u32(3)).astype(u64) * u64(8)).astype(u32),
    ),
    "v_max_i32": ("i", "ii", np.maximum),
    "v_min_i32": ("i", "ii", np.minimum),
    "v_max_u32": ("u", "uu", np.maximum),
    "v_min_u32": ("u", "uu", np.minimum),
    "v_max3_i32": ("i", "iii", lambda x, y, z: np.maximum(np.maximum(x, y), z)),
    "v_min3_i32": ("i", "iii", lambda x, y, z: np.minimum(np.minimum(x, y), z)),
    "v_max3_u32": ("u", "uuu", lambda x, y, z: np.maximum(np.maximum(x, y), z)),
    "v_min3_u32": ("u", "uuu", lambda x, y, z: np.minimum(np.minimum(x, y), z)),
    "v_add_u16": ("w", "ww", np.add),
    "v_sub_u16": ("w", "ww", np.subtract),
    "v_mul_lo_u16": ("w", "ww", np.multiply),
    "v_max_u16": ("w", "ww", np.maximum),
    "v_min_u16": ("w", "ww", np.minimum),
    "v_max_i16": ("w", "ss", np.maximum),
    "v_min_i16": ("w", "ss", np.minimum),
    "v_lshlrev_b16": ("w", "ww", lambda by, x: x << (by & u32(15))),
    "v_lshrrev_b16": ("w", "ww", lambda by, x: x >> (by & u32(15))),
    "v_pack_b32_f16": ("u", "ww", lambda x, y: x | y << u32(16)),
}
# The destination is the last source.
ACCUMULATES: dict[str, tuple[str, str, Fn]] = {
    "v_fmac_f32": ("f", "fff", fma),
    "v_mac_f32": ("f", "fff", fma),
    "v_dot2c_f32_bf16": ("f", "uuf", dot2),
}
COMPARES: dict[str, Fn] = {
    "f": lambda x, y: np.zeros(np.broadcast_shapes(x.shape, y.shape), bool),
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "ne": np.not_equal,
    "lg": lambda x, y: (x < y) | (x > y),
    "ge": np.greater_equal,
    "o": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
    "u": lambda x, y: np.isnan(x) | np.isnan(y),
    "nge": lambda x, y: ~(x >= y),
    "nlg": lambda x, y: ~((x < y) | (x > y)),
    "ngt": lambda x, y: ~(x > y),
    "nle": lambda x, y: ~(x <= y),
    "neq": lambda x, y: ~(x == y),
    "nlt": lambda x, y: ~(x < y),
    "t": lambda x, y: np.ones(np.broadcast_shapes(x.shape, y.shape), bool),
}
KINDS = {"f32": "f", "i32": "i", "u32": "u", "f16": "h", "i16": "s", "u16": "w", "u64": "U"}
KINDS |= {"i64": "I", "f64": "F"}
PACKED16: dict[str, Fn] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mul_lo": np.multiply,
    "max": np.fmax,
    "min": np.fmin,
    "fma": lambda x, y, z: x * y + z,
    "mad": lambda x, y, z: x * y + z,
    "lshlrev": lambda by, x: x << (by & u32(15)),
    "lshrrev": lambda by, x: x >> (by & u32(15)),
}
CARRIES = re.compile(r"v_(add|sub|subrev|addc|subb|subbrev)_co_u32")


def build(m: Machine, i: Instruction) -> Step | None:
    name = i.mnemonic
    if not name.startswith("v_"):
        return None
    if name == "v_nop":
        return lambda: None
    if name in TABLE or name in ACCUMULATES:
        return _arithmetic(m, i)
    if match := re.fullmatch(r"v_cmp(x?)_([a-z]+)_([fiu]\d\d)", name):
        return _compare(m, i, match[2], match[3])
    if match := CARRIES.fullmatch(name):
        return _carry(m, i, match[1])
    if match := re.fullmatch(r"v_pk_(\w+)_(f16|u16|i16|b16)", name):
        return _packed16(m, i, match[1], KINDS[match[2].replace("b", "u")])
    if match := re.fullmatch(r"v_cvt_(?:scalef32_)?pk_(f32|bf16|f16)_([fb]p?8|bf8)", name):
        return _from_fp8(m, i, match[1], match[2])
    if match := re.fullmatch(r"v_cvt_(?:scalef32_)?pk_(fp8|bf8)_(f32|bf16|f16)", name):
        return _to_fp8(m, i, match[1], match[2])
    special = SPECIAL.get(name)
    return special(m, i) if special else None


def literal(o: Operand, kind: str) -> Array:
    """A constant as the 1×1 array of its type's bits; a decimal means the operand's own format."""
    bits = constant(o)
    if "." in o.text and kind in "hF":
        value = np.uint32(bits & 0xFFFFFFFF).view(f32)
        bits = int(f64(value).view(u64) if kind == "F" else to_f16(np.array(value)))
    if kind in "UIF":
        return np.full((1, 1), bits & 0xFFFFFFFFFFFFFFFF, u64)
    return np.full((1, 1), bits & 0xFFFFFFFF, u32)


def bits_of(m: Machine, o: Operand, kind: str) -> Callable[[], Array]:
    if o.reg is None:
        value = literal(o, kind)
        return lambda: value
    if kind not in "UIF":
        return m.vector(o.reg)
    low, high = m.vector(o.reg), m.vector(o.reg + 1)
    return lambda: pair(low(), high())


def typed(bits: Array, kind: str) -> Array:
    if kind in "uU":
        return bits
    if kind == "w":
        return bits & u32(0xFFFF)
    if kind == "s":
        return (bits << u32(16)).view(i32) >> i32(16)
    if kind == "h":
        return from_f16(bits & u32(0xFFFF))
    return bits.view(DTYPES[kind])


def source(m: Machine, i: Instruction, at: int, kind: str) -> Callable[[], Array]:
    """Operand `at` + 1 of the instruction as an array of its type, with its modifiers applied."""
    o = i.operands[at + 1]
    read = bits_of(m, o, kind)
    select = i.modifiers.get(f"src{at}_sel", "DWORD")
    op_sel = i.numbers("op_sel", ())
    shift = 0
    if i.encoding == "sdwa" and select != "DWORD":
        piece, index = select.split("_")
        size = {"BYTE": 8, "WORD": 16}[piece]
        shift, cut = int(index) * size, u32((1 << size) - 1)
        return lambda: typed(read() >> u32(shift) & cut, kind)
    if op_sel and op_sel[at]:
        shift = 16
    spread = lanes.dpp(m, i, read) if at == 0 and "dpp" in i.encoding else read
    sign = SIGN.get(kind)
    if not (shift or o.neg or o.abs):
        return lambda: typed(spread(), kind)
    if (o.neg or o.abs) and sign is None:
        raise Unknown(f"a sign modifier on an integer: {i.text}")

    def with_modifiers() -> Array:
        bits = spread() >> u32(shift) if shift else spread()
        if o.abs:
            bits = bits & ~sign  # type: ignore[operator]
        if o.neg:
            bits = bits ^ sign
        return typed(bits, kind)

    return with_modifiers


def result(m: Machine, i: Instruction, kind: str) -> Callable[[Array], None]:
    """Writes a typed array to operand 0, with the output modifiers applied."""
    reg = i.operands[0].reg
    assert reg is not None
    if kind in "UIF":

        def write64(x: Array) -> None:
            low, high = halves(np.asarray(x, DTYPES[kind]))
            m.write(reg, low)
            m.write(reg + 1, high)

        return write64
    scale = f32(int(i.modifiers["mul"])) if "mul" in i.modifiers else f32(1)
    scale = f32(0.5) if "div" in i.modifiers else scale
    clamp = "clamp" in i.modifiers
    if clamp and kind != "f":
        raise Unknown(f"clamp of integers: {i.text}")
    place = _placement(m, i, reg)
    lane_mask = lanes.dpp_mask(m, i) if "dpp" in i.encoding else None

    def write(x: Array) -> None:
        if scale != 1:
            x = x * scale
        if clamp:
            x = np.where(np.isnan(x), f32(0), np.clip(x, f32(0), f32(1)))
        if kind == "h":
            bits = to_f16(x)
        elif kind in "ws":
            bits = np.asarray(x).astype(u32) & u32(0xFFFF)
        else:
            bits = np.asarray(x, DTYPES[kind]).view(u32)
        bits = bits if place is None else place(bits)
        m.write(reg, bits, lane_mask() if lane_mask else None)

    return write


def _placement(m: Machine, i: Instruction, reg: int) -> Callable[[Array], Array] | None:
    """Where a narrow result goes in its register, and what the rest of the register becomes."""
    op_sel = i.numbers("op_sel", ())
    select = i.modifiers.get("dst_sel", "DWORD")
    keep = True
    if i.encoding == "sdwa" and select != "DWORD":
        piece, index = select.split("_")
        size = {"BYTE": 8, "WORD": 16}[piece]
        shift = int(index) * size
        keep = i.modifiers.get("dst_unused") == "UNUSED_PRESERVE"
        if i.modifiers.get("dst_unused") == "UNUSED_SEXT":
            raise Unknown(i.text)
    elif len(op_sel) == len(i.operands) and op_sel[-1]:
        size = shift = 16
    else:
        return None
    cut = u32((1 << size) - 1)
    rest = u32(~(int(cut) << shift) & 0xFFFFFFFF) if keep else u32(0)
    old = m.vector(reg)
    return lambda x: (x & cut) << u32(shift) | old() & rest


def _arithmetic(m: Machine, i: Instruction) -> Step:
    accumulates = i.mnemonic in ACCUMULATES
    kind, kinds, fn = (ACCUMULATES if accumulates else TABLE)[i.mnemonic]
    count = len(kinds) - accumulates
    if len(i.operands) != count + 1:
        raise Unknown(f"expected {count + 1} operands: {i.text}")
    sources = [source(m, i, at, kinds[at]) for at in range(count)]
    if accumulates:
        old = bits_of(m, i.operands[0], kinds[-1])
        sources.append(lambda: typed(old(), kinds[-1]))
    write = result(m, i, kind)
    if len(sources) == 1:
        (only,) = sources
        return lambda: write(fn(only()))
    if len(sources) == 2:
        first, second = sources
        return lambda: write(fn(first(), second()))
    first, second, third = sources
    return lambda: write(fn(first(), second(), third()))


def write_mask(m: Machine, reg: int, flags: Array) -> None:
    """Flags of the live lanes, as a scalar pair."""
    m.write_scalar64(reg, mask_of(np.broadcast_to(flags, (m.count, 64)) & m.mask))


def _compare(m: Machine, i: Instruction, op: str, kind: str) -> Step:
    fn = COMPARES[op]
    x, y = (source(m, i, at, KINDS[kind]) for at in range(2))
    target = i.operands[0].reg
    assert target is not None
    if i.mnemonic.startswith("v_cmpx"):
        raise Unknown(i.text)
    return lambda: write_mask(m, target, fn(x(), y()))


def _carry(m: Machine, i: Instruction, op: str) -> Step:
    target, flags = i.operands[0].reg, i.operands[1].reg
    assert target is not None and flags is not None
    x, y = (bits_of(m, o, "u") for o in i.operands[2:4])
    carry = m.scalar64(i.operands[4]) if len(i.operands) == 5 else None

    def step() -> None:
        a, b = x().astype(i64), y().astype(i64)
        if "rev" in op:
            a, b = b, a
        more = lanes_of(carry()).astype(i64) if carry else i64(0)
        total = a + b + more if op.startswith("add") else a - b - more
        total = np.broadcast_to(total, (m.count, 64))
        m.write(target, (total & 0xFFFFFFFF).astype(u32))
        write_mask(m, flags, (total < 0) | (total >= 2**32))

    return step


def _multiply_add64(m: Machine, i: Instruction) -> Step:
    signed = "i64" in i.mnemonic
    x, y = (bits_of(m, o, "u") for o in i.operands[2:4])
    z, target, flags = bits_of(m, i.operands[4], "U"), i.operands[0].reg, i.operands[1].reg
    assert target is not None and flags is not None

    def step() -> None:
        a, b = (v().view(i32).astype(i64).view(u64) if signed else v().astype(u64) for v in (x, y))
        low, high = halves(a * b + z())
        m.write(target, low)
        m.write(target + 1, high)
        m.write_scalar64(flags, np.zeros(m.count, u64))  # no code here reads the carry

    return step


def _div_scale(m: Machine, i: Instruction) -> Step:
    sources = [_operand_float(m, o) for o in i.operands[2:5]]
    target, flags = i.operands[0].reg, i.operands[1].reg
    assert target is not None and flags is not None

    def step() -> None:
        value, scaled = div_scale(*np.broadcast_arrays(*(s() for s in sources)))
        m.write(target, value.view(u32))
        write_mask(m, flags, scaled)

    return step


def _operand_float(m: Machine, o: Operand) -> Callable[[], Array]:
    read, flip, clear = bits_of(m, o, "f"), u32(o.neg << 31), u32(o.abs << 31)
    return lambda: ((read() & ~clear) ^ flip).view(f32)


def _div_fmas(m: Machine, i: Instruction) -> Step:
    sources = [_operand_float(m, o) for o in i.operands[1:4]]
    vcc, write = m.scalar64(Operand("vcc", VCC, 2)), result(m, i, "f")

    def step() -> None:
        value = fma(*(s() for s in sources))
        write(np.where(lanes_of(vcc()), value * f32(2.0**32), value))

    return step


def _conditional(m: Machine, i: Instruction) -> Step:
    sources = [source(m, i, at, "u") for at in range(2)]
    condition = m.scalar64(i.operands[3] if len(i.operands) > 3 else Operand("vcc", VCC, 2))
    write = result(m, i, "u")
    return lambda: write(np.where(lanes_of(condition()), sources[1](), sources[0]()))


def _bitop3(m: Machine, i: Instruction) -> Step:
    """Any function of three bits, by its truth table."""
    table = i.number("bitop3")
    sources, write = [source(m, i, at, "u") for at in range(3)], result(m, i, "u")

    def step() -> None:
        x, y, z = (s() for s in sources)
        out = u32(0)
        for row in range(8):
            if table >> row & 1:
                term = (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
                out = out | term
        write(np.asarray(out))

    return step


def _pick_half(m: Machine, o: Operand, upper: int) -> Callable[[], Array]:
    """A register of a pair; a lone register or a constant stands for both."""
    if o.reg is None:
        value = literal(o, "u")
        return lambda: value
    return m.vector(o.reg + (upper if o.count > 1 else 0))


def _packed32(m: Machine, i: Instruction) -> Step:
    kind = i.mnemonic.removeprefix("v_pk_")
    target, count = i.operands[0].reg, len(i.operands) - 1
    assert target is not None
    select = i.numbers("op_sel", (0,) * count), i.numbers("op_sel_hi", (1,) * count)
    negate = i.numbers("neg_lo", (0,) * count), i.numbers("neg_hi", (0,) * count)
    if kind == "mov_b32":  # one half of each source
        low, high = (_pick_half(m, i.operands[at + 1], select[0][at]) for at in range(2))

        def move() -> None:
            x, y = low().copy(), high().copy()
            m.write(target, x)
            m.write(target + 1, y)

        return move
    fn = TABLE[f"v_{kind}"][2]
    sources = [
        [
            (_pick_half(m, o, select[half][at]), u32(negate[half][at] << 31))
            for at, o in enumerate(i.operands[1:])
        ]
        for half in range(2)
    ]

    def step() -> None:
        low, high = (
            fn(*((read() ^ flip if flip else read()).view(f32) for read, flip in half))
            for half in sources
        )
        m.write(target, np.asarray(low, f32).view(u32))
        m.write(target + 1, np.asarray(high, f32).view(u32))

    return step


def _packed16(m: Machine, i: Instruction, op: str, kind: str) -> Step:
    count = len(i.operands) - 1
    select = i.numbers("op_sel", (0,) * count), i.numbers("op_sel_hi", (1,) * count)
    negate = i.numbers("neg_lo", (0,) * count), i.numbers("neg_hi", (0,) * count)
    fn = PACKED16[op]
    sources = [bits_of(m, o, "h" if kind == "h" else "u") for o in i.operands[1:]]
    target = i.operands[0].reg
    assert target is not None

    def half(bits: list[Array], which: int) -> Array:
        values = []
        for x, upper, neg in zip(bits, select[which], negate[which], strict=True):
            x = x >> u32(16) if upper else x
            values.append(typed(x ^ u32(neg << 15), kind))
        out = fn(*values)
        return to_f16(out) if kind == "h" else np.asarray(out).astype(u32) & u32(0xFFFF)

    def step() -> None:
        bits = [s() for s in sources]
        m.write(target, half(bits, 0) | half(bits, 1) << u32(16))

    return step


def _scale_of(m: Machine, i: Instruction) -> Callable[[], Any]:
    """The power of two that scalef32 conversions multiply by: the exponent of the last source."""
    if "scalef32" not in i.mnemonic:
        return lambda: f32(1)
    read = bits_of(m, i.operands[-1], "f")
    return lambda: (read() & u32(0x7F800000)).view(f32)


def _from_fp8(m: Machine, i: Instruction, to: str, fmt: str) -> Step:
    values, read, scale = FP8[m.arch][fmt], bits_of(m, i.operands[1], "u"), _scale_of(m, i)
    upper = i.modifiers.get("src0_sel") == "WORD_1" or i.numbers("op_sel", (0,))[0]
    target = i.operands[0].reg
    assert target is not None

    def step() -> None:
        bits = read() >> u32(16 if upper else 0)
        low, high = (values[bits >> u32(8 * k) & u32(255)] * scale() for k in range(2))
        if to == "f32":
            m.write(target, low.astype(f32).view(u32))
            m.write(target + 1, high.astype(f32).view(u32))
        else:
            m.write(target, packed(to_bf16 if to == "bf16" else to_f16)(low, high))

    return step


def _to_fp8(m: Machine, i: Instruction, fmt: str, of: str) -> Step:
    values, scale = FP8[m.arch][fmt], _scale_of(m, i)
    sources = [_operand_float(m, o) for o in i.operands[1 : 3 if of == "f32" else 2]]
    decode = {"bf16": from_bf16, "f16": from_f16}.get(of)
    upper = i.numbers("op_sel", (0,))[-1]
    target = i.operands[0].reg
    assert target is not None
    old = m.vector(target)

    def step() -> None:
        if decode is None:
            low, high = (s() for s in sources)
        else:
            bits = sources[0]().view(u32)
            low, high = decode(bits & u32(0xFFFF)), decode(bits >> u32(16))
        two = to_fp8(low / scale(), values) | to_fp8(high / scale(), values) << u32(8)
        if upper:
            m.write(target, old() & u32(0xFFFF) | two << u32(16))
        else:
            m.write(target, old() & u32(0xFFFF0000) | two)

    return step


def _byte_from_fp8(m: Machine, i: Instruction) -> Step:
    values, read = FP8[m.arch][i.mnemonic[-3:]], bits_of(m, i.operands[1], "u")
    select = i.modifiers.get("src0_sel", "BYTE_0")
    shift, write = u32(8 * int(select[-1])), result(m, i, "f")
    return lambda: write(values[read() >> shift & u32(255)])


SPECIAL: dict[str, Callable[[Machine, Instruction], Step]] = {
    "v_cndmask_b32": _conditional,
    "v_mad_u64_u32": _multiply_add64,
    "v_mad_i64_i32": _multiply_add64,
    "v_div_scale_f32": _div_scale,
    "v_div_fmas_f32": _div_fmas,
    "v_bitop3_b32": _bitop3,
    "v_pk_mul_f32": _packed32,
    "v_pk_add_f32": _packed32,
    "v_pk_fma_f32": _packed32,
    "v_pk_mov_b32": _packed32,
    "v_cvt_f32_fp8": _byte_from_fp8,
    "v_cvt_f32_bf8": _byte_from_fp8,
    **lanes.SPECIAL,
}
