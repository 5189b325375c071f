"""The Gluon kernels for CDNA3 and CDNA4, executed: the host code's own launches, compiled for the
GPU and run in the emulator, against naive PyTorch in float64."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
import triton

from mla_compile.kernels import decode
from mla_compile.kernels.combine import combine_kernel
from mla_compile.kernels.config import GLUON, tuned_arch, workspace_numel
from mla_compile.validate import validate
from tests.cases import Case, Problem, assert_right, build, outputs
from tests.cdna.compiler import Compiler, Request
from tests.cdna.kernels import Emulated

UNITS = {"gfx942": 304, "gfx950": 256}
MODEL = Case("", lens=(33, 0, 130), Lkv=512, R=64, N=16, page_size=1)
CASES = [
    replace(case, name=name)
    for name, case in {
        "ragged": replace(MODEL, lens=(517, 0, 1, 15, 16, 17, 31, 32, 33), num_kv_splits=3),
        "ragged, 64 heads": replace(MODEL, N=64, lens=(517, 0, 1, 63, 64, 65), num_kv_splits=3),
        "128 heads": replace(MODEL, N=128),
        "8 heads, pages of 16": replace(MODEL, N=8, page_size=16),
        "12 heads, pages of 37": replace(MODEL, N=12, page_size=37, num_kv_splits=2),
        "80 heads, pages of 64": replace(MODEL, N=80, page_size=64),
        "block table, int64": replace(
            MODEL, paging="table", page_size=64, index_dtype=torch.int64, N=24
        ),
        "int64 indices": replace(MODEL, index_dtype=torch.int64, queries=(1, 2, 1), N=80),
        "dense": replace(MODEL, paging="dense", N=32),
        "a page a sequence": replace(MODEL, paging="whole", lens=(65, 65), num_kv_splits=2),
        "two buffers, fp16": replace(
            MODEL, fused=False, dtype=torch.float16, N=32, num_kv_splits=2
        ),
        "four query tokens": replace(MODEL, queries=4, N=16, lens=(33, 2, 70), num_kv_splits=2),
        "ragged query tokens": replace(MODEL, queries=(3, 4, 0, 1), lens=(33, 3, 0, 70), N=24),
        "two query tokens see all": replace(MODEL, queries=2, causal=False, N=8),
    }.items()
]


class Stage(Emulated):
    __hash__ = object.__hash__

    @property
    def arg_names(self) -> list[str]:
        names: list[str] = self.function.arg_names
        return names


@lru_cache
def problem_of(case: Case) -> Problem:
    torch.manual_seed(0)
    return build(case)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("arch", UNITS)
def test_gluon_kernel_is_right(
    arch: str,
    case: Case,
    compiler: Compiler,
    runs: Counter[Request],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key = tuned_arch(arch, triton.__version__)
    launched = []

    def stage1(name: str) -> Any:
        launched.append(name)
        return Stage(real(name), arch, compiler, runs=runs)

    real = decode._stage1
    monkeypatch.setattr(decode, "_stage1", stage1)
    monkeypatch.setattr(decode, "_device", lambda _: (key, UNITS[arch]))
    monkeypatch.setattr(decode, "combine_kernel", Stage(combine_kernel, arch, compiler, runs=runs))

    problem = problem_of(case)
    out, lse = outputs(problem)
    call = validate(*problem.args, **problem.options)
    splits = case.num_kv_splits
    workspace = torch.full((workspace_numel(call.dims, splits or 300),), math.nan)
    decode.launch(call, out, lse, splits, workspace)
    assert_right(problem, out, lse)
    assert launched == [GLUON[key][0].kernel]
