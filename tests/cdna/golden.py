"""A machine of one wave that runs a few lines, for the tests of single instructions."""

from __future__ import annotations

import struct

import numpy as np

from tests.cdna import access, matrix, scalar, vector
from tests.cdna.asm import AGPR, SGPR, VCC, Kernel, Resources, parse_instruction
from tests.cdna.machine import Machine
from tests.cdna.memory import GlobalMemory


def machine(lines: str, arch: str = "gfx950", lds: int = 0) -> Machine:
    instructions = [parse_instruction(line.strip()) for line in f"{lines}\ns_endpgm".split("\n")]
    resources = Resources(512, 256, 102, 0, 0, 0, lds, 0)
    kernel = Kernel("golden", instructions, {}, {"accum_offset": 256}, resources)
    modules = [scalar, vector, matrix, access]
    m = Machine(kernel, arch, GlobalMemory(), 1, 1, lds, modules)
    for reg in range(AGPR):
        m.define(reg, np.zeros((1, 64), np.uint32))
    for reg in range(SGPR, SGPR + 102):
        m.define(reg, np.zeros(1, np.uint32))
    m.define(VCC, np.zeros(1, np.uint32))
    m.define(VCC + 1, np.zeros(1, np.uint32))
    return m


def bits(x: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", x))[0])
