"""Clocks that one compute unit takes for a turn of a kernel's hot loop: a model, not a measurement.

All resident waves run the loop's instructions in order. Each SIMD has one VALU port and one matrix
pipe, each compute unit one LDS and one vector-memory pipe. An instruction waits for its registers,
its pipe, the counter of an s_waitcnt or the other waves of a barrier. How long an instruction holds
the LDS or the memory pipe follows from the addresses it touched in the emulator: bank conflicts and
cache lines are those of the real layout. Not modelled: caches, TLB, power, other compute units.
"""

from __future__ import annotations

import heapq
import re
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

from tests.cdna import access
from tests.cdna import launch as emulator
from tests.cdna.asm import SGPR, Instruction, Kernel
from tests.cdna.effects import effects
from tests.cdna.machine import Machine


@dataclass(frozen=True)
class Gpu:
    units: int  # compute units
    ghz: float
    lds: int  # bytes of a compute unit
    flops: int  # of a SIMD's matrix pipe in a clock, two-byte operands
    lds_read: int  # bytes of a clock; writes and reads under 8 bytes a lane get 128
    transcendental: int  # clocks of exp, log, rcp
    latency: int  # clocks until a row of the cache is there; 500 for smaller loads
    hbm: float  # TB/s that a long stream reaches
    l2: float  # TB/s
    efficiency: float  # of the compute units, fitted: see bench.amd_model


# Peaks are AMD's; read widths and latencies are assumed from CDNA's documents and from HipKittens.
GPUS = {
    "gfx942": Gpu(304, 2.1, 64 << 10, 512, 128, 16, 900, 4.0, 10.0, 0.58),
    "gfx950": Gpu(256, 2.4, 160 << 10, 1024, 256, 8, 1000, 5.5, 14.0, 0.70),
}
INDEX_LATENCY, STORE_LATENCY, SCALAR_LATENCY, LDS_LATENCY = 500, 300, 200, 48
MFMA_LATENCY = 12  # from the last pass of an MFMA to a VALU instruction that needs it
BARRIER, BRANCH, LDS_ISSUE = 8, 12, 16
VMEM_BYTES = 64  # of a clock
QUEUED = {"lds": 64, "vm": 128}  # clocks of work in front of a pipe before issue stalls
WIDE_READ = 512  # bytes of a wave from which on a load is a row of the cache


@dataclass
class Traffic:
    """What the memory instructions of a kernel touched in the emulator, by their index."""

    lds: dict[int, list[tuple[np.ndarray[Any, Any], int]]] = field(
        default_factory=lambda: defaultdict(list)
    )  # byte offsets of a wave's lanes, and bytes of a lane
    lines: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    executed: np.ndarray[Any, Any] | None = None  # waves that ran each instruction

    KEPT = 4  # of an instruction


