"""Scalar instructions: arithmetic, compares, branches, waits, scalar loads."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.cdna.asm import EXEC, VCC, Instruction, Operand
from tests.cdna.formats import Array, i32, i64, u32, u64
from tests.cdna.machine import BARRIER, END, Machine, Step, constant

FIVE, SIX = u32(31), u32(63)
Fn = Callable[..., Any]

# Type letters: u, i of 32 bits; U, I of 64.
DTYPES: dict[str, Any] = {"u": u32, "i": i32, "U": u64, "I": i64}


def wide(x: Array) -> Array:
    return x.astype(i64)


def low(x: Array) -> Array:
    return (x & 0xFFFFFFFF).astype(u32)


def overflow(x: Array) -> tuple[Array, Array]:
    return low(x), (x < -(2**31)) | (x >= 2**31)


def carry(x: Array) -> tuple[Array, Array]:
    return low(x), (x < 0) | (x >= 2**32)


def reverse(x: Array) -> Array:
    octets = np.ascontiguousarray(x).view(np.uint8).reshape(*x.shape, 4)
    bits = np.unpackbits(octets, axis=-1, bitorder="little")
    reversed_: Array = np.packbits(bits[..., ::-1], axis=-1, bitorder="little").view(u32)[..., 0]
    return reversed_


def first_one(x: Array) -> Array:
    lowest = x & (~x + u32(1))
    return np.where(x == 0, u32(0xFFFFFFFF), np.bitwise_count(lowest - u32(1)).astype(u32))


def leading_zeros(x: Array) -> Array:
    exponent = np.frexp(x.astype(np.float64))[1]
    return np.where(x == 0, u32(0xFFFFFFFF), (32 - exponent).astype(u32))


def field(x: Array, at: Array, width: Array) -> Array:
    """`width` bits of an unsigned x from bit `at`, zero if there are none."""
    size = np.minimum(width, 8 * x.itemsize - 1).astype(x.dtype)
    mask = (x.dtype.type(1) << size) - x.dtype.type(1)
    mask = np.where(width >= 8 * x.itemsize, ~x.dtype.type(0), mask)
    bits: Array = (x >> at.astype(x.dtype)) & mask
    return bits


def signed_field(x: Array, at: Array, width: Array) -> Array:
    value = field(x, at, width)
    sign = np.where(width > 0, u32(1) << ((width - u32(1)) & FIVE), u32(0)).astype(u32)
    return (value ^ sign) - sign


def scalar_field(of: Fn, limit: int) -> Fn:
    return lambda x, y: of(x, y & u32(limit), y >> u32(16) & u32(127))


def high(x: Array, y: Array) -> Array:
    return ((x.astype(i64) * y.astype(i64)) >> i64(32)).astype(u64).astype(u32)


def high_unsigned(x: Array, y: Array) -> Array:
    return ((x.astype(u64) * y.astype(u64)) >> u64(32)).astype(u32)


def pick(better: Fn) -> Fn:
    """Minimum or maximum; SCC says the first was taken."""
    return lambda x, y: (np.where(better(x, y), x, y), better(x, y))


def lshl_add(by: int) -> Fn:
    return lambda x, y: carry((wide(x) << by) + wide(y))


BITS: dict[str, Fn] = {
    "and": lambda x, y: x & y,
    "or": lambda x, y: x | y,
    "xor": lambda x, y: x ^ y,
    "andn2": lambda x, y: x & ~y,
    "orn2": lambda x, y: x | ~y,
    "nand": lambda x, y: ~(x & y),
    "nor": lambda x, y: ~(x | y),
    "xnor": lambda x, y: ~(x ^ y),
}

# name: result, sources, function; a name with SCC after it takes SCC as the last source.
PLAIN: dict[str, tuple[str, str, Fn]] = {  # leave SCC alone
    "s_mov_b32": ("u", "u", lambda x: x),
    "s_mov_b64": ("U", "U", lambda x: x),
    "s_mul_i32": ("u", "uu", lambda x, y: x * y),
    "s_mul_hi_u32": ("u", "uu", high_unsigned),
    "s_mul_hi_i32": ("u", "ii", high),
    "s_cselect_b32": ("u", "uuc", lambda x, y, scc: np.where(scc, x, y)),
    "s_cselect_b64": ("U", "UUc", lambda x, y, scc: np.where(scc, x, y)),
    "s_bfm_b32": ("u", "uu", lambda x, y: ((u32(1) << (x & FIVE)) - u32(1)) << (y & FIVE)),
    "s_brev_b32": ("u", "u", reverse),
    "s_ff1_i32_b32": ("u", "u", first_one),
    "s_flbit_i32_b32": ("u", "u", leading_zeros),
    "s_sext_i32_i8": ("i", "i", lambda x: x << 24 >> 24),
    "s_sext_i32_i16": ("i", "i", lambda x: x << 16 >> 16),
    "s_pack_ll_b32_b16": ("u", "uu", lambda x, y: x & u32(0xFFFF) | y << u32(16)),
    "s_pack_lh_b32_b16": ("u", "uu", lambda x, y: x & u32(0xFFFF) | y & u32(0xFFFF0000)),
    "s_pack_hh_b32_b16": ("u", "uu", lambda x, y: x >> u32(16) | y & u32(0xFFFF0000)),
}
NONZERO: dict[str, tuple[str, str, Fn]] = {  # SCC says the result is not zero
    "s_not_b32": ("u", "u", lambda x: ~x),
    "s_not_b64": ("U", "U", lambda x: ~x),
    "s_abs_i32": ("i", "i", np.abs),
    "s_bcnt1_i32_b32": ("u", "u", lambda x: np.bitwise_count(x).astype(u32)),
    "s_bcnt1_i32_b64": ("u", "U", lambda x: np.bitwise_count(x).astype(u32)),
    **{f"s_{name}_b32": ("u", "uu", fn) for name, fn in BITS.items()},
    **{f"s_{name}_b64": ("U", "UU", fn) for name, fn in BITS.items()},
    "s_lshl_b32": ("u", "uu", lambda x, y: x << (y & FIVE)),
    "s_lshr_b32": ("u", "uu", lambda x, y: x >> (y & FIVE)),
    "s_ashr_i32": ("i", "ii", lambda x, y: x >> (y & i32(31))),
    "s_lshl_b64": ("U", "Uu", lambda x, y: x << (y & SIX).astype(u64)),
    "s_lshr_b64": ("U", "Uu", lambda x, y: x >> (y & SIX).astype(u64)),
    "s_ashr_i64": ("I", "Iu", lambda x, y: x >> (y & SIX).astype(i64)),
    "s_bfe_u32": ("u", "uu", scalar_field(field, 31)),
    "s_bfe_u64": ("U", "Uu", scalar_field(field, 63)),
    "s_bfe_i32": ("u", "uu", scalar_field(signed_field, 31)),
    "s_absdiff_i32": ("u", "ii", lambda x, y: low(np.abs(wide(x) - wide(y)))),
}
CARRY: dict[str, tuple[str, str, Fn]] = {  # the function returns (result, SCC)
    "s_add_u32": ("u", "uu", lambda x, y: carry(wide(x) + wide(y))),
    "s_sub_u32": ("u", "uu", lambda x, y: carry(wide(x) - wide(y))),
    "s_addc_u32": ("u", "uuc", lambda x, y, scc: carry(wide(x) + wide(y) + scc)),
    "s_subb_u32": ("u", "uuc", lambda x, y, scc: carry(wide(x) - wide(y) - scc)),
    "s_add_i32": ("u", "ii", lambda x, y: overflow(wide(x) + wide(y))),
    "s_sub_i32": ("u", "ii", lambda x, y: overflow(wide(x) - wide(y))),
    "s_min_i32": ("i", "ii", pick(np.less)),
    "s_max_i32": ("i", "ii", pick(np.greater)),
    "s_min_u32": ("u", "uu", pick(np.less)),
    "s_max_u32": ("u", "uu", pick(np.greater)),
    **{f"s_lshl{by}_add_u32": ("u", "uu", lshl_add(by)) for by in (1, 2, 3, 4)},
}
COMPARES: dict[str, Fn] = {
    "eq": np.equal,
    "lg": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
# Nothing that this emulator models depends on these: modes, caches, priorities, hazard slots.
IGNORED = ("s_nop", "s_setprio", "s_sleep", "s_sethalt", "s_icache_inv", "s_dcache_inv")


def build(m: Machine, i: Instruction) -> Step | None:
    name = i.mnemonic
    if not name.startswith("s_"):
        return None
    if name in IGNORED:
        return lambda: None
    if name == "s_barrier":
        return lambda: BARRIER
    if name == "s_endpgm":
        return lambda: END
    if name == "s_waitcnt":
        return _wait(m, i)
    if i.target is not None:
        return _branch(m, name)
    if name.startswith("s_load_dword"):
        return _load(m, i)
    if match := re.fullmatch(r"s_(\w+)_saveexec_b64", name):
        return _saveexec(m, i, BITS[match[1]])
    if match := re.fullmatch(r"s_cmpk?_(\w\w)_([ui]\d\d)", name):
        kind = match[2][0].upper() if match[2].endswith("64") else match[2][0]
        return _set_scc(m, [source(m, o, kind) for o in i.operands], COMPARES[match[1]])
    if match := re.fullmatch(r"s_bitcmp([01])_b32", name):
        wanted = u32(match[1])
        sources = [source(m, o, "u") for o in i.operands]
        return _set_scc(m, sources, lambda x, at: (x >> (at & FIVE) & u32(1)) == wanted)
    if name in ("s_movk_i32", "s_addk_i32", "s_mulk_i32"):
        return _immediate(m, i)
    if name in ("s_bitset0_b32", "s_bitset1_b32"):
        return _bitset(m, i)
    return _arithmetic(m, i)


def source(m: Machine, o: Operand, kind: str) -> Callable[[], Array]:
    read = m.scalar64(o) if kind in "UI" else m.scalar32(o)
    if kind in "uU":
        return read
    return lambda: read().view(DTYPES[kind])


def _write(m: Machine, o: Operand, kind: str) -> Callable[[Array], None]:
    assert o.reg is not None
    reg = o.reg
    if kind in "UI":
        return lambda x: m.write_scalar64(reg, np.asarray(x, DTYPES[kind]).view(u64))
    return lambda x: m.write_scalar(reg, np.asarray(x, DTYPES[kind]).view(u32))


def _arithmetic(m: Machine, i: Instruction) -> Step | None:
    for table in (PLAIN, NONZERO, CARRY):
        if i.mnemonic in table:
            result, kinds, fn = table[i.mnemonic]
            break
    else:
        return None
    sources = [source(m, o, kind) for o, kind in zip(i.operands[1:], kinds.strip("c"), strict=True)]
    if kinds.endswith("c"):
        sources.append(lambda: m.scc[m.at])
    write = _write(m, i.operands[0], result)

    def step() -> None:
        value = fn(*(s() for s in sources))
        if table is CARRY:
            value, m.scc[m.at] = value
        elif table is NONZERO:
            m.scc[m.at] = value != 0
        write(value)

    return step


def _set_scc(m: Machine, sources: list[Callable[[], Array]], fn: Fn) -> Step:
    def step() -> None:
        m.scc[m.at] = fn(*(s() for s in sources))

    return step


def _immediate(m: Machine, i: Instruction) -> Step:
    """A 16-bit signed constant."""
    value = constant(i.operands[1])
    value = (value & 0xFFFF) - (value & 0x8000) * 2
    write, old = _write(m, i.operands[0], "u"), source(m, i.operands[0], "i")
    if i.mnemonic == "s_movk_i32":
        return lambda: write(np.full(m.count, value, i32).view(u32))
    if i.mnemonic == "s_mulk_i32":
        return lambda: write(low(wide(old()) * value))

    def step() -> None:
        result, m.scc[m.at] = overflow(wide(old()) + value)
        write(result)

    return step


def _bitset(m: Machine, i: Instruction) -> Step:
    write, old, at = (
        _write(m, i.operands[0], "u"),
        source(m, i.operands[0], "u"),
        source(m, i.operands[1], "u"),
    )
    if i.mnemonic == "s_bitset1_b32":
        return lambda: write(old() | u32(1) << (at() & FIVE))
    return lambda: write(old() & ~(u32(1) << (at() & FIVE)))


def _saveexec(m: Machine, i: Instruction, fn: Fn) -> Step:
    read, mask = source(m, i.operands[1], "U"), m.scalar64(Operand("exec", EXEC, 2))
    save = _write(m, i.operands[0], "U")

    def step() -> None:
        old, value = mask(), read()
        result = fn(value, old)
        save(old)
        m.write_scalar64(EXEC, result)
        m.scc[m.at] = result != 0

    return step


def _branch(m: Machine, name: str) -> Step:
    vcc = m.scalar64(Operand("vcc", VCC, 2))
    return {
        "s_branch": lambda: np.ones(m.count, bool),
        "s_cbranch_scc0": lambda: ~m.scc[m.at],
        "s_cbranch_scc1": lambda: m.scc[m.at].copy(),
        "s_cbranch_vccz": lambda: vcc() == 0,
        "s_cbranch_vccnz": lambda: vcc() != 0,
        "s_cbranch_execz": lambda: ~m.mask.any(1),
        "s_cbranch_execnz": lambda: m.mask.any(1),
    }[name]


def _wait(m: Machine, i: Instruction) -> Step:
    """lgkmcnt counts LDS and scalar loads together; the LDS part of it is in order."""
    vector, scalar = i.modifiers.get("vmcnt"), i.modifiers.get("lgkmcnt")

    def step() -> None:
        if vector is not None:
            m.wait("vm", int(vector))
        if scalar is not None:
            m.wait("lds", int(scalar))
            m.wait("smem", int(scalar))

    return step


def _load(m: Machine, i: Instruction) -> Step:
    words = int(i.mnemonic.removeprefix("s_load_dword").lstrip("x") or 1)
    target, base, offset = i.operands
    assert target.reg is not None and base.reg is not None
    first, address = target.reg, m.scalar64(base)
    extra, more = u64(i.number("offset")), m.scalar32(offset)

    def step() -> None:
        at = (address() + more().astype(u64) + extra)[:, None]
        for k, word in enumerate(m.memory.load(at, 4 * words, np.ones(at.shape, bool))):
            m.write_scalar(first + k, word[:, 0])
        m.issue("smem", list(target.regs))

    return step
