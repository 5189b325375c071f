"""The bytes that a GPU would load say what the assembly says that the other tests execute."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.cases import assert_right
from tests.cdna import kernels
from tests.cdna.asm import Kernel, parse
from tests.cdna.compiler import Binary, Compiler, Ran
from tests.cdna.hsaco import disassemble, objdump
from tests.cdna.shipped import Shipped, launch, model, on, problem_of

CASE = model("two splits", lens=(70, 3), num_kv_splits=2)

pytestmark = pytest.mark.skipif(
    objdump() is None, reason="no llvm-objdump of LLVM 19 or later here to read gfx950 code with"
)


def words(kernel: Kernel) -> list[tuple[str, ...]]:
    """What identifies an instruction in both texts: labels and notations of numbers differ, and
    only the code object has the no-ops that align it."""
    return [
        (i.mnemonic, i.encoding, *(o.text for o in i.operands if o.reg is not None))
        for i in kernel.instructions
        if i.mnemonic not in ("s_nop", "s_code_end")
    ]


@pytest.mark.parametrize("pinned", ["", "portable"], ids=["table", "portable"])
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_the_code_object_runs_as_its_assembly_does(
    arch: str,
    pinned: str,
    compiler: Compiler,
    runs: Counter[Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    execute = kernels.execute

    def from_bytes(binary: Binary, arch: str, grid: Any, values: Any) -> int:
        asm = parse(binary.asm)
        kernel = disassemble(binary.hsaco, asm.name, arch)
        assert words(kernel) == words(asm)
        for name, value in kernel.descriptor.items():
            if name != "next_free_vgpr":  # the code object only knows how many are allocated
                assert asm.descriptor.get(name, 0) == value, name
        return execute(binary, arch, grid, values, kernel)

    monkeypatch.setattr(kernels, "execute", from_bytes)
    with on(Shipped(arch, False, pinned, CASE), compiler, runs):
        out, lse = launch(problem_of(CASE))
    assert_right(problem_of(CASE), out, lse)