class _Observer:
    """The emulator's memory semantics, watched."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic
        self.at = -1
        self.index: dict[int, int] = {}

    def build(self, m: Machine, i: Instruction) -> Any:
        if not self.index:
            self.index = {id(x): n for n, x in enumerate(m.kernel.instructions)}
            self._watch(m)
        step = access.build(m, i)
        if step is None:
            return None
        number = self.index[id(i)]

        def watched() -> Any:
            self.at = number
            return step()

        return watched

    def _watch(self, m: Machine) -> None:
        self.traffic.executed = m.executed
        read, write, load = m.lds.read, m.lds.write, m.memory.load

        def note(group: Any, wave: Any, offsets: Any, size: int) -> None:
            kept = self.traffic.lds[self.at]
            if len(kept) < Traffic.KEPT and len(group):
                first = (group == group[0]) & (wave == wave[0])
                kept.append((offsets[first], size))

        def watched_read(group: Any, wave: Any, ticket: Any, at: Any, size: int) -> Any:
            note(group, wave, at, size)
            return read(group, wave, ticket, at, size)

        def watched_write(
            group: Any, wave: Any, ticket: Any, at: Any, words: Any, size: int
        ) -> Any:
            note(group, wave, at, size)
            return write(group, wave, ticket, at, words, size)

        def watched_load(address: Any, size: int, live: Any) -> Any:
            kept = self.traffic.lines[self.at]
            if len(kept) < Traffic.KEPT:
                at = np.broadcast_to(address, live.shape)[0][live[0]]
                ends = np.concatenate([at >> 6, (at + size - 1) >> 6])
                kept.append(len(np.unique(ends)))
            return load(address, size, live)

        m.lds.read, m.lds.write = watched_read, watched_write  # type: ignore[method-assign]
        m.memory.load = watched_load  # type: ignore[method-assign]


@contextmanager
def watching() -> Iterator[Traffic]:
    """What is run in the emulator meanwhile leaves its traffic."""
    traffic = Traffic()
    with mock.patch.object(emulator, "access", _Observer(traffic)):
        yield traffic


# The order in which gfx950 serves the lanes of a 16-byte LDS read, as HipKittens describes it.
_HALF = [*range(4), *range(12, 16), *range(20, 28), *range(4, 12), *range(16, 20), *range(28, 32)]
WIDE_ORDER = np.array([*_HALF, *(lane + 32 for lane in _HALF)])


def lds_clocks(gpu: Gpu, offsets: np.ndarray[Any, Any], size: int, reads: bool) -> int:
    """One per pass over the banks: lanes are served in groups, words of one bank in turn."""
    width = gpu.lds_read if reads and size >= 8 else 128
    banks, lanes = width // 4, max(1, min(64 if size < 4 else 32, width // max(size, 4)))
    if size == 16 and banks == 64 and len(offsets) == 64:
        offsets = offsets[WIDE_ORDER]
    clocks = 0
    for start in range(0, len(offsets), lanes):
        words = offsets[start : start + lanes] >> 2
        words = np.unique(np.concatenate([words + k for k in range(max(1, size // 4))]))
        clocks += int(np.bincount(words % banks).max())
    return clocks


@dataclass(slots=True)
class Step:
    """An instruction of the loop as the pipes see it."""

    pipe: str  # mfma, valu, lds, vm, wait, barrier, scalar
    clocks: float = 4.0
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    accumulator: tuple[int, ...] = ()
    latency: float = 0.0
    to_lds: float = 0.0  # clocks of the LDS that a direct load takes
    vm: int | None = None  # operations an s_waitcnt leaves under way
    lgkm: int | None = None


def mfma_clocks(gpu: Gpu, mnemonic: str) -> float:
    m, n, k = map(int, re.findall(r"_(\d+)x(\d+)x(\d+)", mnemonic)[0])
    kind = mnemonic.rsplit("_", 1)[1]
    rate = 64 if kind == "f32" else gpu.flops * (2 if "8" in kind else 1)
    return 2 * m * n * k / rate


def steps(kernel: Kernel, gpu: Gpu, traffic: Traffic) -> list[Step]:
    """Of the hot loop, but for what most turns jump over: the mask of the last tile."""
    body = list(kernel.hot_loop)
    if traffic.executed is not None:
        often = traffic.executed[body].max() / 2
        body = [n for n in body if traffic.executed[n] >= often]
    return [_step(kernel.instructions[n], n, gpu, traffic) for n in body]


def _bytes(name: str) -> int:
    """Bytes a wave moves."""
    twice = 2 if re.search(r"(read|write)2", name) else 1
    if found := re.search(r"dword(?:x(\d))?", name):
        return 256 * int(found[1] or 1)
    if found := re.search(r"_[biu](\d+)", name):
        return max(int(found[1]) * 8, 256) * twice
    return 64


def _step(i: Instruction, at: int, gpu: Gpu, traffic: Traffic) -> Step:
    name, e = i.mnemonic, effects(i)
    reads, writes = (tuple(r for r in s if r < SGPR) for s in (e.reads, e.writes))
    if name.startswith("v_mfma"):
        a, b, c = i.operands[1:4]
        return Step("mfma", mfma_clocks(gpu, name), (*a.regs, *b.regs), writes, tuple(c.regs))
    if name.startswith("v_"):
        slow = 4.0
        if re.match(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_", name):
            slow = gpu.transcendental
        elif re.match(r"v_(mul_lo_u32|mul_hi_|mad_[ui]64)", name):
            slow = 16.0
        return Step("valu", slow, reads, writes)
    if e.counter == "lds":
        read = "read" in name
        seen = [lds_clocks(gpu, offsets, size, read) for offsets, size in traffic.lds.get(at, [])]
        parts = 2 if re.search(r"(read|write)2", name) else 1
        ideal = _bytes(name) / (gpu.lds_read if read else 128)
        clocks = parts * float(np.mean(seen)) if seen else ideal
        return Step("lds", max(2.0, clocks), reads, writes, latency=LDS_LATENCY)
    if e.counter == "vm":
        moved, lines = _bytes(name), traffic.lines.get(at)
        latency = gpu.latency if moved >= WIDE_READ else INDEX_LATENCY
        if "store" in name or name.startswith("scratch"):
            latency = STORE_LATENCY
        clocks = max(4.0, float(np.mean(lines)) if lines else moved / VMEM_BYTES)
        to_lds = moved / 128 if e.to_lds else 0.0
        return Step("vm", clocks, reads, writes, latency=latency, to_lds=to_lds)
    if name == "s_waitcnt":
        left = {key: int(value) for key, value in i.modifiers.items()}
        return Step("wait", 4.0, vm=left.get("vmcnt"), lgkm=left.get("lgkmcnt"))
    if name == "s_barrier":
        return Step("barrier")
    if e.counter == "smem":
        return Step("smem", latency=SCALAR_LATENCY)
    return Step("scalar", 4.0 * (1 + i.operands[0].value) if name == "s_nop" else 4.0)  # type: ignore[operator]


class _Wave:
    def __init__(self, number: int) -> None:
        self.simd, self.number = number % 4, number
        self.at = self.turn = 0
        self.ready: dict[int, float] = defaultdict(float)
        self.chained: dict[int, float] = {}  # when an MFMA can take the register as accumulator
        self.under_way: dict[str, deque[float]] = {"vm": deque(), "lgkm": deque()}


class _Unit:
    """The pipes of a compute unit: the clock at which each is free."""

    def __init__(self) -> None:
        self.valu, self.mfma = [0.0] * 4, [0.0] * 4
        self.lds = self.vm = 0.0


def _earliest(s: Step, w: _Wave, u: _Unit, now: float) -> float:
    """When the wave can issue its next instruction."""
    late = max((w.ready[r] for r in s.reads), default=0.0)
    if s.pipe == "mfma":
        chain = max((w.chained.get(r) or w.ready[r] for r in s.accumulator), default=0.0)
        return max(now, late, chain, u.mfma[w.simd], u.valu[w.simd])
    if s.pipe == "valu":
        over = max((w.ready[r] for r in s.writes), default=0.0)
        return max(now, late, over, u.valu[w.simd])
    if s.pipe == "wait":
        for left, queue in ((s.vm, w.under_way["vm"]), (s.lgkm, w.under_way["lgkm"])):
            while left is not None and len(queue) > left:
                late = max(late, queue.popleft())
    elif s.pipe == "lds":
        late = max(late, u.lds - QUEUED["lds"])
    elif s.pipe == "vm":
        late = max(late, u.vm - QUEUED["vm"])
    return max(now, late)


def _issue(s: Step, w: _Wave, u: _Unit, now: float) -> float:
    """Occupy pipes, date the results; when the wave's next instruction may follow."""
    done = now + s.clocks
    if s.pipe == "mfma":
        u.valu[w.simd], u.mfma[w.simd] = now + 4, done
        for r in s.writes:
            w.ready[r], w.chained[r] = done + MFMA_LATENCY, done
        return now + 4
    if s.pipe == "valu":
        u.valu[w.simd] = done
    elif s.pipe == "lds":
        u.lds = max(u.lds, now + LDS_ISSUE) + s.clocks
        done = u.lds + s.latency
        w.under_way["lgkm"].append(done)
    elif s.pipe == "vm":
        u.vm = max(u.vm, now) + s.clocks
        if s.to_lds:
            u.lds = max(u.lds, now) + s.to_lds
        done = max(u.vm + s.latency, w.under_way["vm"][-1] if w.under_way["vm"] else 0.0)
        w.under_way["vm"].append(done)
    elif s.pipe == "smem":
        w.under_way["lgkm"].append(now + s.latency)
    for r in s.writes:
        w.ready[r] = done
        w.chained.pop(r, None)
    return now + (s.clocks if s.pipe in ("valu", "scalar") else 4)


