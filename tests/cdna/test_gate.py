"""The shipped binaries as compiled: no memory spills, LDS that fits, matrix instructions and loads
as theory wants them, registers within their golden limits."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import triton

from tests.cdna.compiler import Compiler
from tests.cdna.gate import Report, Shape, report
from tests.cdna.limits import EXCEPTIONS, LIMITS, TRITON, breaches, judge
from tests.cdna.shipped import CASES, MATRIX, Shipped, plan


@cache
def reports(shipped: Shipped, compiler: Compiler) -> list[Report]:
    return [report(r, compiler.submit(r).result()) for r in plan(shipped, compiler)]


@pytest.mark.parametrize("shipped", CASES)
def test_a_shipped_binary_passes_the_gate(shipped: Shipped, compiler: Compiler) -> None:
    for r in reports(shipped, compiler):
        wrong, _ = judge(str(shipped), r.problems(shipped.arch))
        assert not wrong


@pytest.mark.skipif(
    not triton.__version__.startswith(TRITON),
    reason=f"golden limits are those of Triton {TRITON}, this is {triton.__version__}",
)
@pytest.mark.parametrize("shipped", CASES)
def test_a_shipped_binary_keeps_its_golden_limits(shipped: Shipped, compiler: Compiler) -> None:
    for r in reports(shipped, compiler):
        assert not breaches(shipped.arch, r)


def test_every_exception_names_shipped_binaries() -> None:
    names = [str(shipped) for shipped in MATRIX]
    for part, _, _ in EXCEPTIONS:
        assert any(part in name for name in names), part


def test_theory_is_what_the_shapes_say() -> None:
    """Worked out by hand for 64 rows, 32 keys and 4 waves: 2 × 36 for scores, 64 for out."""
    shape = Shape("split", 64, 32, 512, 64, bytes=2, kv_bytes=2, reload_v=False, waves=4)
    assert shape.matrix_instructions("gfx942") == {"16x16x16": 2 * 36 + 64}
    assert shape.matrix_instructions("gfx950") == {"16x16x32": 2 * 18 + 32}
    assert shape.wide_loads() == range(8 + 1, 8 + 1 + 1)


GOOD = Report(
    name="split 64x32",
    vgprs=300,
    agprs=44,
    vgpr_spills=0,
    sgpr_spills=0,
    scratch=0,
    lds=65536,
    programs=1,
    waves=1,
    matrix={"16x16x16": 136},
    loads={16: 9},
    narrow=0,
    reloads=0,
    expected_matrix={"16x16x16": 136},
    expected_wide=range(9, 10),
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scratch": 4}, "4 bytes of scratch"),
        ({"vgpr_spills": 1}, "1 VGPRs spilled"),
        ({"lds": 65540}, "65540 bytes of LDS, gfx942 has 65536"),
        ({"matrix": {"16x16x16": 137}}, "expected"),
        ({"matrix": {"32x32x8": 34}}, "expected"),
        ({"loads": {16: 8, 8: 2}}, "8 loads of 16 bytes, not 9 to 9"),
        ({"narrow": 1}, "1 LDS reads of 2 bytes"),
        ({"reloads": 1}, "1 accesses to scratch in the loop"),
    ],
)
def test_the_gate_says_what_is_wrong(change: dict[str, object], said: str) -> None:
    assert GOOD.problems("gfx942") == []
    (problem,) = replace(GOOD, **change).problems("gfx942")  # type: ignore[arg-type]
    assert said in problem


def test_golden_limits_are_held_from_above() -> None:
    limit = LIMITS["gfx942", "split 64x32"]
    assert not breaches("gfx942", replace(GOOD, vgprs=limit.vgprs))
    assert breaches("gfx942", replace(GOOD, vgprs=limit.vgprs + 1))
    assert breaches("gfx942", replace(GOOD, programs=0))
    assert breaches("gfx942", replace(GOOD, sgpr_spills=limit.sgpr_spills + 1))
