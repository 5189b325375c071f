"""Random programs: what the pass makes of MLA computes the same; what is not MLA stays what it is.

    python -m tests.test_fuzz 10000    # many programs, and every failure among them
"""

from __future__ import annotations

import argparse
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_joint_simple
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from mla_compile.passes.inductor import MLAPass, Verdict
from mla_compile.passes.site import MLASite
from tests.compiling import Compiled
from tests.fuzz_inputs import PAGE, Inputs, Sizes, inputs
from tests.grammar import CHOICES, Program
from tests.mutations import MUTATIONS

SECONDS = 60  # for one program; the slowest takes 2


def sizes() -> st.SearchStrategy[Sizes]:
    """Small, and often equal to each other: no name of a dimension may come from its size."""
    few = st.sampled_from([1, 2, 3])
    wide = st.sampled_from([4, 8, 12])
    lengths = st.sampled_from([2 * PAGE, 4 * PAGE, 12 * PAGE])
    return st.builds(
        Sizes, B=few, Sq=few, Skv=lengths, N=few, Lkv=st.sampled_from([8, 16]), R=wide, P=wide, V=wide
    )


def programs() -> st.SearchStrategy[Program]:
    return st.builds(
        Program, sizes=sizes(), **{k: st.sampled_from(v) for k, v in CHOICES.items()}
    ).map(possible)


def possible(program: Program) -> Program:
    """Looping over sequences, their number is static."""
    return replace(program, dynamic=program.dynamic and program.loop != "sequences")


@st.composite
def mutants(draw: st.DrawFn) -> Program:
    program = draw(programs())
    fitting = [m for m in MUTATIONS if m.place in program.places]
    return replace(program, mutation=draw(st.sampled_from(fitting)))


@dataclass
class Traced:
    """A program as the ATen graph that Inductor would give the pass."""

    module: GraphModule
    env: ShapeEnv
    names: list[str]

    def __call__(self, x: Inputs) -> list[Tensor]:
        given = x.tensors()
        result: list[Tensor] = self.module(*(given[n] for n in self.names))
        return result


@torch.no_grad()
def trace(program: Program, x: Inputs) -> Traced:
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    tensors = x.tensors()
    fakes = [fake(mode, t, Inputs.dynamic.get(n, ()) if program.dynamic else ()) for n, t in tensors.items()]

    def flat(*args: Tensor) -> list[Tensor]:
        return list(program(Inputs(*args)))

    module = aot_export_joint_simple(
        flat, tuple(fakes), trace_joint=False, decompositions=select_decomp_table()
    )
    return Traced(module, env, list(tensors))


def fake(mode: FakeTensorMode, t: Tensor, dynamic: tuple[int, ...]) -> Tensor:
    dims = [DimDynamic.DYNAMIC if d in dynamic else DimDynamic.STATIC for d in range(t.dim())]
    return mode.from_tensor(t, symbolic_context=StatelessSymbolicContext(dims))
