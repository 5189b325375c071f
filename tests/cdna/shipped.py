"""Every AMD binary we ship: what Triton compiles for the host code's own launches.

Each call occurs twice in production: where the cache is smaller than 2 GiB Triton addresses it as a
buffer, otherwise with 64-bit pointers. Each case stands for one choice of the host code that
changes the binary; lengths from 0 to 517 and every length around a tile's end occur. Calls that
leave the kernel to the arch table run its choice; what it chooses for rarer calls, the portable
kernel, is also pinned for some of them.
"""

from __future__ import annotations

import math
import os
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
from mla_compile.kernels.combine import combine_cut_kernel, combine_kernel
from mla_compile.kernels.config import tuned_arch, workspace_numel
from mla_compile.validate import validate
from tests.cases import Case, Problem, build, outputs
from tests.cdna.compiler import Compiler, Ran, Request
from tests.cdna.kernels import Emulated

ARCHS = ("gfx942", "gfx950")
UNITS = {"gfx942": 304, "gfx950": 256}
MODEL = Case("", lens=(33, 0, 130), Lkv=512, R=64, N=16, page_size=1)
FP8, FP8_AMD = torch.float8_e4m3fn, torch.float8_e4m3fnuz


def model(name: str, **changes: object) -> Case:
    return replace(MODEL, name=name, **changes)  # type: ignore[arg-type]


BOTH = [  # of each kernel
    model("ragged", lens=(517, 0, 1, 15, 16, 17, 31, 32, 33), num_kv_splits=3),
    model("ragged, 64 heads", N=64, lens=(517, 0, 1, 63, 64, 65), num_kv_splits=3),
    model("128 heads, pages of 64", N=128, page_size=64, num_kv_splits=1),
    model("12 heads, pages of 64", N=12, page_size=64, num_kv_splits=2),
    model("16 heads, a page a sequence", paging="whole", lens=(65, 65), num_kv_splits=1),
    model("64 heads, dense", N=64, paging="dense", lens=(65, 3, 0), num_kv_splits=1),
]
TABLE = [  # of the kernel the table picks
    model("8 heads, pages of 16", N=8, page_size=16, num_kv_splits=1),
    model("16 heads, pages of 64", page_size=64, num_kv_splits=2),
    model("32 heads", N=32, num_kv_splits=1),
    model("64 heads, pages of 16", N=64, page_size=16, num_kv_splits=2),
    model("80 heads, pages of 37", N=80, page_size=37, lens=(33, 70)),
    model("128 heads", N=128, lens=(97,)),
    model("128 heads, a page a sequence", N=128, paging="whole", lens=(97,), num_kv_splits=2),
    model("block table", N=128, paging="table", page_size=16),
    model("int64 block table", N=24, paging="table", page_size=64, index_dtype=torch.int64),
    model("int64 indices", index_dtype=torch.int64, queries=(1, 2, 1), N=80, lens=(33, 2, 70)),
    model("two buffers, fp16", fused=False, dtype=torch.float16, N=32, num_kv_splits=2),
    model("two query tokens see all", queries=2, causal=False, N=8),
    model("four query tokens", queries=4, lens=(33, 2, 70), num_kv_splits=2),
    model("ragged query tokens", queries=(3, 4, 0, 1), lens=(33, 3, 0, 70), N=24),
]
EVEN = [  # lengths shared out by a `schedule`, as on a GPU where these are many tiles a program
    model("evenly, 64 heads", N=64, lens=(517, 0, 1, 63, 64, 65)),
    model("evenly, 16 heads", lens=(517, 0, 1, 300, 15)),
    model("evenly, 128 heads, pages of 64", N=128, page_size=64, lens=(517, 0, 130)),
    model("evenly, ragged query tokens", queries=(3, 4, 0, 1), lens=(333, 3, 0, 170), N=24),
    model("evenly, block table", N=40, paging="table", page_size=16, lens=(200, 300), queries=2),
    model("evenly, dense, fp16", paging="dense", dtype=torch.float16, N=64, lens=(200, 517)),
    model("evenly, in pieces", N=40, lens=(517, 480)),
    model("evenly, none cut", N=64, lens=(130,) * 6),
]
FEW_UNITS = 4
PORTABLE = [  # calls with something that only the portable kernel has
    model("bool mask of keys", mask="holes", lens=(33, 130)),
    model("bool mask of keys, 128 heads", mask="length", N=128, lens=(33, 70), num_kv_splits=2),
    model("bool mask of rows", mask="per head", lens=(33, 130)),
    model("additive mask of rows", mask="additive", N=128, lens=(70,)),
    model("additive mask, whole", mask="additive per key", N=64, paging="whole", lens=(70, 70)),
    model("soft cap", logit_cap=5.0, num_kv_splits=2),
    model("soft cap, 128 heads", logit_cap=5.0, N=128, lens=(70,)),
    model(
        "soft cap, ragged query tokens", logit_cap=5.0, queries=(3, 1, 2), lens=(33, 1, 70), N=32
    ),
    model("fp32", dtype=torch.float32, lens=(40,)),
    model("e4m3fn cache", cache_dtype=FP8, scaled=True, N=64, lens=(70, 5)),
    model("e4m3fnuz cache", cache_dtype=FP8_AMD, scaled=True, lens=(70, 5)),
    model("latent of 1024", Lkv=1024, lens=(40,)),
]


@dataclass(frozen=True)
class Shipped:
    arch: str
    large: bool
    pinned: str  # MLA_COMPILE_KERNEL, "" if it is not set
    case: Case

    def __str__(self) -> str:
        pinned = f"{self.pinned}-" if self.pinned else ""
        return f"{self.arch}-{'large' if self.large else 'buffer'}-{pinned}{self.case}"


MATRIX = [
    Shipped(arch, large, pinned, case)
    for pinned, cases in (("", BOTH + TABLE + EVEN + PORTABLE), ("portable", BOTH))
    for case in cases
    for arch in ARCHS
    for large in (False, True)
    if not (large and case in TABLE + EVEN)  # the same code: see test_choice.py
]
# Of the two binaries of a case one is for each `pytest`, both are for CI.
CASES = [pytest.param(x, id=str(x), marks=[pytest.mark.extra] if x.large else []) for x in MATRIX]


@contextmanager
def on(
    shipped: Shipped,
    compiler: Compiler,
    runs: Counter[Ran],
    planned: list[Request] | None = None,
) -> Iterator[None]:
    """The host code believes in an AMD GPU."""
    stage1 = decode._stage1

    def emulated(kernel: object) -> Emulated:
        return Emulated(kernel, shipped.arch, compiler, shipped.large, planned, runs)

    units = FEW_UNITS if shipped.case.name.startswith("evenly") else UNITS[shipped.arch]
    device = tuned_arch(shipped.arch, triton.__version__), units
    with (
        mock.patch.object(decode, "_stage1", lambda name: emulated(stage1(name))),
        mock.patch.object(decode, "combine_kernel", emulated(combine_kernel)),
        mock.patch.object(decode, "combine_cut_kernel", emulated(combine_cut_kernel)),
        mock.patch.object(decode, "_device", lambda _: device),
        mock.patch.dict(os.environ, {"MLA_COMPILE_KERNEL": shipped.pinned}),
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


def plan(shipped: Shipped, compiler: Compiler) -> list[Request]:
    """Start compiling what a launch would run, and run nothing."""
    requests: list[Request] = []
    with on(shipped, compiler, Counter(), requests):
        launch(problem_of(shipped.case))
    return requests
