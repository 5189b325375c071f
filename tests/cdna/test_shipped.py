"""Every AMD binary we ship is executed in the emulator, against naive PyTorch in float64."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
import torch

from mla_compile.kernels import decode
from mla_compile.validate import validate
from tests.cases import assert_right, outputs
from tests.cdna.compiler import Compiler, Ran
from tests.cdna.shipped import ARCHS, CASES, Shipped, launch, model, on, plan, problem_of


@pytest.fixture(scope="module")
def compiling(compiler: Compiler, request: pytest.FixtureRequest) -> None:
    """Start compiling everything the selected tests will ask for, in their order."""
    selected = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    for shipped in (p["shipped"] for p in selected if "shipped" in p):
        plan(shipped, compiler)


@pytest.mark.parametrize("shipped", CASES)
def test_a_shipped_binary_is_right(
    shipped: Shipped, compiler: Compiler, runs: Counter[Ran], compiling: None
) -> None:
    problem = problem_of(shipped.case)
    with on(shipped, compiler, runs):
        out, lse = launch(problem)
    assert_right(problem, out, lse)


@pytest.mark.extra
@pytest.mark.parametrize("arch", ARCHS)
def test_a_ragged_batch_is_shared_out_over_all_units(
    arch: str, compiler: Compiler, runs: Counter[Ran]
) -> None:
    lens = Random(0).choices((0, 1, 64, 500, 1700, 4400), k=50)
    case = model("ragged batch", N=64, lens=tuple(lens))
    problem = problem_of(case)
    call = validate(*problem.args, **problem.options)
    with on(Shipped(arch, False, "", case), compiler, runs):
        assert decode.make_plan(call, outputs(problem)[0].stride(), None).even
        out, lse = launch(problem)
    assert_right(problem, out, lse)


@pytest.mark.parametrize("pinned", ["", "portable"], ids=["table", "portable"])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_cache_reaches_past_two_to_the_31_elements(
    arch: str, pinned: str, compiler: Compiler, runs: Counter[Ran]
) -> None:
    """Its last slots are what the sequences own; all before was never touched, nor given memory."""
    case = model("far", lens=(33, 5), num_kv_splits=1)
    problem = problem_of(case)
    q_nope, q_pe, kv_c, k_pe, scale = problem.args
    slots = kv_c.shape[0]
    before = 2**31 // 576 + 1
    cache = torch.empty(before + slots, 1, 576, dtype=torch.bfloat16)
    cache[before:, :, :512], cache[before:, :, 512:] = kv_c, k_pe
    table = problem.options["kv_indices"]
    options = {**problem.options, "kv_indices": torch.where(table < slots, table + before, table)}
    out, lse = outputs(problem)
    call = validate(q_nope, q_pe, cache[..., :512], cache[..., 512:], scale, **options)
    with on(Shipped(arch, False, pinned, case), compiler, runs):
        decode.launch(call, out, lse, 1)
    assert_right(problem, out, lse)
