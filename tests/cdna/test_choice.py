"""Which kernel the host code launches on AMD, and in how many binaries."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cases import Case
from tests.cdna.asm import parse
from tests.cdna.compiler import Compiler
from tests.cdna.shipped import ARCHS, BOTH, MODEL, PORTABLE, TABLE, Shipped, plan

GLUON = {"gfx942": "cdna3_kernel", "gfx950": "cdna4_kernel"}


def launched(arch: str, case: Case, pinned: str = "") -> str:
    idle: Any = SimpleNamespace(submit=lambda request: None)  # only what would be compiled matters
    return plan(Shipped(arch, False, pinned, case), idle)[0].kernel[1]


@pytest.mark.parametrize("case", BOTH + TABLE, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_the_table_picks_the_gluon_kernel(arch: str, case: Case) -> None:
    assert launched(arch, case) == GLUON[arch]


@pytest.mark.parametrize("case", [*PORTABLE, replace(MODEL, R=0), replace(MODEL, Lkv=256)], ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_what_it_lacks_goes_to_the_portable_kernel(arch: str, case: Case) -> None:
    assert launched(arch, case) == "split_kernel"


@pytest.mark.parametrize("arch", ARCHS)
def test_a_pinned_kernel_is_launched(arch: str) -> None:
    assert launched(arch, MODEL, "portable") == "split_kernel"
    assert launched(arch, MODEL, GLUON[arch].removesuffix("_kernel")) == GLUON[arch]


@pytest.mark.parametrize("N", [16, 128])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_gluon_kernel_is_the_same_for_a_cache_beyond_2_gib(
    arch: str, N: int, compiler: Compiler
) -> None:
    code = []
    for large in (False, True):
        request = plan(Shipped(arch, large, "", replace(MODEL, N=N)), compiler)[0]
        kernel = parse(compiler.submit(request).result().asm)
        code.append([i.text for i in kernel.instructions])
    assert code[0] == code[1]
