"""Every AMD binary we ship, executed: what Triton compiles for the host code's own launches runs in
the emulator, against naive PyTorch in float64.

Each call occurs twice in production: where the cache is smaller than 2 GiB Triton addresses it as a
buffer, otherwise with 64-bit pointers. Each case stands for one choice of the host code that
changes the binary; lengths from 0 to 517 and every length around a tile's end occur.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor

from mla_compile.kernels import decode
from mla_compile.kernels.combine import combine_kernel
from mla_compile.kernels.config import tuned_arch, workspace_numel
from mla_compile.kernels.split import split_kernel
from mla_compile.validate import validate
from tests.cases import Case, Problem, assert_right, build, outputs
from tests.cdna.compiler import Compiler, Request
from tests.cdna.kernels import Emulated

ARCHS = ("gfx942", "gfx950")
UNITS = {"gfx942": 304, "gfx950": 256}
MODEL = Case("", lens=(33, 0, 130), Lkv=512, R=64, N=16, page_size=1)

CASES = [
    replace(c, name=name)
    for name, c in {
        "ragged": replace(MODEL, lens=(517, 0, 1, 31, 32, 33), num_kv_splits=3),
        "ragged, 128 heads": replace(MODEL, lens=(517, 15, 16, 17), N=128),
        **{
            f"{n} heads, pages of {page}": replace(MODEL, N=n, page_size=page, num_kv_splits=splits)
            for n, page, splits in (
                (8, 16, 1),
                (12, 64, 2),
                (16, 64, 1),
                (32, 1, 1),
                (64, 16, 2),
                (128, 64, 1),
            )
        },
        **{
            f"{n} heads, a page a sequence": replace(
                MODEL, N=n, lens=lens, paging=paging, num_kv_splits=splits
            )
            for n, lens, paging, splits in (
                (16, (65, 65), "whole", 1),
                (64, (65, 3, 0), "dense", 1),
                (128, (97,), "whole", 2),
            )
        },
        "block table": replace(MODEL, N=128, paging="table", page_size=16),
        "int64 indices": replace(MODEL, index_dtype=torch.int64, lens=(40,)),
        "two buffers": replace(MODEL, fused=False, lens=(40,)),
        "bool mask of keys": replace(MODEL, mask="holes", lens=(33, 130)),
        "bool mask of keys, 128 heads": replace(
            MODEL, mask="length", N=128, lens=(33, 70), num_kv_splits=2
        ),
        "bool mask of rows": replace(MODEL, mask="per head", lens=(33, 130)),
        "additive mask of rows": replace(MODEL, mask="additive", N=128, lens=(70,)),
        "additive mask of keys, whole": replace(
            MODEL, mask="additive per key", N=64, paging="whole", lens=(70, 70)
        ),
        "soft cap": replace(MODEL, logit_cap=5.0, num_kv_splits=2),
        "soft cap, 128 heads": replace(MODEL, logit_cap=5.0, N=128, lens=(70,)),
        "two query tokens": replace(MODEL, queries=2, N=8, num_kv_splits=2),
        "ragged query tokens": replace(MODEL, queries=(3, 1, 2), lens=(33, 1, 70), N=32),
        "four query tokens, 128 heads": replace(MODEL, queries=4, N=128, lens=(70,)),
        "fp16": replace(MODEL, dtype=torch.float16, N=64, lens=(70, 5)),
        "fp32": replace(MODEL, dtype=torch.float32, lens=(40,)),
        "e4m3fn cache": replace(
            MODEL, cache_dtype=torch.float8_e4m3fn, scaled=True, N=64, lens=(70, 5)
        ),
        "e4m3fnuz cache": replace(
            MODEL, cache_dtype=torch.float8_e4m3fnuz, scaled=True, lens=(70, 5)
        ),
        "latent of 1024": replace(MODEL, Lkv=1024, lens=(40,)),
    }.items()
]


@dataclass(frozen=True)
class Shipped:
    arch: str
    large: bool
    case: Case

    def __str__(self) -> str:
        return f"{self.arch}-{'large' if self.large else 'buffer'}-{self.case}"


MATRIX = [Shipped(arch, large, case) for case in CASES for arch in ARCHS for large in (False, True)]


@contextmanager
def on(shipped: Shipped, compiler: Compiler, runs: Counter[Request], plan: bool) -> Iterator[None]:
    """The host code believes in an AMD GPU."""
    kernels = [
        Emulated(kernel, shipped.arch, compiler, shipped.large, [] if plan else None, runs)
        for kernel in (split_kernel, combine_kernel)
    ]
    device = tuned_arch(shipped.arch, triton.__version__), UNITS[shipped.arch]
    with (
        mock.patch.object(decode, "split_kernel", kernels[0]),
        mock.patch.object(decode, "combine_kernel", kernels[1]),
        mock.patch.object(decode, "_device", lambda _: device),
    ):
        yield


@lru_cache
def problem_of(case: Case) -> Problem:
    torch.manual_seed(0)
    return build(case)


def launch(problem: Problem) -> tuple[Tensor, Tensor]:
    out, lse = outputs(problem)
    call = validate(*problem.args, **problem.options)
    splits = problem.case.num_kv_splits
    workspace = torch.full((workspace_numel(call.dims, splits or 300),), math.nan)
    decode.launch(call, out, lse, splits, workspace)
    return out, lse


@pytest.fixture(scope="module")
def compiling(compiler: Compiler, request: pytest.FixtureRequest) -> None:
    """Start compiling everything the selected tests will ask for, in their order."""
    selected = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    for shipped in (p["shipped"] for p in selected if "shipped" in p):
        with on(shipped, compiler, Counter(), plan=True):
            launch(problem_of(shipped.case))


@pytest.mark.parametrize("shipped", MATRIX, ids=str)
def test_a_shipped_binary_is_right(
    shipped: Shipped, compiler: Compiler, runs: Counter[Request], compiling: None
) -> None:
    problem = problem_of(shipped.case)
    with on(shipped, compiler, runs, plan=False):
        out, lse = launch(problem)
    assert_right(problem, out, lse)
