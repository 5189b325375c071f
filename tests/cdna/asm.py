"""LLVM's AMDGPU assembly as data: instructions, labels, the kernel's descriptor and metadata.

Reads what Triton keeps as `binary.asm["amdgcn"]`, and `llvm-objdump -d` once hsaco.py has put it
into the same form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

# One flat space of register numbers: v0.. from 0, a0.. from AGPR, scalars from SGPR.
AGPR, SGPR = 256, 512
FLAT_SCRATCH, VCC, TTMP, M0, EXEC, SCC = (SGPR + i for i in (102, 106, 108, 124, 126, 253))
NAMED = {
    **{f"{n}": (r, 2) for n, r in (("flat_scratch", FLAT_SCRATCH), ("vcc", VCC), ("exec", EXEC))},
    **{
        f"{n}_lo": (r, 1) for n, r in (("flat_scratch", FLAT_SCRATCH), ("vcc", VCC), ("exec", EXEC))
    },
    **{
        f"{n}_hi": (r + 1, 1)
        for n, r in (("flat_scratch", FLAT_SCRATCH), ("vcc", VCC), ("exec", EXEC))
    },
    "m0": (M0, 1),
    "scc": (SCC, 1),
    "src_scc": (SCC, 1),
}
FILES = {"v": 0, "a": AGPR, "s": SGPR, "ttmp": TTMP}
ENCODINGS = ("_e64_dpp", "_e32", "_e64", "_sdwa", "_dpp")


class Unknown(Exception):
    """Assembly that the emulator has no meaning for."""


@dataclass(frozen=True, slots=True)
class Operand:
    """A run of registers, a constant, or a word such as `off`."""

    text: str
    reg: int | None = None  # first register in the flat space
    count: int = 0
    value: int | None = None  # bits of a constant; negative integers stay negative
    neg: bool = False
    abs: bool = False

    @property
    def regs(self) -> range:
        return range(0) if self.reg is None else range(self.reg, self.reg + self.count)

    @property
    def is_vector(self) -> bool:
        return self.reg is not None and self.reg < SGPR


@dataclass(frozen=True)
class Instruction:
    mnemonic: str  # without the encoding
    encoding: str  # "", "e32", "e64", "sdwa", "dpp" or "e64_dpp"
    operands: tuple[Operand, ...]
    modifiers: dict[str, str]  # a bare word maps to ""
    text: str

    def number(self, modifier: str, default: int = 0) -> int:
        return int(self.modifiers.get(modifier) or str(default), 0)

    def numbers(self, modifier: str, default: tuple[int, ...]) -> tuple[int, ...]:
        """A list such as `op_sel:[0,1]`."""
        text = self.modifiers.get(modifier)
        return tuple(int(x) for x in text.strip("[]").split(",")) if text else default

    @property
    def target(self) -> str | None:
        """The label a branch goes to."""
        branches = self.mnemonic == "s_branch" or self.mnemonic.startswith("s_cbranch")
        return self.operands[0].text if branches else None


@dataclass(frozen=True)
class Resources:
    """What the compiler says the kernel needs."""

    vgprs: int  # v0.. and a0.. together, as they are allocated
    agprs: int
    sgprs: int
    vgpr_spills: int
    sgpr_spills: int
    scratch: int  # bytes of a lane
    static_lds: int  # Triton's own is dynamic: `binary.metadata.shared`
    kernarg_size: int


@dataclass(frozen=True)
class Kernel:
    name: str
    instructions: list[Instruction]
    labels: dict[str, int]  # index of the instruction that follows
    descriptor: dict[str, int]  # .amdhsa_ directives
    resources: Resources
    kernarg_offsets: list[int] = field(default_factory=list)  # of the arguments, in order

    @cached_property
    def loops(self) -> list[range]:
        """Bodies of backward branches, shortest first."""
        found = {
            range(self.labels[i.target], at + 1)
            for at, i in enumerate(self.instructions)
            if i.target in self.labels and self.labels[i.target] <= at
        }
        return sorted(found, key=len)

    @property
    def hot_loop(self) -> range:
        """The shortest loop with matrix instructions: the tiles of the KV."""
        for body in self.loops:
            if any(i.mnemonic.startswith("v_mfma") for i in self.body(body)):
                return body
        raise Unknown(f"{self.name} has no loop with matrix instructions")

    def body(self, at: range) -> list[Instruction]:
        return self.instructions[at.start : at.stop]


def parse(text: str, name: str | None = None) -> Kernel:
    """The kernel called `name`, or the only one of the text."""
    if name is None:
        kernels = re.findall(r"^\s*\.amdhsa_kernel\s+(\S+)", text, re.M)
        if len(kernels) != 1:
            raise Unknown(f"expected one kernel, found {kernels}: give its name")
        name = kernels[0]
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    inside = False
    for raw in text.splitlines():
        line = re.split(r"\s*(?:;|//)", raw, maxsplit=1)[0].strip()
        if label := re.match(r"^([\w.$]+):$", line):
            inside |= label[1] == name
            labels[label[1]] = len(instructions)
        elif inside and line.startswith((".section", ".size")):
            break
        elif inside and line and not line.startswith("."):
            instructions.append(parse_instruction(line))
    if not inside:
        raise Unknown(f"no kernel {name} in this assembly")
    descriptor = {key: int(value) for key, value in re.findall(r"\.amdhsa_(\w+)\s+(\d+)", text)}
    offsets = [int(x) for x in re.findall(r"\.offset:\s+(\d+)", text)]
    return Kernel(name, instructions, labels, descriptor, _resources(text, descriptor), offsets)


def _resources(text: str, descriptor: dict[str, int]) -> Resources:
    def entry(key: str, default: int = 0) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else default

    return Resources(
        vgprs=entry("vgpr_count", descriptor.get("next_free_vgpr", 0)),
        agprs=entry("agpr_count"),
        sgprs=entry("sgpr_count", descriptor.get("next_free_sgpr", 0)),
        vgpr_spills=entry("vgpr_spill_count"),
        sgpr_spills=entry("sgpr_spill_count"),
        scratch=descriptor.get("private_segment_fixed_size", 0),
        static_lds=descriptor.get("group_segment_fixed_size", 0),
        kernarg_size=descriptor.get("kernarg_size", 0),
    )


def parse_instruction(line: str) -> Instruction:
    full, _, rest = line.partition(" ")
    mnemonic, encoding = full, ""
    for suffix in ENCODINGS:
        if full.startswith("v_") and full.endswith(suffix):
            mnemonic, encoding = full.removesuffix(suffix), suffix[1:]
            break
    parts = _split(rest)
    modifiers: dict[str, str] = {}
    if mnemonic == "s_waitcnt":
        modifiers = dict(re.findall(r"(\w+)\((\d+)\)", rest))
        if not modifiers:
            raise Unknown(f"a wait without a counter: {line}")
        return Instruction(mnemonic, encoding, (), modifiers, line)
    words = []
    for part in parts:
        word, *extra = re.split(r"\s+", part)
        if ":" in word and not re.match(
            r"^[-|]*[vsa]\[|^ttmp\[", word
        ):  # an instruction without operands
            extra, word = [word, *extra], ""
        if word:
            words.append(word)
        for modifier in extra:
            key, _, value = modifier.partition(":")
            modifiers[key] = value
    return Instruction(mnemonic, encoding, tuple(map(parse_operand, words)), modifiers, line)


def _split(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth, current = [], 0, ""
    for char in text.strip():
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += char
    return [*parts, current.strip()] if current.strip() else parts


def parse_operand(text: str) -> Operand:
    word, neg, absolute = text, False, False
    if word.startswith("-") and not re.match(r"-[\d.]", word):
        word, neg = word[1:], True
    if wrapped := re.fullmatch(r"\|(.*)\||(neg|abs|sext)\((.*)\)", word):
        kind = wrapped[2]
        if kind == "sext":
            raise Unknown(f"operand {text}")
        word, neg, absolute = wrapped[1] or wrapped[3], neg or kind == "neg", kind != "neg"
    if word in NAMED:
        return Operand(text, *NAMED[word], neg=neg, abs=absolute)
    if one := re.fullmatch(r"(v|a|s|ttmp)(\d+)", word):
        return Operand(text, FILES[one[1]] + int(one[2]), 1, neg=neg, abs=absolute)
    if many := re.fullmatch(r"(v|a|s|ttmp)\[(\d+)(?::(\d+))?\]", word):
        first, last = int(many[2]), int(many[3] or many[2])
        return Operand(text, FILES[many[1]] + first, last - first + 1, neg=neg, abs=absolute)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", word):
        return Operand(text, value=int(word, 0), neg=neg, abs=absolute)
    if re.fullmatch(r"-?\d*\.\d+(e[-+]?\d+)?", word):
        bits = int(np.float32(word).view(np.uint32))
        return Operand(text, value=bits, neg=neg, abs=absolute)
    return Operand(text)