def clocks(loop: list[Step], waves: int, workgroups: int = 1) -> float:
    """Of a turn of the loop, in the steady state, with `workgroups` of `waves` on one unit."""
    return (_finish(loop, waves, workgroups, 7) - _finish(loop, waves, workgroups, 3)) / 4


def _finish(loop: list[Step], waves: int, workgroups: int, turns: int) -> float:
    """When all waves have run the loop so many times."""
    finish = 0.0
    unit, all_waves = _Unit(), [_Wave(n) for n in range(waves * workgroups)]
    arrived: list[list[tuple[float, _Wave]]] = [[] for _ in range(workgroups)]
    # Of waves that could issue at once the oldest does, as in hardware.
    events = [(50.0 * (w.number // 4), w.number) for w in all_waves]
    while events:
        now, number = heapq.heappop(events)
        w = all_waves[number]
        s = loop[w.at]
        start = _earliest(s, w, unit, now)
        if start > now and s.pipe != "wait":
            heapq.heappush(events, (start, number))  # pipes may be taken by then
            continue
        follow = _issue(s, w, unit, start)
        w.at += 1
        if w.at == len(loop):
            w.at, w.turn = 0, w.turn + 1
            finish = max(finish, follow)
            follow += BRANCH
        freed = [(follow, w)]
        if s.pipe == "barrier":
            group = arrived[number // waves]
            group.append((start, w))
            freed = []
            if len(group) == waves:
                together = max(at for at, _ in group) + BARRIER
                freed = [(together, other) for _, other in group]
                group.clear()
        for at, other in freed:
            if other.turn < turns:
                heapq.heappush(events, (at, other.number))
    return finish


def resident(kernel: Kernel, gpu: Gpu, waves: int, lds: int) -> int:
    """Workgroups that fit a compute unit by registers and LDS."""
    registers = -(-max(kernel.resources.vgprs, 1) // 8) * 8
    by_registers = min(8, 512 // registers) * 4 // waves
    return min(by_registers, gpu.lds // max(lds, 1))
