"""The hot loops of the shipped kernels with one wait or barrier taken out: the emulator notices."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
from torch import Tensor

from tests.cdna import kernels
from tests.cdna.asm import Instruction, Kernel, parse, parse_instruction
from tests.cdna.compiler import Binary, Compiler
from tests.cdna.conftest import SCORE
from tests.cdna.machine import Machine, Step
from tests.cdna.memory import Fault
from tests.cdna.shipped import Shipped, launch, model, on, problem_of

compile_step = Machine.compile
LOOPS = [
    Shipped(arch, False, pinned, model(f"{N} heads", N=N, lens=(3 * tile + 5,), num_kv_splits=1))
    for arch, pinned, N, tile in (
        ("gfx942", "", 16, 16),
        ("gfx942", "", 64, 32),
        ("gfx942", "portable", 16, 16),
        ("gfx942", "portable", 64, 32),
        ("gfx950", "", 16, 32),
        ("gfx950", "", 64, 64),
        ("gfx950", "portable", 16, 32),
        ("gfx950", "portable", 64, 32),
    )
] + [  # two blocks in turn, neither cut
    Shipped(arch, False, "", model("evenly", N=64, lens=(3 * tile + 5,) * 4))
    for arch, tile in (("gfx942", 32), ("gfx950", 64))
]


class Recorded:
    """A launch that can be made again, with another kernel in place of its own."""

    def __init__(self, shipped: Shipped, compiler: Compiler) -> None:
        launched: list[tuple[Binary, str, tuple[int, ...], dict[str, Any]]] = []

        def record(*arguments: Any) -> int:
            launched.append(arguments)
            return 0

        with on(shipped, compiler, Counter()), mock.patch.object(kernels, "execute", record):
            self.outputs = launch(problem_of(shipped.case))
        self.launched = launched[0]
        self.kernel = parse(self.launched[0].asm)
        self.index = {id(i): at for at, i in enumerate(self.kernel.instructions)}
        self.waited: set[tuple[str, int]] = set()  # counters and instructions
        with mock.patch.object(Machine, "compile", lambda m, i: self._watched(m, i)):
            self.right = self.run(self.kernel)

    def _watched(self, machine: Machine, i: Instruction) -> Step:
        """Notes which waits had something to wait for; others repeat what an earlier wait did."""
        step, at = compile_step(machine, i), self.index[id(i)]

        def watched() -> object:
            before = machine.retired.copy()
            result = step()
            vm, lds, smem = (machine.retired != before).any(1)
            self.waited |= {("vmcnt", at)} if vm else set()
            self.waited |= {("lgkmcnt", at)} if lds or smem else set()
            return result

        return watched if i.mnemonic == "s_waitcnt" else step

    def run(self, kernel: Kernel) -> list[Tensor]:
        for output in self.outputs:
            output.fill_(math.nan)
        kernels.execute(*self.launched, kernel=kernel)
        return [output.clone() for output in self.outputs]

    def notices(self, at: int, changed: Instruction) -> bool:
        instructions = list(self.kernel.instructions)
        instructions[at] = changed
        try:
            got = self.run(replace(self.kernel, instructions=instructions))
        except Fault:
            return True
        return not all(a.equal(b) for a, b in zip(got, self.right, strict=True))


def mutations(recorded: Recorded) -> Iterator[tuple[int, str, Instruction]]:
    """Every barrier of the loop as a nop, and every wait without each counter it waits for."""
    kernel = recorded.kernel
    for at in kernel.hot_loop:
        i = kernel.instructions[at]
        if i.mnemonic == "s_barrier":
            yield at, "barriers", parse_instruction("s_nop 0")
        for counter in i.modifiers if i.mnemonic == "s_waitcnt" else ():
            if (counter, at) not in recorded.waited:
                continue
            others = {k: v for k, v in i.modifiers.items() if k != counter}
            yield at, f"{counter} waits", replace(i, modifiers=others)


@pytest.mark.parametrize(
    "shipped",
    [
        pytest.param(x, marks=[pytest.mark.extra] if x.pinned or x.case.name == "evenly" else [])
        for x in LOOPS
    ],
    ids=str,
)
def test_a_missing_wait_or_barrier_is_noticed(
    shipped: Shipped, compiler: Compiler, pytestconfig: pytest.Config
) -> None:
    recorded = Recorded(shipped, compiler)
    assert not any(output.isnan().any() for output in recorded.right)
    score = pytestconfig.stash.setdefault(SCORE, Counter())
    missed = []
    for at, kind, changed in mutations(recorded):
        score[kind, "tried"] += 1
        if recorded.notices(at, changed):
            score[kind, "noticed"] += 1
        else:
            missed.append(f"{at}: {recorded.kernel.instructions[at].text}")
    assert not missed
