"""What can be said of a binary without running it: registers, LDS, and the loop over the tiles."""

from __future__ import annotations

import importlib
from collections import Counter
from dataclasses import dataclass
from typing import Any

from tests.cdna.asm import Instruction, Kernel, parse
from tests.cdna.compiler import Binary, Pointer, Request
from tests.cdna.launch import LDS_LIMIT

VGPRS, GRANULE, WAVES = 512, 8, 8  # registers of a SIMD's lane, their allocation, most waves
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
DEPTH = {  # K of the 16×16 matrix instruction for operands of 2 and 4 bytes
    "gfx942": {2: 16, 4: 4},
    "gfx950": {2: 32, 4: 4},
}
WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2}
WIDTHS |= {"ubyte": 1, "sbyte": 1, "sshort": 2}


@dataclass(frozen=True)
class Shape:
    """The tile of a stage-1 binary, from the arguments it was compiled for."""

    kernel: str
    block_m: int
    block_n: int
    L: int
    R: int
    bytes: int  # of an element of the matrix instructions' operands
    kv_bytes: int  # of the cache
    reload_v: bool
    waves: int
    even: bool = False  # by a `schedule`

    def __str__(self) -> str:
        tile = f"{self.kernel} {self.block_m}x{self.block_n}"
        fp8 = " fp8" if self.kv_bytes == 1 else ""
        wide = f"{' fp32' * (self.bytes == 4)}{f' L{self.L}' * (self.L != 512)}"
        return f"{tile}{fp8}{wide}{' evenly' * self.even}"

    @classmethod
    def of(cls, request: Request, binary: Binary) -> Shape:
        module, name = request.kernel
        names = getattr(importlib.import_module(module), name).arg_names
        given: dict[str, Any] = dict(zip(names, request.arguments, strict=True))
        query, cache = (given[f"{x}_ptr"] for x in ("q_nope", "kv_c"))
        assert isinstance(query, Pointer) and isinstance(cache, Pointer)
        return cls(
            name.removesuffix("_kernel"),
            given["BLOCK_M"],
            given["BLOCK_N"],
            given.get("BLOCK_L", 512),
            given.get("BLOCK_R", 64),
            BYTES.get(query.dtype, 2),
            BYTES.get(cache.dtype, 1),
            bool(given.get("RELOAD_V")),
            binary.waves,
            given.get("part_out_ptr") is not None,
        )

    def matrix_instructions(self, arch: str) -> dict[str, int]:
        """Of one wave and tile, by shape.

        The waves share Q · Kᵀ by rows (split) or by rows and keys (the others), as far as there are
        16×16 pieces for them; past that they repeat each other's work. They share P · V by columns.
        """
        deep = DEPTH[arch][self.bytes]
        rows, keys = self.block_m // 16, self.block_n // 16
        if self.kernel == "split":
            pieces = max(1, rows // self.waves) * keys
        else:
            pieces = max(1, rows * keys // self.waves)
        shallow = min(deep, self.block_n)  # P · V cannot be deeper than a tile has keys
        scores = pieces * (self.L + self.R) // deep
        out = rows * (self.L // 16) * (self.block_n // shallow) // self.waves
        counts = Counter({f"16x16x{deep}": scores})
        counts[f"16x16x{shallow}"] += out
        return dict(counts)

    def wide_loads(self) -> range:
        """How many 16-byte loads one wave and tile may have: what is too small for a load of all
        lanes may be one of some lanes, or narrower."""
        lanes = 64 * self.waves * 16
        parts = [self.L] * (1 + self.reload_v) + [self.R]
        sizes = [self.block_n * part * self.kv_bytes for part in parts]
        return range(sum(n // lanes for n in sizes), sum(-(-n // lanes) for n in sizes) + 1)


@dataclass(frozen=True)
class Report:
    name: str
    vgprs: int
    agprs: int
    vgpr_spills: int
    sgpr_spills: int  # to lanes of vector registers: instructions, not memory
    scratch: int
    lds: int
    programs: int  # a compute unit holds at once
    waves: float  # a SIMD holds then
    matrix: dict[str, int]  # instructions of one turn of the hot loop, by shape
    loads: dict[int, int]  # the same for loads, by bytes of a lane
    narrow: int  # the same for LDS reads of 2 bytes or less
    reloads: int  # the same for accesses to scratch, where spilled registers lie
    expected_matrix: dict[str, int]
    expected_wide: range

    def problems(self, arch: str) -> list[str]:
        """What holds for every binary, whatever its size."""
        found = []
        if self.vgpr_spills or self.scratch:
            found.append(f"{self.vgpr_spills} VGPRs spilled, {self.scratch} bytes of scratch")
        if self.reloads:
            found.append(f"{self.reloads} accesses to scratch in the loop")
        if self.lds > LDS_LIMIT[arch]:
            found.append(f"{self.lds} bytes of LDS, {arch} has {LDS_LIMIT[arch]}")
        if self.matrix != self.expected_matrix:
            found.append(f"matrix instructions {self.matrix}, expected {self.expected_matrix}")
        wide, expected = self.loads.get(16, 0), self.expected_wide
        if wide not in expected:
            found.append(f"{wide} loads of 16 bytes, not {expected[0]} to {expected[-1]}")
        if self.narrow:
            found.append(f"{self.narrow} LDS reads of 2 bytes or less")
        return found


def report(request: Request, binary: Binary) -> Report:
    kernel = parse(binary.asm)
    r = kernel.resources
    name = request.kernel[1].removesuffix("_kernel")
    shape = None if name.startswith("combine") else Shape.of(request, binary)
    programs = programs_per_unit(request.arch, kernel, binary)
    loop = [] if shape is None else kernel.body(kernel.hot_loop)
    return Report(
        name=name if shape is None else str(shape),
        vgprs=r.vgprs,
        agprs=r.agprs,
        vgpr_spills=r.vgpr_spills,
        sgpr_spills=r.sgpr_spills,
        scratch=r.scratch,
        lds=binary.lds,
        programs=programs,
        waves=programs * binary.waves / 4,
        matrix=Counter(_shape(i) for i in loop if i.mnemonic.startswith("v_mfma")),
        loads=Counter(w for i in loop if (w := _load_width(i))),
        narrow=sum(i.mnemonic.startswith(("ds_read_u", "ds_read_i")) for i in loop),
        reloads=sum(i.mnemonic.startswith("scratch_") for i in loop),
        expected_matrix={} if shape is None else shape.matrix_instructions(request.arch),
        expected_wide=range(1) if shape is None else shape.wide_loads(),
    )


def programs_per_unit(arch: str, kernel: Kernel, binary: Binary) -> int:
    """By registers and by LDS; a compute unit has four SIMDs."""
    granules = -(-max(kernel.resources.vgprs, 1) // GRANULE)
    by_registers = min(WAVES, VGPRS // (granules * GRANULE)) * 4 // binary.waves
    return min(by_registers, LDS_LIMIT[arch] // binary.lds) if binary.lds else by_registers


def _shape(i: Instruction) -> str:
    return i.mnemonic.split("_")[3]


def _load_width(i: Instruction) -> int:
    kind, _, rest = i.mnemonic.partition("_load_")
    return WIDTHS.get(rest.removeprefix("lds_"), 0) if kind in ("global", "buffer") else 0
