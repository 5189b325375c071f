"""What is fuzzed: cases drawn from the grammar, and the check of one.

What the pass makes of MLA computes the same, and what is not MLA stays what it is.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from random import Random
from signal import ITIMER_REAL, SIGALRM, setitimer, signal
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from tests.compiling import Compiled, error
from tests.fuzz_inputs import PAGE, Inputs, Sizes, inputs
from tests.grammar import CHOICES, Program
from tests.mutations import MUTATIONS
from tests.rewire import rewire

EDGES = 10  # rewired edges of one program, a graph each
# Inputs of one program, two sizes if it is dynamic; many where the error of a few may be bad luck.
FEW, MANY = 8, 128
SECONDS = 60  # for one case

T = TypeVar("T")


class Choose(Protocol):
    """One of the options: hypothesis does it, or a random.Random."""

    def __call__(self, options: Sequence[T], /) -> T: ...


class Rewirings(NamedTuple):
    """A program, and edges to rewire one at a time."""

    program: Program
    edges: list[tuple[int, int]]


def sizes(choose: Choose) -> Sizes:
    """Small, and often equal to each other: no dimension may be known by its size."""
    few, wide, lengths = [1, 2, 3], [4, 8, 12], [2 * PAGE, 4 * PAGE, 12 * PAGE]
    return Sizes(
        B=choose(few),
        Sq=choose(few),
        Skv=choose(lengths),
        N=choose(few),
        Lkv=choose([8, 16]),
        R=choose(wide),
        P=choose(wide),
        V=choose(wide),
    )


def program(choose: Choose) -> Program:
    drawn = Program(sizes(choose), **{k: choose(v) for k, v in CHOICES.items()})
    looped = drawn.loop == "sequences"  # over a static number of them
    return replace(drawn, dynamic=drawn.dynamic and not looped)


def mutant(choose: Choose) -> Program:
    drawn = program(choose)
    return replace(drawn, mutation=choose([m for m in MUTATIONS if m.place in drawn.places]))


def rewirings(choose: Choose) -> Rewirings:
    """In float64, where nothing but the meaning differs."""
    random = Random(choose(range(2**32)))
    edges = [(random.randrange(2**32), random.randrange(2**32)) for _ in range(EDGES)]
    drawn = program(choose).honest
    return Rewirings(replace(drawn, dtype=torch.float64, dynamic=False), edges)


class Flat(nn.Module):
    """A program of tensors, as AOTAutograd takes it: symbolic sizes are inputs as well."""

    def __init__(self, program: Program):
        super().__init__()
        self.program = program

    def forward(self, *values: Tensor | int) -> list[Tensor]:
        return list(self.program(Inputs(*(x for x in values if isinstance(x, Tensor)))))


@dataclass
class Traced(Compiled):
    """A program after AOTAutograd, as Inductor gets it, without Dynamo before it; and the pass."""

    modules: list[GraphModule] = field(default_factory=list)  # before the pass

    def run_pass(self, gm: GraphModule) -> None:
        self.modules.append(copy.deepcopy(gm))
        super().run_pass(gm)
        view_to_reshape(gm)  # as Inductor does after the pass: the op's output has its own strides
        gm.recompile()

    @torch.no_grad()
    def trace(self, program: Program) -> Callable[..., list[Tensor]]:
        mode = FakeTensorMode(shape_env=ShapeEnv())
        dynamic = Inputs.dynamic if program.dynamic else {}
        tensors = inputs(program.sizes).to(program.dtype).tensors()
        fakes = [fake(mode, t, dynamic.get(name, ())) for name, t in tensors.items()]
        shapes = [(t.shape, i, d) for i, t in enumerate(fakes) for d in range(t.dim())]
        sizes = {str(n[d]): (i, d) for n, i, d in shapes if isinstance(n[d], torch.SymInt)}
        symbols: list[Any] = [fakes[i].shape[d] for i, d in sizes.values()]
        with tracing(TracingContext(mode)):
            run = self.backend(Flat(program), [*symbols, *fakes])  # type: ignore[arg-type]
        return lambda *x: run(*(x[i].shape[d] for i, d in sizes.values()), *x)


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


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Wrong(AssertionError):
    """The graph computes something else after the pass."""


@dataclass
class Tally:
    """What became of the graphs, each counted once."""

    rewritten: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by the reason for the first refusal
    failed: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0  # of one core

    @property
    def graphs(self) -> int:
        return self.rewritten + self.refused.total() + self.failed.total()

    def add(self, compiled: Compiled) -> None:
        if compiled.sites and not compiled.misses:
            self.rewritten += 1
        else:
            self.refused[compiled.misses[0].reason.name if compiled.misses else "not seen"] += 1

    def __iadd__(self, more: Tally) -> Tally:
        self.rewritten += more.rewritten
        self.refused += more.refused
        self.failed += more.failed
        self.seconds += more.seconds
        return self

    def __str__(self) -> str:
        reasons = ", ".join(f"{n} {reason}" for reason, n in self.refused.most_common())
        failures = ", ".join(f"{self.failed[how]} {how}" for how in ("wrong", "crashed", "hung"))
        return (
            f"{self.graphs} graphs, {self.rewritten} rewritten, {self.refused.total()} refused"
            f" ({reasons}), {failures}, {self.seconds:.0f} s of one core"
        )


def known(result: Tensor, plain: Tensor, exact: Tensor) -> list[Tensor]:
    """Zeros where plain PyTorch has NaN: a row that sees no token, and the op's 0 is documented."""
    real = plain.isfinite() & exact.isfinite()
    return [torch.where(real, t.double(), 0).flatten() for t in (result, plain, exact)]


