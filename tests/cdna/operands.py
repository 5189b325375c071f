"""Operands of vector instructions as typed arrays, with the modifiers of VOP3, SDWA and DPP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.cdna import lanes
from tests.cdna.asm import Instruction, Operand, Unknown
from tests.cdna.formats import Array, f32, f64, from_f16, halves, i32, i64, pair, to_f16, u32, u64
from tests.cdna.machine import Machine, constant

DTYPES: dict[str, Any] = {"u": u32, "i": i32, "f": f32, "U": u64, "I": i64, "F": f64}
SIGN: dict[str, Any] = {"f": u32(1 << 31), "h": u32(1 << 15), "F": u64(1 << 63)}
KINDS = {"f32": "f", "i32": "i", "u32": "u", "f16": "h", "i16": "s", "u16": "w", "u64": "U"}
KINDS |= {"i64": "I", "f64": "F"}


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
    sign: Any = SIGN.get(kind)
    if not (shift or o.neg or o.abs):
        return lambda: typed(spread(), kind)
    if (o.neg or o.abs) and sign is None:
        raise Unknown(f"a sign modifier on an integer: {i.text}")

    def with_modifiers() -> Array:
        bits = spread() >> u32(shift) if shift else spread()
        if o.abs:
            bits = bits & ~sign
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
    if clamp and kind != "f" and i.mnemonic != "v_sub_u32":
        raise Unknown(f"clamp of integers: {i.text}")
    place = _placement(m, i, reg)
    lane_mask = lanes.dpp_mask(m, i) if "dpp" in i.encoding else None

    def write(x: Array) -> None:
        if scale != 1:
            x = x * scale
        if clamp and kind == "f":
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


def operand_float(m: Machine, o: Operand) -> Callable[[], Array]:
    read, flip, clear = bits_of(m, o, "f"), u32(o.neg << 31), u32(o.abs << 31)
    return lambda: ((read() & ~clear) ^ flip).view(f32)
