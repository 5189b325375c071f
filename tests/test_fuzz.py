"""Random programs: what the pass makes of MLA computes the same; what is not MLA stays what it is.

Thousands of them: `python -m tests.fuzz_offline`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch._inductor import config

import mla_compile
from mla_compile.backend import mla
from tests.fuzz import KINDS, SECONDS, Kind, Tally, limited
from tests.fuzz_inputs import Sizes, inputs
from tests.grammar import CHOICES, Program


@st.composite
def cases(draw: st.DrawFn, kind: Kind) -> Any:
    return kind.draw(lambda options: draw(st.sampled_from(options)))


@pytest.mark.parametrize(
    "name", [pytest.param(k, marks=[pytest.mark.extra] if k == "rewired" else []) for k in KINDS]
)
def test_a_program_computes_the_same(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind, tally = KINDS[name], Tally()

    @seed(0)
    @settings(
        database=None,
        deadline=None,
        max_examples=kind.cases,
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(kind))
    def run(case: Any) -> None:
        with limited(SECONDS):
            kind.check(case, tally)

    run()
    with capsys.disabled():
        print(f"\n{name}: {tally}")
    assert tally.graphs == kind.cases * kind.graphs
    assert tally.rewritten >= kind.floor * tally.graphs


@torch.no_grad()
def test_inductor_computes_the_same() -> None:
    choices = {name: values[0] for name, values in CHOICES.items()}
    program = Program(Sizes(B=2, Sq=1, Skv=16, N=3, Lkv=16, R=4, P=8, V=12), **choices)
    for one in (program, replace(program, absorbed=True, hide="lengths", cache="pages")):
        x = inputs(one.sizes).to(one.dtype)
        torch._dynamo.reset()
        mla_compile.counters.clear()
        with config.patch(force_disable_caches=True):  # lest it come rewritten from Inductor's
            result = torch.compile(one, backend=mla, fullgraph=True)(x)
        assert mla_compile.counters == {"rewritten": 1}
        torch.testing.assert_close(result, one(x))
