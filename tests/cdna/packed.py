"""Vector instructions on two values at once: pairs of fp32, halves of a register, pairs of fp8."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.cdna.asm import Instruction, Operand
from tests.cdna.formats import FP8, Array, f32, from_bf16, from_f16, to_bf16, to_f16, to_fp8, u32
from tests.cdna.functions import TABLE, packed
from tests.cdna.machine import Machine, Step
from tests.cdna.operands import KINDS, bits_of, literal, operand_float, result, typed

Fn = Callable[..., Any]
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


def build(m: Machine, i: Instruction) -> Step | None:
    name = i.mnemonic
    if name in ("v_pk_mul_f32", "v_pk_add_f32", "v_pk_fma_f32", "v_pk_mov_b32"):
        return _packed32(m, i)
    if match := re.fullmatch(r"v_pk_(\w+)_(f16|u16|i16|b16)", name):
        return _packed16(m, i, match[1], KINDS[match[2].replace("b", "u")])
    if match := re.fullmatch(r"v_cvt_(?:scalef32_)?pk_(f32|bf16|f16)_(fp8|bf8)", name):
        return _from_fp8(m, i, match[1], match[2])
    if match := re.fullmatch(r"v_cvt_(?:scalef32_)?pk_(fp8|bf8)_(f32|bf16|f16)", name):
        return _to_fp8(m, i, match[1], match[2])
    if name in ("v_cvt_f32_fp8", "v_cvt_f32_bf8"):
        return _byte_from_fp8(m, i)
    return None


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
    sources = [operand_float(m, o) for o in i.operands[1 : 3 if of == "f32" else 2]]
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
