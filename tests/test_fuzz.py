"""Random programs: what the pass makes of MLA computes the same; what is not MLA stays what it is.

python -m tests.test_fuzz 10000    # that many graphs, and every failure among them
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from random import Random
from signal import ITIMER_REAL, SIGALRM, setitimer, signal
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import mla_compile
from mla_compile.backend import mla
from tests.compiling import Compiled
from tests.fuzz_inputs import PAGE, Inputs, Sizes, inputs
from tests.grammar import CHOICES, Program
from tests.mutations import MUTATIONS
from tests.rewire import rewire
from tests.test_recognise import error

EDGES = 10  # rewired edges of one program, a graph each
SAMPLES = 8  # inputs of one program: two sizes if it is dynamic, and errors that are not luck
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


@st.composite
def rewirings(draw: st.DrawFn) -> tuple[Program, list[tuple[int, int]]]:
    """A program in float64, where nothing but the meaning differs, and edges to rewire."""
    random = Random(draw(st.integers(0, 2**32)))
    edges = [(random.randrange(2**32), random.randrange(2**32)) for _ in range(EDGES)]
    return replace(draw(programs()), dtype=torch.float64, dynamic=False), edges


class Flat(nn.Module):
    """A program of tensors, as AOTAutograd takes it."""

    def __init__(self, program: Program):
        super().__init__()
        self.program = program

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        return list(self.program(Inputs(*tensors)))


@dataclass
class Traced(Compiled):
    """A program after AOTAutograd, as Inductor gets it, without Dynamo before it; and the pass."""

    modules: list[GraphModule] = field(default_factory=list)  # before the pass

    def run_pass(self, gm: GraphModule) -> None:
        self.modules.append(copy.deepcopy(gm))
        with limited(SECONDS):
            super().run_pass(gm)
        view_to_reshape(
            gm
        )  # Inductor does so after the pass: the op's output has strides of its own
        gm.recompile()

    @torch.no_grad()
    def trace(self, program: Program) -> Callable[..., list[Tensor]]:
        mode = FakeTensorMode(shape_env=ShapeEnv())
        dynamic = Inputs.dynamic if program.dynamic else {}
        tensors = inputs(program.sizes).to(program.dtype).tensors()
        fakes = [fake(mode, t, dynamic.get(name, ())) for name, t in tensors.items()]
        with tracing(TracingContext(mode)):
            return self.backend(Flat(program), fakes)  # type: ignore[arg-type]


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


@dataclass
class Tally:
    """What became of the graphs."""

    rewritten: int = 0
    graphs: int = 0
    refused: Counter[str] = field(default_factory=Counter)

    def add(self, compiled: Compiled) -> None:
        self.graphs += 1
        self.rewritten += bool(compiled.sites) and not compiled.misses
        self.refused.update(m.reason.name for m in compiled.misses)
        self.refused["not seen"] += not compiled.verdicts

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.refused.most_common() if n)
        return f"{self.rewritten} of {self.graphs} graphs rewritten; attentions left: {reasons}"


def known(result: Tensor, plain: Tensor, exact: Tensor) -> list[Tensor]:
    """Zeros where plain PyTorch has NaN: a row that sees no token, and the op's 0 is documented."""
    real = plain.isfinite() & exact.isfinite()
    return [torch.where(real, t.double(), 0).flatten() for t in (result, plain, exact)]


@torch.no_grad()
def check_program(program: Program, tally: Tally) -> None:
    """No output errs more than twice as much as plain PyTorch, or as one unit in the last place."""
    compiled = Traced(program)
    run = compiled.trace(program)
    tally.add(compiled)
    if not compiled.sites:
        return
    samples: list[list[list[Tensor]]] = []
    for i in range(SAMPLES):
        n = program.sizes.longer if program.dynamic and i % 2 else program.sizes
        x = inputs(n, seed=i).to(program.dtype)
        results, plains, exacts = (
            run(*x.tensors().values()),
            program(x),
            program(x.to(torch.float64)),
        )
        for result, plain in zip(results, plains, strict=True):
            assert (result.shape, result.dtype) == (plain.shape, plain.dtype)
        samples.append([known(*o) for o in zip(results, plains, exacts, strict=True)])
    unit = torch.finfo(program.dtype).eps  # a few numbers can be exact by luck
    for output in zip(*samples, strict=True):
        result, plain, exact = (torch.cat(ts) for ts in zip(*output, strict=True))
        if exact.any():
            allowed = 2 * max(error(plain, exact), unit)
            assert error(result, exact) <= allowed, compiled.sites
        else:
            assert not result.any(), compiled.sites


