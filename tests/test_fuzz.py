"""Random programs: what the pass makes of MLA computes the same; what is not MLA stays what it is.

    python -m tests.test_fuzz 10000    # that many graphs, and every failure among them
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from signal import ITIMER_REAL, SIGALRM, setitimer, signal
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from tests.compiling import Compiled
from tests.fuzz_inputs import PAGE, Inputs, Sizes, inputs
from tests.grammar import CHOICES, Program
from tests.mutations import MUTATIONS
from tests.test_recognise import error

GRAPHS = 200  # in CI: half of them MLA, half of them mutants
FLOOR = 0.3  # so many of the MLA graphs are rewritten at least
SECONDS = 60  # for the pass on one graph; the slowest takes 2


def sizes() -> st.SearchStrategy[Sizes]:
    """Small, and often equal to each other: no dimension may be known by its size."""
    few, wide = st.sampled_from([1, 2, 3]), st.sampled_from([4, 8, 12])
    lengths, ranks = st.sampled_from([2 * PAGE, 4 * PAGE, 12 * PAGE]), st.sampled_from([8, 16])
    return st.builds(Sizes, B=few, Sq=few, Skv=lengths, N=few, Lkv=ranks, R=wide, P=wide, V=wide)


@st.composite
def programs(draw: st.DrawFn) -> Program:
    choices = {k: draw(st.sampled_from(v)) for k, v in CHOICES.items()}
    program = Program(draw(sizes()), **choices)
    looped = program.loop == "sequences"  # over a static number of them
    return replace(program, dynamic=program.dynamic and not looped)


@st.composite
def mutants(draw: st.DrawFn) -> Program:
    program = draw(programs())
    fitting = [m for m in MUTATIONS if m.place in program.places]
    return replace(program, mutation=draw(st.sampled_from(fitting)))


class Flat(nn.Module):
    """A program of tensors, as AOTAutograd takes it."""

    def __init__(self, program: Program):
        super().__init__()
        self.program = program

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return list(self.program(Inputs(*tensors)))


@torch.no_grad()
def rewritten(program: Program, x: Inputs) -> tuple[Compiled, Callable[[Inputs], list[Tensor]]]:
    """The program after AOTAutograd and the pass: what Inductor gets, without Dynamo before it."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    dynamic = Inputs.dynamic if program.dynamic else {}
    fakes = [fake(mode, t, dynamic.get(name, ())) for name, t in x.tensors().items()]
    compiled = Compiled(program)
    with tracing(TracingContext(mode)), limited(SECONDS):
        run = compiled.backend(Flat(program), fakes)
    return compiled, lambda x: run(*x.tensors().values())


def fake(mode: FakeTensorMode, t: Tensor, dynamic: Sequence[int]) -> Tensor:
    dims = [DimDynamic.DYNAMIC if d in dynamic else DimDynamic.STATIC for d in range(t.dim())]
    return mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(dims))


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """A hang becomes a failure."""

    def late(*_: Any) -> NoReturn:
        raise TimeoutError(f"not done after {seconds} s")

    previous = signal(SIGALRM, late)
    setitimer(ITIMER_REAL, seconds)
    try:
        yield
    finally:
        setitimer(ITIMER_REAL, 0)
        signal(SIGALRM, previous)


def finite(result: Tensor, plain: Tensor, exact: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros where a row sees no token and plain PyTorch has NaN: there the op's 0 is documented."""
    known = plain.isfinite() & exact.isfinite()
    return tuple(torch.where(known, t.double(), 0) for t in (result, plain, exact))


def same(result: Tensor, plain: Tensor, exact: Tensor) -> bool:
    """Within twice the error of plain PyTorch, or of the rounding of the result alone."""
    rounding = torch.finfo(plain.dtype).eps / 2
    alike = (result.shape, result.dtype) == (plain.shape, plain.dtype)
    result, plain, exact = finite(result, plain, exact)
    return alike and error(result, exact) <= 2 * max(error(plain, exact), rounding)


@dataclass
class Tally:
    """What became of the graphs."""

    rewritten: int = 0
    graphs: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.refused.most_common())
        return f"{self.rewritten} of {self.graphs} graphs rewritten; refused: {reasons or 'none'}"


@torch.no_grad()
def check(program: Program, tally: Tally) -> None:
    """The rewritten program computes what the program does, at the traced sizes and, if dynamic, at others."""
    x = inputs(program.sizes).to(program.dtype)
    compiled, run = rewritten(program, x)
    tally.graphs += 1
    tally.rewritten += bool(compiled.sites) and not compiled.misses
    tally.refused.update(m.reason.name for m in compiled.misses)
    tally.refused["not seen"] += not compiled.verdicts
    if not compiled.sites:
        return
    longer = program.sizes.longer if program.dynamic else program.sizes
    for n, random_state in ((program.sizes, 0), (longer, 1)):
        x = inputs(n, random_state).to(program.dtype)
        results, plains, exacts = run(x), program(x), program(x.to(torch.float64))
        for result, plain, exact in zip(results, plains, exacts, strict=True):
            assert same(result, plain, exact), f"{compiled.sites[0]}"
