"""Vector instructions on one value a lane."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.cdna import lanes, packed
from tests.cdna.asm import VCC, Instruction, Operand, Unknown
from tests.cdna.formats import (
    Array,
    f32,
    f64,
    halves,
    i32,
    i64,
    lanes_of,
    mask_of,
    to_f16,
    u32,
    u64,
)
from tests.cdna.functions import ACCUMULATES, COMPARES, TABLE, div_scale, fma
from tests.cdna.machine import Machine, Step
from tests.cdna.operands import KINDS, bits_of, operand_float, result, source, typed

CARRIES = re.compile(r"v_(add|sub|subrev|addc|subb|subbrev)_co_u32")


def build(m: Machine, i: Instruction) -> Step | None:
    name = i.mnemonic
    if not name.startswith("v_"):
        return None
    if name == "v_nop":
        return lambda: None
    if name in TABLE or name in ACCUMULATES:
        return _arithmetic(m, i)
    if match := re.fullmatch(r"v_cmp_([a-z]+)_([fiu]\d\d)", name):
        return _compare(m, i, match[1], match[2])
    if match := CARRIES.fullmatch(name):
        return _carry(m, i, match[1])
    special = SPECIAL.get(name)
    return special(m, i) if special else packed.build(m, i)


def _arithmetic(m: Machine, i: Instruction) -> Step:
    accumulates = i.mnemonic in ACCUMULATES
    clamped = f"{i.mnemonic} clamp" in TABLE and "clamp" in i.modifiers
    kind, kinds, fn = (
        ACCUMULATES[i.mnemonic] if accumulates else TABLE[i.mnemonic + " clamp" * clamped]
    )
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
    sources = [operand_float(m, o) for o in i.operands[2:5]]
    target, flags = i.operands[0].reg, i.operands[1].reg
    assert target is not None and flags is not None

    def step() -> None:
        value, scaled = div_scale(*np.broadcast_arrays(*(s() for s in sources)))
        m.write(target, value.view(u32))
        write_mask(m, flags, scaled)

    return step


def _div_fmas(m: Machine, i: Instruction) -> Step:
    sources = [operand_float(m, o) for o in i.operands[1:4]]
    vcc, write = m.scalar64(Operand("vcc", VCC, 2)), result(m, i, "f")

    def step() -> None:
        x, y, z = (s() for s in sources)
        scale = np.where(np.frexp(z)[1] > 1, 2.0**64, 2.0**-64)
        exact = x.astype(f64) * y + z
        write((exact * np.where(lanes_of(vcc()), scale, 1.0)).astype(f32))

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
        out: Array = np.zeros((1, 1), u32)
        for row in range(8):
            if table >> row & 1:
                term = (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
                out = out | term
        write(out)

    return step


def _mixed(m: Machine, i: Instruction) -> Step:
    """Sources are fp32, or fp16 where op_sel_hi says so; op_sel picks the half."""
    narrow, upper = i.numbers("op_sel_hi", (0, 0, 0)), i.numbers("op_sel", (0, 0, 0))
    sources = [_mixed_source(m, i.operands[at + 1], narrow[at], upper[at]) for at in range(3)]
    target = i.operands[0].reg
    assert target is not None
    old = m.vector(target)

    def step() -> None:
        x = fma(*(s() for s in sources))
        if i.mnemonic == "v_fma_mix_f32":
            m.write(target, x.view(u32))
        elif i.mnemonic == "v_fma_mixlo_f16":
            m.write(target, old() & u32(0xFFFF0000) | to_f16(x))
        else:
            m.write(target, old() & u32(0xFFFF) | to_f16(x) << u32(16))

    return step


def _mixed_source(m: Machine, o: Operand, narrow: int, upper: int) -> Callable[[], Array]:
    if not narrow:
        return operand_float(m, o)
    read, shift = bits_of(m, o, "h"), u32(16 * upper)
    flip, clear = u32(o.neg << 15), u32(o.abs << 15)
    return lambda: typed((read() >> shift & ~clear) ^ flip, "h")


SPECIAL: dict[str, Callable[[Machine, Instruction], Step]] = {
    "v_cndmask_b32": _conditional,
    "v_mad_u64_u32": _multiply_add64,
    "v_mad_i64_i32": _multiply_add64,
    "v_div_scale_f32": _div_scale,
    "v_div_fmas_f32": _div_fmas,
    "v_bitop3_b32": _bitop3,
    "v_fma_mix_f32": _mixed,
    "v_fma_mixlo_f16": _mixed,
    "v_fma_mixhi_f16": _mixed,
    **lanes.SPECIAL,
}
