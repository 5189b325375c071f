"""Run a kernel over a grid: its arguments, its registers at the start, batches of workgroups."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tests.cdna import access, matrix, scalar, vector
from tests.cdna.asm import SGPR, Kernel, parse
from tests.cdna.formats import Array, u32
from tests.cdna.machine import Machine
from tests.cdna.memory import Fault, GlobalMemory

LDS_LIMIT = {"gfx942": 64 << 10, "gfx950": 160 << 10}
# What may stand in the first scalars, in this order, each with its number of registers.
USER_SGPRS = (
    ("private_segment_buffer", 4),
    ("dispatch_ptr", 2),
    ("queue_ptr", 2),
    ("kernarg_segment_ptr", 2),
    ("dispatch_id", 2),
    ("private_segment_size", 1),
)
BATCH = 96 << 20  # bytes of vector registers emulated at once


@dataclass(frozen=True)
class Buffer:
    """A pointer into host memory: uint8, shared by all pointers into the same allocation."""

    memory: Array
    offset: int = 0
    writable: bool = False


Argument = Buffer | tuple[str, float]  # a tuple is a struct format and a value


@dataclass(frozen=True)
class Run:
    executed: Array  # waves that ran each instruction
    unwritten: int  # LDS units that were read and that nobody had written

    @property
    def wave_instructions(self) -> int:
        return int(self.executed.sum())


def launch(
    kernel: Kernel | str,
    arch: str,
    grid: Sequence[int],
    arguments: Sequence[Argument],
    *,
    waves: int,
    lds: int,
) -> Run:
    """Buffers are read and written in place. Faults are raised, see memory.py."""
    if isinstance(kernel, str):
        kernel = parse(kernel)
    if lds > LDS_LIMIT[arch]:
        raise Fault(f"{lds} bytes of LDS do not fit the {LDS_LIMIT[arch]} of {arch}")
    memory = GlobalMemory()
    packed = _pack(kernel, memory, arguments)
    kernarg = memory.add(packed.view(np.uint8), writable=False)
    workgroups = int(np.prod(grid))
    rows = max(kernel.resources.vgprs, 1)
    batch = max(1, BATCH // (rows * waves * 256))
    executed, unwritten = np.zeros(len(kernel.instructions), np.int64), 0
    modules = [scalar, vector, matrix, access]
    for first in range(0, workgroups, batch):
        ids = np.arange(first, min(first + batch, workgroups))
        machine = Machine(kernel, arch, memory, len(ids), waves, lds, modules)
        _start(machine, kernel, packed, kernarg, grid, ids)
        machine.run()
        executed += machine.executed
        unwritten += machine.lds.unwritten
    return Run(executed, unwritten)


def _pack(kernel: Kernel, memory: GlobalMemory, arguments: Sequence[Argument]) -> Array:
    """The kernarg segment as uint32."""
    mapped: dict[int, int] = {}
    data = bytearray()
    writable = {id(a.memory) for a in arguments if isinstance(a, Buffer) and a.writable}
    for argument in arguments:
        if isinstance(argument, Buffer):
            key = id(argument.memory)
            if key not in mapped:
                mapped[key] = memory.add(argument.memory, key in writable)
            code, value = "Q", mapped[key] + argument.offset
        else:
            code, value = argument  # type: ignore[assignment]
        data += bytes(-len(data) % struct.calcsize(code)) + struct.pack(f"<{code}", value)
    size = max(kernel.resources.kernarg_size, len(data)) + 64  # scalar loads may take whole lines
    return np.frombuffer(data.ljust(size + -size % 4, b"\0"), u32).copy()


def _start(
    m: Machine, kernel: Kernel, packed: Array, kernarg: int, grid: Sequence[int], ids: Array
) -> None:
    at = SGPR
    asked = kernel.descriptor
    for name, count in USER_SGPRS:
        if asked.get(f"user_sgpr_{name}"):
            if name == "kernarg_segment_ptr":  # the others stay poisoned: no address of anything
                m.define(at, u32(kernarg & 0xFFFFFFFF))
                m.define(at + 1, u32(kernarg >> 32))
            at += count
    first = asked.get("user_sgpr_kernarg_preload_offset", 0)
    for k in range(asked.get("user_sgpr_kernarg_preload_length", 0)):
        m.define(at + k, packed[first + k])
    at = SGPR + asked["user_sgpr_count"]
    place = np.unravel_index(ids, tuple(reversed([*grid, 1, 1][:3])))[::-1]
    for axis, index in zip("xyz", place, strict=True):
        if asked.get(f"system_sgpr_workgroup_id_{axis}"):
            m.define(at, np.repeat(index.astype(u32), m.waves))
            at += 1
    items = np.arange(m.waves * 64, dtype=u32).reshape(m.waves, 64)
    m.define(0, np.tile(items, (len(ids), 1)))
