"""The waves of a batch of workgroups, run in lockstep: the waves that stand at the lowest program
counter execute together, one numpy operation for all of them.

Results of loads are deferred: a register that a load will write must not be touched before an
s_waitcnt has retired the load. Registers that nothing wrote must not be read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from tests.cdna.asm import AGPR, EXEC, SCC, SGPR, Instruction, Kernel, Operand, Unknown
from tests.cdna.effects import Effects, effects
from tests.cdna.formats import Array, i64, lanes_of, pair, u32, u64
from tests.cdna.memory import POISON, Fault, GlobalMemory, Lds, NotWaited, Uninitialised

BARRIER, END = "barrier", "end"
Step = Callable[[], object]  # None: go on; bool [waves]: who branches; BARRIER; END
REGISTERS = SGPR + 128
COUNTERS = {"vm": 0, "lds": 1, "smem": 2}


@dataclass(eq=False)
class Flight:
    """A direct-to-LDS load that was issued and has not landed; all arrays are [lanes]."""

    wave: Array  # in the batch
    ticket: Array
    at: Array
    words: list[Array]
    size: int


class Machine:
    def __init__(
        self,
        kernel: Kernel,
        arch: str,
        memory: GlobalMemory,
        workgroups: int,
        waves: int,  # of a workgroup
        lds: int,
        semantics: list[ModuleType],
    ) -> None:
        n = workgroups * waves
        self.kernel, self.arch, self.memory, self.semantics = kernel, arch, memory, semantics
        self.total, self.waves = n, waves
        self.effects = [effects(i) for i in kernel.instructions]
        self.accum = kernel.descriptor.get("accum_offset", AGPR)
        rows = max(kernel.resources.vgprs, 1)
        self.V = np.full((rows, n, 64), POISON, u32)
        self.S = np.full((128, n), POISON, u32)
        self.S[EXEC - SGPR : EXEC - SGPR + 2] = 0xFFFFFFFF
        self.scc = np.zeros(n, bool)
        self.live = np.ones((n, 64), bool)  # EXEC as lanes
        self.scratch = np.full((n, 64, kernel.resources.scratch // 4), POISON, u32)
        narrow = [s for i in kernel.instructions if (s := _lds_width(i)) < 4]
        self.lds = Lds(workgroups, waves, lds, min(narrow, default=4))
        self.wave = np.arange(n) % waves
        self.workgroup = np.arange(n) // waves

        self.issued = np.zeros((len(COUNTERS), n), i64)
        self.retired = np.zeros((len(COUNTERS), n), i64)
        self.need = np.zeros((len(COUNTERS), REGISTERS, n), i64)  # the ticket to wait for
        self.landed = np.zeros(n, i64)
        self.flights: list[Flight] = []
        self.pending: set[int] = set()  # registers some wave waits for
        self.written = np.zeros((REGISTERS, n), bool)
        self.blank = set(range(REGISTERS))  # registers some wave has not written
        for reg in (EXEC, EXEC + 1):
            self.define(reg)

        self.pc = np.zeros(n, i64)
        self.stopped = np.zeros(n, bool)  # at a barrier
        self.ended = np.zeros(n, bool)
        self.code: list[Step | None] = [None] * len(kernel.instructions)
        self.executed = np.zeros(len(kernel.instructions), i64)  # waves that ran each instruction
        self.group(np.ones(n, bool))

    def define(self, reg: int, values: Array | np.generic | None = None) -> None:
        """Give a register its value at launch: [waves] of a scalar, [waves, 64] of a vector."""
        if values is not None and reg < SGPR:
            self.V[self.row(reg)] = values
        elif values is not None:
            self.S[reg - SGPR] = values
        self.written[reg] = True
        self.blank.discard(reg)

    # Registers of the group that executes

    def group(self, members: Array) -> None:
        self.index = np.flatnonzero(members)
        self.count = len(self.index)
        self.full = self.count == self.total
        self.at: slice | Array = slice(None) if self.full else self.index
        self.refresh()

    def refresh(self) -> None:
        self.mask = self.live[self.at]
        self.all_live = bool(self.mask.all())

    def row(self, reg: int) -> int:
        row = reg if reg < AGPR else self.accum + reg - AGPR
        if row >= len(self.V) or AGPR > reg >= self.accum:
            raise Fault(f"register {reg} is beyond what the kernel's descriptor allocates")
        return row

    def vector(self, reg: int) -> Callable[[], Array]:
        """Bits of a register as uint32 [waves, 64], or [waves, 1] of a scalar."""
        if reg >= SGPR:
            scalar = self.scalar(reg)
            return lambda: scalar()[:, None]
        values = self.V[self.row(reg)]
        return lambda: values[self.at]

    def scalar(self, reg: int) -> Callable[[], Array]:
        if reg == SCC:
            return lambda: self.scc[self.at].astype(u32)
        values = self.S[reg - SGPR]
        return lambda: values[self.at]

    def scalar64(self, o: Operand) -> Callable[[], Array]:
        """uint64 [waves] of a scalar operand."""
        if o.reg is None:
            value = np.full(1, constant(o) & 0xFFFFFFFFFFFFFFFF, u64)
            return lambda: np.broadcast_to(value, self.count)
        low, high = self.scalar(o.reg), self.scalar(o.reg + 1)
        return lambda: pair(low(), high())

    def scalar32(self, o: Operand) -> Callable[[], Array]:
        if o.reg is None:
            value = np.full(1, constant(o) & 0xFFFFFFFF, u32)
            return lambda: np.broadcast_to(value, self.count)
        return self.scalar(o.reg)

    def write(self, reg: int, values: Array, mask: Array | None = None) -> None:
        """Write a vector register where EXEC, and the mask if there is one, say so."""
        target = self.V[self.row(reg)]
        if mask is None and self.all_live:
            target[self.at] = values
            return
        mask = self.mask if mask is None else mask & self.mask
        if self.full:
            np.copyto(target, values, where=mask)
        else:
            target[self.index] = np.where(mask, values, target[self.index])

    def write_scalar(self, reg: int, values: Array) -> None:
        self.S[reg - SGPR][self.at] = values
        if reg in (EXEC, EXEC + 1):
            bits = pair(self.S[EXEC - SGPR][self.at], self.S[EXEC + 1 - SGPR][self.at])
            self.live[self.at] = lanes_of(bits)
            self.refresh()

    def write_scalar64(self, reg: int, values: Array) -> None:
        self.write_scalar(reg, (values & u64(0xFFFFFFFF)).astype(u32))
        self.write_scalar(reg + 1, (values >> u64(32)).astype(u32))

    # Running

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while True:
                ready = ~(self.stopped | self.ended)
                if ready.any():
                    counters = np.where(ready, self.pc, 1 << 60)
                    self.group(counters == counters.min())
                    self._advance(int(counters.min()), counters)
                elif self.ended.all():
                    return
                else:
                    self._release()

    def _advance(self, pc: int, counters: Array) -> None:
        """Run the group until it splits, stops, or meets waves that are ahead."""
        ahead = counters[counters > pc]
        meet = int(ahead.min()) if ahead.size else 1 << 60
        instructions, kernel = self.kernel.instructions, self.kernel
        while pc < meet:
            i, e = instructions[pc], self.effects[pc]
            try:
                if not self.pending.isdisjoint(e.reads | e.writes):
                    self._check_pending(e)
                if not self.blank.isdisjoint(e.reads) or not self.blank.isdisjoint(e.writes):
                    self._check_blank(e)
                step = self.code[pc]
                if step is None:
                    step = self.code[pc] = self.compile(i)
                result = step()
            except Fault as fault:
                raise type(fault)(f"{fault}\n  at `{i.text}`, instruction {pc}") from None
            self.executed[pc] += self.count
            pc += 1
            if result is None:
                continue
            if result is BARRIER or result is END:
                self.pc[self.index] = pc
                (self.stopped if result is BARRIER else self.ended)[self.index] = True
                return
            taken = np.asarray(result)
            target = kernel.labels[i.target]  # type: ignore[index]
            if taken.all():
                pc = target
                if pc < meet:
                    continue
            elif taken.any():
                self.pc[self.index] = np.where(taken, target, pc)
                return
        self.pc[self.index] = pc

    def compile(self, i: Instruction) -> Step:
        for module in self.semantics:
            step: Step | None = module.build(self, i)
            if step is not None:
                return step
        raise Unknown(f"the emulator does not know `{i.text}`")

    def _release(self) -> None:
        """Workgroups whose waves have all arrived pass their barrier."""
        arrived = (self.stopped | self.ended).reshape(-1, self.waves).all(1)
        groups = np.flatnonzero(arrived & self.stopped.reshape(-1, self.waves).any(1))
        if not groups.size:
            raise Fault("deadlock: some waves of a workgroup wait for others that never come")
        done = np.where(self.ended, self.issued[1], self.retired[1]).reshape(-1, self.waves)
        landed = self.landed.reshape(-1, self.waves)
        self.lds.barrier(groups, done[groups], landed[groups])
        self.stopped.reshape(-1, self.waves)[groups] = False

    # What must have happened before

    def _check_pending(self, e: Effects) -> None:
        for reg in self.pending & (e.reads | e.writes):
            for name, counter in COUNTERS.items():
                if name == e.counter and name != "smem" and reg not in e.reads | e.merges:
                    continue  # loads of a kind return in order, the later one wins
                late = self.need[counter, reg, self.at] > self.retired[counter, self.at]
                if late.any():
                    raise NotWaited(f"{_name(reg)} waits for a load ({name}) that no wait retired")

    def _check_blank(self, e: Effects) -> None:
        defined = np.ones(self.count, bool)
        for reg in self.blank & (e.reads - e.merges - e.unneeded):
            defined &= self.written[reg, self.at]
        if not defined.all() and not e.copies:
            blank = ", ".join(map(_name, self.blank & e.reads))
            raise Uninitialised(f"{blank} was never written")
        for reg in e.writes:
            self.written[reg, self.at] = defined
            if self.written[reg].all():
                self.blank.discard(reg)
            else:
                self.blank.add(reg)

    def issue(self, counter: str, registers: list[int]) -> Array:
        """Count an operation; its result registers are due when it is retired."""
        c = COUNTERS[counter]
        self.issued[c, self.at] += 1
        tickets = self.issued[c, self.at]
        for reg in registers:
            self.need[c, reg, self.at] = tickets
        self.pending.update(registers)
        return tickets

    def wait(self, counter: str, left: int) -> None:
        """Until at most `left` operations are under way. Scalar loads return in any order."""
        c = COUNTERS[counter]
        if counter == "smem" and left:
            return
        done = np.maximum(self.retired[c, self.at], self.issued[c, self.at] - left)
        self.retired[c, self.at] = done
        if self.pending:
            waiting = np.fromiter(self.pending, int)
            late = (self.need[:, waiting] > self.retired[:, None]).any((0, 2))
            self.pending = set(waiting[late].tolist())
        if counter == "vm" and self.flights:
            self._land()

    def _land(self) -> None:
        aloft = []
        for flight in self.flights:
            due = flight.ticket <= self.retired[0, flight.wave]
            if due.any():
                wave = flight.wave[due]
                self.landed[np.unique(wave)] += 1
                words = [word[due] for word in flight.words]
                args = self.workgroup[wave], self.wave[wave], self.landed[wave], flight.at[due]
                self.lds.land(*args, words, flight.size)
            if not due.all():
                stay = ~due
                words = [word[stay] for word in flight.words]
                left = flight.wave[stay], flight.ticket[stay], flight.at[stay], words
                aloft.append(Flight(*left, flight.size))
        self.flights = aloft


def constant(o: Operand) -> int:
    if o.value is None:
        raise Unknown(f"operand {o.text}")
    return o.value


def _lds_width(i: Instruction) -> int:
    """Bytes of the narrowest piece an LDS instruction touches."""
    if not i.mnemonic.startswith(("ds_read", "ds_write")):
        return 4
    return {"8": 1, "16": 2}.get(i.mnemonic.split("_")[2][1:], 4)


def _name(reg: int) -> str:
    if reg >= SGPR:
        return f"s{reg - SGPR}"
    return f"v{reg}" if reg < AGPR else f"a{reg - AGPR}"
