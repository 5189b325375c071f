"""Take one wait or barrier out of a kernel; say from the code alone when that changes nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from tests.cdna.asm import Instruction, Kernel, parse_instruction
from tests.cdna.effects import effects

COUNTERS = {"vmcnt": ("vm",), "lgkmcnt": ("lds", "smem")}


@dataclass(frozen=True)
class Mutation:
    at: int
    counter: str  # of a wait, "" of a barrier
    kernel: Kernel


def mutations(kernel: Kernel, body: range) -> Iterator[Mutation]:
    for at in body:
        i = kernel.instructions[at]
        if i.mnemonic == "s_barrier":
            yield Mutation(at, "", _with(kernel, at, parse_instruction("s_nop 0")))
        for counter in i.modifiers if i.mnemonic == "s_waitcnt" else ():
            others = {k: v for k, v in i.modifiers.items() if k != counter}
            text = f"{i.text} without {counter}"
            yield Mutation(at, counter, _with(kernel, at, replace(i, modifiers=others, text=text)))


def _with(kernel: Kernel, at: int, i: Instruction) -> Kernel:
    changed = list(kernel.instructions)
    changed[at] = i
    return replace(kernel, instructions=changed)


def redundant(kernel: Kernel, body: range, mutation: Mutation) -> str:
    """Why what was taken out of the loop orders nothing, or "" if nothing proves it.

    The loop runs over its body again and again, so "next" goes on from its end to its start.
    """
    around = [*range(mutation.at + 1, body.stop), *range(body.start, mutation.at)]
    if any(kernel.instructions[k].target for k in body[:-1]):
        around = around[: body.stop - mutation.at - 1]
        around = list(_until_branch(kernel, around))
    instructions = [kernel.instructions[k] for k in around]
    return _barrier(instructions) if not mutation.counter else _wait(kernel, mutation, instructions)


def _until_branch(kernel: Kernel, around: list[int]) -> Iterator[int]:
    for k in around:
        if kernel.instructions[k].target:
            return
        yield k


def _barrier(following: list[Instruction]) -> str:
    for i in following:
        if i.mnemonic == "s_barrier":
            return "another barrier follows before LDS is touched"
        if i.mnemonic.startswith(("ds_read", "ds_write")) or effects(i).to_lds:
            return ""
    return ""


def _wait(kernel: Kernel, mutation: Mutation, following: list[Instruction]) -> str:
    """Another wait for as much, before anything touches what this one waits for."""
    original_left = _left(mutation, kernel)
    kinds = COUNTERS[mutation.counter]
    awaited = frozenset[int]().union(
        *(effects(i).writes for i in kernel.instructions if effects(i).counter in kinds)
    )
    issued = 0
    for i in following:
        e = effects(i)
        if i.mnemonic == "s_waitcnt" and mutation.counter in i.modifiers:
            if i.number(mutation.counter) <= original_left + issued:
                return "a later wait covers it before anything needs it"
        elif i.mnemonic == "s_barrier" or (e.reads | e.writes) & awaited:
            return ""
        elif e.counter in kinds:
            issued += 1
            if e.counter == "vm" or e.to_lds:
                continue
    return ""


def _left(mutation: Mutation, kernel: Kernel) -> int:
    text = mutation.kernel.instructions[mutation.at].text.split(" without ")[0]
    return parse_instruction(text).number(mutation.counter)