@torch.no_grad()
def check_program(program: Program, tally: Tally) -> None:
    """No output errs more than twice as much as plain PyTorch, or as one unit in the last place."""
    compiled = Traced(program)
    run = compiled.trace(program)
    if compiled.sites:
        with poisoned():
            if excess(program, run, FEW) and (wrong := excess(program, run, MANY)):
                raise Wrong(f"{wrong}\n    {compiled.sites}")
    tally.add(compiled)


def excess(program: Program, run: Callable[..., list[Tensor]], samples: int) -> str:
    """An error that is not allowed, in words."""
    outputs: list[list[list[Tensor]]] = []
    for i in range(samples):
        n = program.sizes.longer if program.dynamic and i % 2 else program.sizes
        x = inputs(n, seed=i).to(program.dtype)
        results, plains = run(*x.tensors().values()), program(x)
        exacts = program.honest(x.to(torch.float64))
        for result, plain in zip(results, plains, strict=True):
            if (result.shape, result.dtype) != (plain.shape, plain.dtype):
                return f"{result.dtype} {result.shape}, not {plain.dtype} {plain.shape}"
        outputs.append([known(*o) for o in zip(results, plains, exacts, strict=True)])
    unit = torch.finfo(program.dtype).eps  # a few numbers can be exact by luck
    for output in zip(*outputs, strict=True):
        result, plain, exact = (torch.cat(ts) for ts in zip(*output, strict=True))
        allowed = 2 * max(error(plain, exact), unit)
        if not near(result, exact, allowed):
            return f"error {error(result, exact):.1e}, not {allowed:.1e}"
    return ""


def near(result: Tensor, exact: Tensor, allowed: float) -> bool:
    return error(result, exact) <= allowed if exact.any() else not result.any()


@torch.no_grad()
def check_rewirings(case: Rewirings, tally: Tally) -> None:
    """With any edge changed, the graph computes the same before the pass and after it."""
    traced = Traced(case.program)
    traced.trace(case.program)
    x = list(inputs(case.program.sizes).to(case.program.dtype).tensors().values())
    for which, how in case.edges:
        module = copy.deepcopy(traced.modules[0])
        change = rewire(module, which, how)
        with poisoned():
            expected = module(*x)
        compiled = Traced(case.program)
        compiled.run_pass(module)
        with poisoned():
            results = module(*x)
        for result, exact in zip(results, expected, strict=True):
            got, _, ideal = known(result, exact, exact)
            # Masks and lse are float32 in the op; a wrong tensor differs in the first digits.
            if not near(got, ideal, torch.finfo(torch.float32).eps):
                raise Wrong(f"{change}\n    {compiled.sites}")
        tally.add(compiled)


class Kind(NamedTuple):
    """What is fuzzed, and how often."""

    draw: Callable[[Choose], Any]
    check: Callable[[Any, Tally], None]
    graphs: int  # of one case
    share: int  # of the graphs, in twentieths
    cases: int  # in CI
    floor: float  # of the graphs must be rewritten, lest refusing everything be right


KINDS = {
    "MLA": Kind(program, check_program, 1, 6, 50, 0.9),
    "mutants": Kind(mutant, check_program, 1, 7, 50, 0.2),
    "rewired": Kind(rewirings, check_rewirings, EDGES, 7, 10, 0.4),
}
