"""What vector instructions compute: numpy functions on arrays of the types they name.

Type letters: u, i, f of 32 bits; w, s, h of the low 16; U, I, F of a pair of registers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.cdna.formats import (
    Array,
    f32,
    f64,
    from_bf16,
    from_f16,
    i32,
    i64,
    pair,
    to_bf16,
    to_f16,
    u32,
    u64,
)
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
    source = pair(y, x)
    result: Array = np.zeros_like(select)
    for at in range(4):
        choice = (select >> u32(8 * at) & u32(255)).astype(u64)
        octet = source >> (np.minimum(choice, u64(7)) * u64(8)) & u64(255)
        odd = (np.clip(choice, u64(8), u64(11)) - u64(8)) * u64(16) + u64(15)
        sign = np.where(source >> odd & u64(1), u64(255), u64(0))
        octet = np.where(choice >= 8, sign, octet)
        octet = np.where(choice == 12, u64(0), np.where(choice > 12, u64(255), octet))
        result = result | octet.astype(u32) << u32(8 * at)
    return result


def median(x: Array, y: Array, z: Array) -> Array:
    middle: Array = np.fmax(np.fmin(x, y), np.fmin(np.fmax(x, y), z))
    return middle


def div_fixup(quotient: Array, denominator: Array, numerator: Array) -> Array:
    sign = np.where(np.signbit(denominator) != np.signbit(numerator), f32(-1), f32(1))
    result = np.abs(quotient) * sign
    result = np.where((denominator == 0) | np.isinf(numerator), f32(np.inf) * sign, result)
    result = np.where((numerator == 0) | np.isinf(denominator), f32(0) * sign, result)
    zeros = (denominator == 0) & (numerator == 0)
    infinities = np.isinf(denominator) & np.isinf(numerator)
    nan = np.isnan(denominator) | np.isnan(numerator) | zeros | infinities
    fixed: Array = np.where(nan, f32(np.nan), result)
    return fixed


def div_scale(x: Array, denominator: Array, numerator: Array) -> tuple[Array, Array]:
    """x, one of the other two, kept clear of denormals; True where div_fmas is to scale back."""
    tiny = f32(np.finfo(f32).tiny)
    exponent = [np.frexp(v)[1] for v in (numerator, denominator)]
    quotient = np.abs(numerator.astype(f64) / denominator) < tiny
    far = exponent[0] - exponent[1] >= 96
    cases = [
        ((denominator == 0) | (numerator == 0), f32(np.nan) * x, False),
        (far, np.where(x == denominator, np.ldexp(x, 64), x), True),
        (np.abs(denominator) < tiny, np.ldexp(x, 64), False),
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
    both: Array = low + from_bf16(x >> u32(16)) * from_bf16(y >> u32(16)) + z
    return both


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
    "v_sub_u32 clamp": ("u", "uu", lambda x, y: x - np.minimum(x, y)),
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
