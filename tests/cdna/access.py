"""Memory instructions: LDS, global, buffer and scratch."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from tests.cdna.asm import M0, Instruction, Operand, Unknown
from tests.cdna.formats import Array, i32, i64, pair, u32, u64
from tests.cdna.machine import Flight, Machine, Step
from tests.cdna.memory import OutOfBounds

PIECE = re.compile(
    r"(?:load|store|read|write)_(?:lds_)?"
    r"(?:dword(x\d)?|b(32|64|96|128)|([us]?)(byte|short|b8|b16|8|16|i8|i16))(_d16)?(_hi)?"
)
LANE = np.arange(64, dtype=i64)


def build(m: Machine, i: Instruction) -> Step | None:
    name = i.mnemonic
    if name in ("buffer_wbl2", "buffer_inv"):  # caches are not modelled
        return lambda: None
    if name in ("ds_bpermute_b32", "ds_permute_b32"):
        return _permute(m, i)
    if name == "ds_swizzle_b32":
        return _swizzle(m, i)
    if match := re.fullmatch(r"ds_read_b64_tr_b(8|16)", name):
        return _read_transposed(m, i, int(match[1]))
    if name.startswith("ds_"):
        return _lds(m, i)
    if name.startswith("scratch_"):
        return _scratch(m, i)
    if name.startswith("global_"):
        return _global(m, i)
    return _buffer(m, i) if name.startswith("buffer_") else None


class Piece:
    """What a load or store moves: its bytes, and how a narrow one sits in its register."""

    def __init__(self, m: Machine, i: Instruction, what: str) -> None:
        match = PIECE.fullmatch(what)
        if match is None:
            raise Unknown(f"the emulator does not know `{i.text}`")
        words, bits, sign, narrow, d16, hi = match.groups()
        self.signed = False
        self.half = ("high" if hi else "low") if d16 else ""
        if narrow:
            self.size = 1 if narrow in ("byte", "b8", "8", "i8") else 2
            self.signed = sign == "s" or narrow.startswith("i")
            self.half = "high" if hi else self.half
        else:
            self.size = int(bits) // 8 if bits else 4 * int((words or "x1")[1:])
        self.m = m

    def write(self, reg: int, words: list[Array], mask: Array | None = None) -> None:
        m, first = self.m, words[0]
        if self.size < 4:
            shift = u32(32 - 8 * self.size)
            if self.signed:
                first = ((first << shift).view(i32) >> shift.astype(i32)).view(u32)
            if self.half:
                old = m.V[m.row(reg)][m.at]
                low = self.half == "low"
                first = first & u32(0xFFFF) if low else first << u32(16)
                first = first | old & u32(0xFFFF0000 if low else 0xFFFF)
            words = [first]
        for k, word in enumerate(words):
            m.write(reg + k, word, mask)

    def read(self, reg: int) -> Callable[[], list[Array]]:
        m = self.m
        rows = [m.V[m.row(reg + k)] for k in range(-(-self.size // 4))]
        if self.half == "high":
            return lambda: [rows[0][m.at] >> u32(16)]
        return lambda: [row[m.at] for row in rows]


def _address(m: Machine, o: Operand) -> Callable[[], Array]:
    assert o.reg is not None
    read = m.vector(o.reg)
    return lambda: read().astype(i64)


class LdsPort:
    """LDS accesses of the live lanes of the group that executes."""

    def __init__(self, m: Machine) -> None:
        self.m = m

    def _lanes(self, at: Array) -> tuple[Array, Array, Array]:
        m = self.m
        where = np.nonzero(m.mask)
        self.where, self.member = where, m.index[where[0]]
        return (
            m.workgroup[self.member],
            m.wave[self.member],
            np.broadcast_to(at, m.mask.shape)[where],
        )

    def read(self, tickets: Array, at: Array, size: int) -> list[Array]:
        """[waves, 64] words; zero in lanes that are off."""
        m = self.m
        group, wave, offsets = self._lanes(at)
        words = m.lds.read(group, wave, tickets[self.where[0]], offsets, size)
        if m.all_live:
            return [word.reshape(m.count, 64) for word in words]
        spread = [np.zeros(m.mask.shape, u32) for _ in words]
        for full, word in zip(spread, words, strict=True):
            full[self.where] = word
        return spread

    def write(self, tickets: Array, at: Array, words: list[Array], size: int) -> None:
        group, wave, offsets = self._lanes(at)
        data = [word[self.where] for word in words]
        self.m.lds.write(group, wave, tickets[self.where[0]], offsets, data, size)


def _lds(m: Machine, i: Instruction) -> Step:
    match = re.fullmatch(r"ds_(read|write)(2|2st64)?_(.*)", i.mnemonic)
    if match is None:
        raise Unknown(f"the emulator does not know `{i.text}`")
    way, twice, what = match.groups()
    piece, port = Piece(m, i, f"{way}_{what}"), LdsPort(m)
    reads = way == "read"
    address = _address(m, i.operands[reads])
    if twice:
        step = piece.size * (64 if twice == "2st64" else 1)
        offsets = [i.number("offset0") * step, i.number("offset1") * step]
    else:
        offsets = [i.number("offset")]
    words = -(-piece.size // 4)
    if reads:
        target = i.operands[0]
        assert target.reg is not None
        first = target.reg

        def read() -> None:
            at, tickets = address(), m.issue("lds", list(target.regs))
            data = [port.read(tickets, at + offset, piece.size) for offset in offsets]
            for k, part in enumerate(data):
                piece.write(first + k * words, part)

        return read
    data = [piece.read(o.reg) for o in i.operands[1:] if o.reg is not None]

    def write() -> None:
        at, tickets = address(), m.issue("lds", [])
        for offset, part in zip(offsets, data, strict=True):
            port.write(tickets, at + offset, part(), piece.size)

    return write


def _read_transposed(m: Machine, i: Instruction, bits: int) -> Step:
    """CDNA4: 16 lanes read a matrix whose rows are 16 elements; lane j gets its column j."""
    target, port = i.operands[0], LdsPort(m)
    assert target.reg is not None
    first, address, offset = target.reg, _address(m, i.operands[1]), i.number("offset")
    rows = 64 // bits  # elements of a lane, before and after

    def step() -> None:
        at, tickets = address(), m.issue("lds", list(target.regs))
        low, high = port.read(tickets, at + offset, 8)
        octets = np.stack([low, high], -1).view(np.uint16 if bits == 16 else np.uint8)
        matrix = octets.reshape(m.count, 4, rows, 16)  # [waves, groups of 16 lanes, row, column]
        columns = np.ascontiguousarray(matrix.swapaxes(2, 3)).reshape(m.count, 64, rows)
        for k in range(2):
            m.write(first + k, columns.view(u32)[..., k])

    return step


def _permute(m: Machine, i: Instruction) -> Step:
    """bpermute: lane i reads from the lane of its address; permute: writes to it."""
    target, address, values = i.operands[0], _address(m, i.operands[1]), i.operands[2]
    assert target.reg is not None and values.reg is not None
    first, read, offset = target.reg, m.vector(values.reg), i.number("offset")

    def step() -> None:
        m.issue("lds", list(target.regs))
        lane = (np.broadcast_to(address(), (m.count, 64)) + offset >> 2) & 63
        bits, wave = np.broadcast_to(read(), (m.count, 64)), np.arange(m.count)[:, None]
        if "bpermute" in i.mnemonic:
            m.write(first, np.where(m.mask[wave, lane], bits[wave, lane], u32(0)))
            return
        moved = np.zeros((m.count, 64), u32)
        for at in range(64):  # of two lanes that write to one, the higher wins
            live = m.mask[:, at]
            moved[np.flatnonzero(live), lane[live, at]] = bits[live, at]
        m.write(first, moved)

    return step


def _swizzle(m: Machine, i: Instruction) -> Step:
    pattern = i.modifiers["offset"].replace(" ", "")
    lane, target = np.arange(64), i.operands[0]
    if match := re.fullmatch(r"swizzle\(SWAP,(\d+)\)", pattern):
        source = lane ^ int(match[1])
    elif match := re.fullmatch(r"swizzle\(QUAD_PERM,(\d),(\d),(\d),(\d)\)", pattern):
        source = (lane & ~3) + np.array([int(x) for x in match.groups()])[lane & 3]
    elif re.fullmatch(r"0x[0-9a-f]+|\d+", pattern) and int(pattern, 0) < 0x8000:
        code = int(pattern, 0)
        keep, put, flip = code & 31, code >> 5 & 31, code >> 10 & 31
        source = lane & 32 | (lane & 31 & keep | put) ^ flip
    else:
        raise Unknown(f"the emulator does not know `{i.text}`")
    values = i.operands[1]
    assert target.reg is not None and values.reg is not None
    first, read = target.reg, m.vector(values.reg)

    def step() -> None:
        m.issue("lds", list(target.regs))
        m.write(first, np.where(m.mask[:, source], read()[:, source], u32(0)))

    return step


# An access: addresses as uint64 [waves, 64], and the lanes that take part.
Addresses = Callable[[], tuple[Array, Array]]


def _move(m: Machine, i: Instruction, what: str, data: Operand | None, where: Addresses) -> Step:
    """A load to registers, a load to LDS, or a store; dead lanes of a buffer load become zero."""
    piece = Piece(m, i, what)
    if what.startswith("store"):
        assert data is not None and data.reg is not None
        words = piece.read(data.reg)

        def store() -> None:
            address, live = where()
            m.issue("vm", [])
            m.memory.store(address, words(), piece.size, live)

        return store
    if data is None:
        offset, base = i.number("offset"), m.scalar(M0)
        window = u32(0xFFFF if m.arch == "gfx942" else 0x3FFFF)

        def load_to_lds() -> None:
            address, live = where()
            loaded = m.memory.load(address, piece.size, live)
            at = (base() & window).astype(i64)[:, None] + offset + LANE * piece.size
            lanes = np.nonzero(m.mask)
            wave, tickets = m.index[lanes[0]], m.issue("vm", [])
            flight = Flight(
                wave, tickets[lanes[0]], at[lanes], [w[lanes] for w in loaded], piece.size
            )
            retired = m.retired[1, wave]
            m.lds.depart(m.workgroup[wave], m.wave[wave], retired, flight.at, piece.size)
            m.flights.append(flight)

        return load_to_lds
    assert data.reg is not None
    target = data.reg

    def load() -> None:
        address, live = where()
        loaded = m.memory.load(address, piece.size, live)
        m.issue("vm", list(data.regs))
        piece.write(target, loaded)

    return load


def _global(m: Machine, i: Instruction) -> Step:
    what = i.mnemonic.removeprefix("global_")
    operands = list(i.operands)
    data = None if "_lds_" in what else operands.pop(1 if what.startswith("store") else 0)
    vector, scalar = operands
    offset = u64(i.number("offset") & 0xFFFFFFFFFFFFFFFF)
    assert vector.reg is not None
    if scalar.text == "off":
        low, high = m.vector(vector.reg), m.vector(vector.reg + 1)
        return _move(m, i, what, data, lambda: (pair(low(), high()) + offset, m.mask))
    base, more = m.scalar64(scalar), m.vector(vector.reg)
    return _move(m, i, what, data, lambda: (base()[:, None] + more().astype(u64) + offset, m.mask))


def _buffer(m: Machine, i: Instruction) -> Step:
    """A raw buffer: lanes beyond num_records load zero and store nothing."""
    if "idxen" in i.modifiers:
        raise Unknown(f"the emulator does not know `{i.text}`")
    what = i.mnemonic.removeprefix("buffer_")
    operands = list(i.operands)
    data = None if "lds" in i.modifiers else operands.pop(0)
    vector, resource, soffset = operands
    assert resource.reg is not None
    size = Piece(m, i, what).size
    more = m.vector(vector.reg) if vector.reg is not None else (lambda: np.zeros((1, 1), u32))
    base, records = m.scalar64(resource), m.scalar(resource.reg + 2)
    scalar, offset = m.scalar32(soffset), i.number("offset")

    def where() -> tuple[Array, Array]:
        uniform = scalar().astype(i64)[:, None]
        at = np.broadcast_to(more().astype(i64) + offset, (m.count, 64))
        inside = at + size <= records().astype(i64)[:, None] - uniform
        start = (base() & u64(0xFFFFFFFFFFFF))[:, None]
        return start + (at + uniform).astype(u64), m.mask & inside

    return _move(m, i, what, data, where)


def _scratch(m: Machine, i: Instruction) -> Step:
    """Memory of a lane: vector, scalar and constant offsets add up."""
    what = i.mnemonic.removeprefix("scratch_")
    stores = what.startswith("store")
    data, vector = (i.operands[1], i.operands[0]) if stores else i.operands[:2]
    piece, offset = Piece(m, i, what), i.number("offset")
    if piece.size % 4 or data.reg is None:
        raise Unknown(f"the emulator does not know `{i.text}`")
    reg, words = data.reg, piece.size // 4
    lane = m.vector(vector.reg) if vector.reg is not None else (lambda: np.zeros((1, 1), u32))
    scalar = i.operands[2]
    uniform = m.scalar32(scalar) if scalar.text != "off" else (lambda: np.zeros(m.count, u32))
    values = piece.read(reg)

    def step() -> None:
        at = lane().astype(i64) + uniform().astype(i64)[:, None] + offset
        at = np.broadcast_to(at, (m.count, 64)) >> 2
        if at.min() < 0 or at.max() + words > m.scratch.shape[2]:
            raise OutOfBounds(f"scratch word {int(at.max())} of {m.scratch.shape[2]}")
        m.issue("vm", [] if stores else list(data.regs))
        wave, lanes = m.index[:, None], np.arange(64)
        for k in range(words):
            if stores:
                on = np.nonzero(m.mask)
                m.scratch[m.index[on[0]], on[1], (at + k)[on]] = values()[k][on]
            else:
                m.write(reg + k, m.scratch[wave, lanes, at + k])

    return step
