"""Global memory as bounded segments, and the LDS of workgroups with what makes its use safe."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.cdna.formats import Array, i64, u32, u64

GUARD = 1 << 20  # bytes of nothing between two segments
BASE = 0x7E00_0000_0000
FLYING = 1 << 62  # the writer of LDS that a direct-to-LDS load is on its way to
POISON = u32(0x7FC07FC0)  # NaN as fp32, as a pair of bf16, and no address of anything


class Fault(Exception):
    """The program does what hardware would not forgive."""


class OutOfBounds(Fault):
    pass


class ReadOnly(Fault):
    pass


class Uninitialised(Fault):
    pass


class NotWaited(Fault):
    pass


class Race(Fault):
    pass


@dataclass
class Segment:
    base: int
    bytes: Array  # uint8, the host's own memory
    writable: bool

    @property
    def end(self) -> int:
        return self.base + self.bytes.size


class GlobalMemory:
    def __init__(self) -> None:
        self.segments: list[Segment] = []

    def add(self, memory: Array, writable: bool) -> int:
        """Map uint8 [n] and return its address."""
        top = self.segments[-1].end + GUARD if self.segments else BASE
        base = -(-top // GUARD) * GUARD
        self.segments.append(Segment(base, memory, writable))
        return base

    def load(self, address: Array, size: int, live: Array) -> list[Array]:
        """Words of `size` bytes at uint64 addresses where `live`; zero elsewhere."""
        words = [np.zeros(address.shape, u32) for _ in range(-(-size // 4))]
        for segment, where, at in self._find(address, size, live):
            if size % 4 == 0 and not (at & 3).any():
                view = segment.bytes[: segment.bytes.size & ~3].view(u32)
                for i, word in enumerate(words):
                    word[where] = view[(at >> 2) + i]
            else:
                for b in range(size):
                    octet = segment.bytes[at + b].astype(u32) << u32(8 * (b % 4))
                    words[b // 4][where] |= octet
        return words

    def store(self, address: Array, words: list[Array], size: int, live: Array) -> None:
        for segment, where, at in self._find(address, size, live):
            if not segment.writable:
                raise ReadOnly(f"a store to {segment.base:#x}+{int(at[0])}, which is read-only")
            for b in range(size):
                octet = words[b // 4][where] >> u32(8 * (b % 4))
                segment.bytes[at + b] = octet.astype(np.uint8)

    def _find(
        self, address: Array, size: int, live: Array
    ) -> list[tuple[Segment, tuple[Array, ...], Array]]:
        """Segments touched, the lanes that touch each, and their offsets in it."""
        found, left = [], live
        while left.any():
            first = int(address[left][0])
            segment = next((s for s in self.segments if s.base <= first < s.end), None)
            if segment is None:
                raise OutOfBounds(f"nothing is mapped at {first:#x}: {self._nearest(first)}")
            inside = left & (address >= u64(segment.base)) & (address < u64(segment.end))
            where = np.nonzero(inside)
            at = (address[where] - u64(segment.base)).astype(i64)
            if int(at.max()) + size > segment.bytes.size:
                raise OutOfBounds(f"{size} bytes at {int(at.max())} of {segment.bytes.size}")
            found.append((segment, where, at))
            left = left & ~inside
        return found

    def _nearest(self, address: int) -> str:
        s = min(self.segments, key=lambda s: min(abs(address - s.base), abs(address - s.end)))
        return f"{address - s.base} bytes from the start of a buffer of {s.bytes.size}"


class Lds:
    """The LDS of all workgroups of a batch. What nobody wrote is POISON, and may be read: software
    pipelines read past the last tile and drop the result.

    Two accesses to a unit by different waves, of which one writes, are ordered if the earlier one
    was retired by its wave (s_waitcnt) before a barrier that came between. Per unit stand the last
    write, as a ticket of its wave, and every wave's last read; per wave stands the ticket up to
    which a barrier has ordered it. Direct-to-LDS loads count separately, by landings.
    """

    def __init__(self, workgroups: int, waves: int, size: int, unit: int = 4) -> None:
        words, units = -(-size // 4), -(-size // unit)
        self.size, self.waves, self.unit = size, waves, unit
        self.bits = (2 * waves).bit_length() - 1  # of a wave in `writer`; waves is a power of 2
        self.data = np.full((workgroups, words), POISON, u32)
        self.octets = self.data.view(np.uint8)
        self.writer = np.full((workgroups, units), -1, i64)  # ticket, then wave (+ waves: landing)
        self.reads = np.zeros((workgroups, waves, units), np.int32)
        self.ordered = np.zeros((workgroups, 2 * waves), i64)  # tickets, then landings
        self.unwritten = 0  # units read that nobody wrote
        self.last_write, self.last_read = np.zeros((2, workgroups, 2 * waves), i64)

    def check(self, at: Array, size: int) -> None:
        if at.size and (at.min() < 0 or at.max() + size > self.size):
            raise OutOfBounds(f"{size} bytes of LDS at {int(at.max())}, {self.size} are allocated")

    def read(self, group: Array, wave: Array, ticket: Array, at: Array, size: int) -> list[Array]:
        """Words at byte offsets; all arguments but size are [lanes]."""
        self.check(at, size)
        for word in self._units(at, size):
            writer = self.writer[group, word]
            self.unwritten += int((writer < 0).sum())
            self._ordered_writer(group, wave, word, writer)
            self.reads[group, wave, word] = ticket
        self.last_read[group, wave] = ticket
        if size % 4 == 0 and not (at & 3).any():
            return [self.data[group, (at >> 2) + i] for i in range(size // 4)]
        words = [np.zeros(at.shape, u32) for _ in range(-(-size // 4))]
        for b in range(size):
            words[b // 4] |= self.octets[group, at + b].astype(u32) << u32(8 * (b % 4))
        return words

    def write(
        self, group: Array, wave: Array, ticket: Array, at: Array, words: list[Array], size: int
    ) -> None:
        self.check(at, size)
        for word in self._units(at, size):
            self._ordered_writer(group, wave, word, self.writer[group, word])
            self._ordered_readers(group, wave, word)
            self.writer[group, word] = (ticket << self.bits) + wave
        self.last_write[group, wave] = ticket
        self._put(group, at, words, size)

    def depart(self, group: Array, wave: Array, retired: Array, at: Array, size: int) -> None:
        """A direct-to-LDS load sets out: nobody may touch its words until it has landed."""
        self.check(at, size)
        for word in self._units(at, size):
            writer = self.writer[group, word]
            self._ordered_writer(group, wave, word, writer)
            self._ordered_readers(group, wave, word)
            own = writer & (2 * self.waves - 1) == wave
            if (own & (writer >> self.bits > retired)).any() or (
                self.reads[group, wave, word] > retired
            ).any():
                raise NotWaited("a direct-to-LDS load over LDS accesses that may still be going on")
            self.writer[group, word] = FLYING

    def land(
        self, group: Array, wave: Array, landing: Array, at: Array, words: list[Array], size: int
    ) -> None:
        for word in self._units(at, size):
            self.writer[group, word] = (landing << self.bits) + wave + self.waves
        self.last_write[group, wave + self.waves] = landing
        self._put(group, at, words, size)

    def barrier(self, groups: Array, retired: Array, landed: Array) -> None:
        """Workgroups `groups` pass a barrier; retired and landed are [groups, waves]."""
        self.ordered[groups, : self.waves] = retired
        self.ordered[groups, self.waves :] = landed

    def _put(self, group: Array, at: Array, words: list[Array], size: int) -> None:
        if size % 4 == 0 and not (at & 3).any():
            for i, word in enumerate(words):
                self.data[group, (at >> 2) + i] = word
        else:
            for b in range(size):
                octet = words[b // 4] >> u32(8 * (b % 4))
                self.octets[group, at + b] = octet.astype(np.uint8)

    def _ordered_writer(self, group: Array, wave: Array, word: Array, writer: Array) -> None:
        if writer.max(initial=0) == FLYING:
            raise NotWaited("LDS words that a direct-to-LDS load has not written yet")
        if (self.last_write <= self.ordered).all():
            return
        who = writer & (2 * self.waves - 1)
        bad = writer >> self.bits > self.ordered[group, who]
        bad &= who & (self.waves - 1) != wave
        if bad.any():
            self._race("wrote", who[bad][0] & (self.waves - 1), wave[bad][0], word[bad][0])

    def _ordered_readers(self, group: Array, wave: Array, word: Array) -> None:
        for other in np.flatnonzero((self.last_read > self.ordered).any(0)).tolist():
            late = self.reads[group, other, word] > self.ordered[group, other]
            bad = late & (wave != other)
            if bad.any():
                self._race("read", other, wave[bad][0], word[bad][0])

    def _race(self, did: str, other: int, wave: int, word: int) -> None:
        at = word * self.unit
        raise Race(
            f"wave {other} {did} LDS at {at}; no wait and barrier order it before wave {wave}"
        )

    def _units(self, at: Array, size: int) -> list[Array]:
        first = at // self.unit
        return [first + i for i in range(-(-size // self.unit))]
