"""Vector instructions that move data between lanes, and DPP, which does so in passing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.cdna.asm import Instruction, Operand, Unknown
from tests.cdna.formats import Array, u32
from tests.cdna.machine import Machine, Step, constant

LANE = np.arange(64)
ROW = LANE & ~15
# Of a DPP control with its number: the lane each lane reads, and whether there is one.
CONTROLS: dict[str, Callable[[int], tuple[Array, Array]]] = {
    "row_shl": lambda n: (LANE + n, (LANE & 15) + n < 16),
    "row_shr": lambda n: (LANE - n, n <= (LANE & 15)),
    "row_ror": lambda n: (ROW + ((LANE - n) & 15), LANE >= 0),
    "row_newbcast": lambda n: (ROW + n, LANE >= 0),
    "row_bcast": lambda n: (ROW - 1, LANE > 15) if n == 15 else (LANE * 0 + 31, LANE > 31),
    "row_mirror": lambda n: (ROW + 15 - (LANE & 15), LANE >= 0),
    "row_half_mirror": lambda n: ((LANE & ~7) + 7 - (LANE & 7), LANE >= 0),
    "wave_shr": lambda n: (LANE - 1, LANE > 0),
    "wave_shl": lambda n: (LANE + 1, LANE < 63),
}


def _control(i: Instruction) -> tuple[Array, Array]:
    if order := i.numbers("quad_perm", ()):
        return (LANE & ~3) + np.array(order)[LANE & 3], LANE >= 0
    for name, control in CONTROLS.items():
        if name in i.modifiers:
            source, valid = control(i.number(name))
            return np.clip(source, 0, 63), valid
    raise Unknown(f"DPP control: {i.text}")


def dpp(m: Machine, i: Instruction, read: Callable[[], Array]) -> Callable[[], Array]:
    """The first source moved across lanes; zero where there is no live source lane."""
    source, valid = _control(i)

    def moved() -> Array:
        bits = np.broadcast_to(read(), (m.count, 64))
        return np.where(valid & m.mask[:, source], bits[:, source], u32(0))

    return moved


def dpp_mask(m: Machine, i: Instruction) -> Callable[[], Array]:
    """Lanes that the result is written to."""
    source, valid = _control(i)
    rows, banks = i.number("row_mask", 0xF), i.number("bank_mask", 0xF)
    chosen = (rows >> LANE // 16 & 1 & banks >> LANE // 4 % 4).astype(bool)
    if "bound_ctrl" in i.modifiers:
        return lambda: np.broadcast_to(chosen, (m.count, 64))
    return lambda: chosen & valid & m.mask[:, source]


def _register(o: Operand) -> int:
    if o.reg is None:
        raise Unknown(f"operand {o.text}")
    return o.reg


def _read_first(m: Machine, i: Instruction) -> Step:
    """The first live lane, or lane 0 if none is."""
    target, read = _register(i.operands[0]), m.vector(_register(i.operands[1]))

    def step() -> None:
        lane = np.where(m.mask.any(1), m.mask.argmax(1), 0)
        m.write_scalar(target, np.broadcast_to(read(), (m.count, 64))[np.arange(m.count), lane])

    return step


def _read_lane(m: Machine, i: Instruction) -> Step:
    target, read = _register(i.operands[0]), m.vector(_register(i.operands[1]))
    lane = m.scalar32(i.operands[2])
    return lambda: m.write_scalar(target, read()[np.arange(m.count), lane() & u32(63)])


def _write_lane(m: Machine, i: Instruction) -> Step:
    """Ignores EXEC."""
    row = m.V[m.row(_register(i.operands[0]))]
    value, lane = m.scalar32(i.operands[1]), m.scalar32(i.operands[2])

    def step() -> None:
        row[m.index, lane() & u32(63)] = value()

    return step


def _swap(m: Machine, i: Instruction) -> Step:
    a, b = (_register(o) for o in i.operands)
    first, second = m.vector(a), m.vector(b)

    def step() -> None:
        x, y = first().copy(), second().copy()
        m.write(a, y)
        m.write(b, x)

    return step


def _permlane_swap(m: Machine, i: Instruction) -> Step:
    """Odd rows of the first register trade places with even rows of the second, rows of n lanes."""
    n = int(i.mnemonic.removeprefix("v_permlane")[:2])
    a, b = (_register(o) for o in i.operands)
    first, second = m.vector(a), m.vector(b)
    odd = LANE // n % 2 == 1

    def step() -> None:
        if not m.all_live:
            raise Unknown(f"{i.text} with lanes switched off")
        x, y = first().copy(), second().copy()
        new_x, new_y = x.copy(), y.copy()
        new_x[:, odd], new_y[:, ~odd] = y[:, ~odd], x[:, odd]
        m.write(a, new_x)
        m.write(b, new_y)

    return step


def _bits(m: Machine, o: Operand) -> Callable[[], Array]:
    if o.reg is not None:
        return m.vector(o.reg)
    value = np.full((1, 1), constant(o) & 0xFFFFFFFF, u32)
    return lambda: value


def _count_below(m: Machine, i: Instruction) -> Step:
    """Set bits below this lane in one half of a mask, plus the second source."""
    target, first = _register(i.operands[0]), 32 if "_hi_" in i.mnemonic else 0
    below = np.array([(1 << min(max(lane - first, 0), 32)) - 1 for lane in range(64)], np.uint64)
    sources = [_bits(m, o) for o in i.operands[1:3]]

    def step() -> None:
        count = np.bitwise_count(sources[0]() & below.astype(u32)).astype(u32)
        m.write(target, count + sources[1]())

    return step


SPECIAL: dict[str, Callable[[Machine, Instruction], Step]] = {
    "v_readfirstlane_b32": _read_first,
    "v_readlane_b32": _read_lane,
    "v_writelane_b32": _write_lane,
    "v_swap_b32": _swap,
    "v_permlane16_swap_b32": _permlane_swap,
    "v_permlane32_swap_b32": _permlane_swap,
    "v_mbcnt_lo_u32_b32": _count_below,
    "v_mbcnt_hi_u32_b32": _count_below,
}
