"""Every AMD binary we ship is executed in the emulator, against naive PyTorch in float64."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.cases import assert_right
from tests.cdna.compiler import Compiler, Request
from tests.cdna.shipped import MATRIX, Shipped, launch, on, plan, problem_of


@pytest.fixture(scope="module")
def compiling(compiler: Compiler, request: pytest.FixtureRequest) -> None:
    """Start compiling everything the selected tests will ask for, in their order."""
    selected = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    for shipped in (p["shipped"] for p in selected if "shipped" in p):
        plan(shipped, compiler)


@pytest.mark.parametrize("shipped", MATRIX, ids=str)
def test_a_shipped_binary_is_right(
    shipped: Shipped, compiler: Compiler, runs: Counter[Request], compiling: None
) -> None:
    problem = problem_of(shipped.case)
    with on(shipped, compiler, runs):
        out, lse = launch(problem)
    assert_right(problem, out, lse)