@torch.no_grad()
def check_rewiring(case: tuple[Program, list[tuple[int, int]]], tally: Tally) -> None:
    """With any edge changed, the graph computes the same before the pass and after it."""
    program, edges = case
    traced = Traced(program)
    traced.trace(program)
    x = list(inputs(program.sizes).to(program.dtype).tensors().values())
    for which, how in edges:
        module = copy.deepcopy(traced.modules[0])
        change = rewire(module, which, how)
        expected = module(*x)
        compiled = Traced(program)
        compiled.run_pass(module)
        tally.add(compiled)
        for result, exact in zip(module(*x), expected, strict=True):
            got, _, ideal = known(result, exact, exact)
            # Masks and lse are float32 in the op; a wrong tensor differs in the first digits.
            near = error(got, ideal) <= torch.finfo(torch.float32).eps
            assert near or not ideal.any(), (change, compiled.sites)


CI = settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))


def fuzz(
    strategy: st.SearchStrategy[Any], check: Callable[..., None], choices: settings, start: int = 0
) -> Tally:
    tally = Tally()

    @seed(start)
    @choices
    @given(strategy)
    def run(case: Any) -> None:
        check(case, tally)

    run()
    return tally


# What is fuzzed: cases, the check of one, graphs of a case, cases in CI, and how many of the graphs
# must be rewritten at least, lest refusing everything be right.
KINDS: dict[str, tuple[st.SearchStrategy[Any], Callable[..., None], int, int, float]] = {
    "MLA": (programs(), check_program, 1, 50, 0.9),
    "mutants": (mutants(), check_program, 1, 50, 0.2),
    "rewired": (rewirings(), check_rewiring, EDGES, 10, 0.4),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.extra] if k == "rewired" else []) for k in KINDS]
)
def test_a_program_computes_the_same(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    strategy, check, graphs, cases, floor = KINDS[kind]
    tally = fuzz(strategy, check, settings(CI, max_examples=cases))
    with capsys.disabled():
        print(f"\n{kind}: {tally}")
    assert tally.graphs == cases * graphs
    assert tally.rewritten >= floor * tally.graphs


@torch.no_grad()
def test_inductor_computes_the_same() -> None:
    choices = {name: values[0] for name, values in CHOICES.items()}
    program = Program(Sizes(B=2, Sq=1, Skv=16, N=3, Lkv=16, R=4, P=8, V=12), **choices)
    for one in (program, replace(program, absorbed=True, hide="lengths", cache="pages")):
        x = inputs(one.sizes).to(one.dtype)
        torch._dynamo.reset()
        mla_compile.counters.clear()
        result = torch.compile(one, backend=mla, fullgraph=True)(x)
        assert mla_compile.counters == {"rewritten": 1}
        torch.testing.assert_close(result, one(x))


def main() -> int:
    """Every failure is printed, not only the first; nothing is shrunk."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("graphs", type=int, nargs="?", default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    arguments = parser.parse_args()
    failures = 0
    share = arguments.graphs // len(arguments.kinds)
    for kind in arguments.kinds:
        strategy, check, graphs, _, _ = KINDS[kind]

        def collected(
            case: Any, tally: Tally, check: Callable[..., None] = check, kind: str = kind
        ) -> None:
            nonlocal failures
            try:
                check(case, tally)
            except Exception as exception:
                failures += 1
                print(f"{type(exception).__name__}: {exception}\n    {case}", flush=True)
            if tally.graphs % 100 == 0:
                print(f"{kind}: {tally}", flush=True)

        choices = settings(CI, max_examples=share // graphs, phases=[Phase.generate])
        tally = fuzz(strategy, collected, choices, arguments.seed)
        print(f"{kind}: {tally}", flush=True)
    print(f"{failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    raise SystemExit(main())
