"""Number formats as bits in uint32 arrays, to and from the floats numpy computes with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
u32, u64, i32, i64, f32, f64 = np.uint32, np.uint64, np.int32, np.int64, np.float32, np.float64


def from_bf16(bits: Array) -> Array:
    return (bits << u32(16)).view(f32)


def to_bf16(x: Array) -> Array:
    """Round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, f32).view(u32)
    rounded = (bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)
    return np.where(np.isnan(x), (bits >> u32(16)) | u32(0x40), rounded).astype(u32)


def from_f16(bits: Array) -> Array:
    return bits.astype(np.uint16).view(np.float16).astype(f32)


def to_f16(x: Array) -> Array:
    return np.asarray(x, np.float16).view(np.uint16).astype(u32)


def _fp8_values(exponent: int, bias: int, special: str) -> Array:
    """Values of the 256 codes. `special` says which codes are not numbers:
    "fnuz" only -0, "fn" all ones, "ieee" the whole highest exponent."""
    mantissa = 7 - exponent
    values = np.zeros(256, f32)
    for code in range(256):
        e, m = code >> mantissa & (1 << exponent) - 1, code & (1 << mantissa) - 1
        top = e == (1 << exponent) - 1
        value = m * 2.0 ** (1 - bias - mantissa)
        if e:
            value = (1 + m * 2.0**-mantissa) * 2.0 ** (e - bias)
        if special == "ieee" and top:
            value = np.nan if m else np.inf
        elif (special == "fn" and code & 127 == 127) or (special == "fnuz" and code == 128):
            value = np.nan
        values[code] = -value if code & 128 else value
    return values


# What v_cvt_*_fp8 and v_cvt_*_bf8 mean: CDNA3 knows the fnuz formats, CDNA4 the OCP ones.
FP8 = {
    "gfx942": {"fp8": _fp8_values(4, 8, "fnuz"), "bf8": _fp8_values(5, 16, "fnuz")},
    "gfx950": {"fp8": _fp8_values(4, 7, "fn"), "bf8": _fp8_values(5, 15, "ieee")},
}


def to_fp8(x: Array, values: Array) -> Array:
    """Round to nearest even, saturate to the largest finite value."""
    codes = np.flatnonzero(np.isfinite(values[:128]))
    finite = values[codes]
    size = np.minimum(np.abs(x), finite[-1])
    above = np.clip(np.searchsorted(finite, size), 1, len(finite) - 1)
    down, up = size - finite[above - 1], finite[above] - size
    take_up = (down > up) | ((down == up) & (codes[above] % 2 == 0))
    code = np.where(take_up, codes[above], codes[above - 1]).astype(u32)
    signed = code | np.signbit(x).astype(u32) << u32(7)
    fnuz = bool(np.isnan(values[128]))
    if fnuz:
        signed = np.where(code == 0, u32(0), signed)
    return np.where(np.isnan(x), u32(128 if fnuz else 127), signed).astype(u32)


def pair(low: Array, high: Array) -> Array:
    return low.astype(u64) | high.astype(u64) << u64(32)


def halves(x: Array) -> tuple[Array, Array]:
    bits = np.asarray(x).view(u64)
    return (bits & u64(0xFFFFFFFF)).astype(u32), (bits >> u64(32)).astype(u32)


def lanes_of(mask: Array) -> Array:
    """bool [k, 64] of uint64 [k]."""
    octets = np.ascontiguousarray(mask).view(np.uint8).reshape(-1, 8)
    return np.unpackbits(octets, axis=1, bitorder="little").astype(bool)


def mask_of(lanes: Array) -> Array:
    """uint64 [k] of bool [k, 64]."""
    return np.packbits(lanes, axis=1, bitorder="little").view(u64)[:, 0]
