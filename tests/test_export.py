"""torch.export and AOTInductor keep the op, and a process with mla_compile can load it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch.export import Dim, export

import mla_compile
from tests.spellings import Inputs, inputs
from tests.spellings.expanded import expanded_sdpa_length_mask

pytestmark = pytest.mark.extra  # minutes of compilation
SAMPLE = inputs()
READ = ("q_nope", "q_pe", "kv_c", "k_pe", "w", "lens")
LOAD = """
import sys, torch
import {imports}
from torch._inductor import aoti_load_package

try:
    run = aoti_load_package(sys.argv[1])
    result = run(*torch.load(sys.argv[2]))
    torch.testing.assert_close(result, torch.load(sys.argv[3]))
except RuntimeError as error:
    raise SystemExit(f"refused: {{error}}")
"""


def read(x: Inputs) -> tuple[Tensor, ...]:
    return tuple(getattr(x, name) for name in READ)


class Decode(nn.Module):
    def forward(self, *tensors: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(READ, tensors, strict=True))
        return expanded_sdpa_length_mask(replace(SAMPLE, **given))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Decode, compiled ahead of time for any number of cached tokens."""
    tokens = Dim("tokens", min=2, max=4096)
    dynamic: tuple[dict[int, Any], ...] = ({}, {}, {1: tokens}, {1: tokens}, {}, {})
    path = tmp_path_factory.mktemp("aoti") / "decode.pt2"
    mla_compile.counters.clear()
    with torch.no_grad():
        program = export(Decode(), read(SAMPLE), dynamic_shapes=(dynamic,))
        options = mla_compile.options()
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
    assert mla_compile.counters == {"rewritten": 1}
    return path


@pytest.mark.parametrize("Skv", [48, 32])
def test_a_package_runs_at_every_exported_size(package: Path, Skv: int) -> None:
    x = inputs(Skv=Skv)
    run = aoti_load_package(str(package))
    with torch.profiler.profile() as profile:
        result = run(*read(x))
    torch.testing.assert_close(result, expanded_sdpa_length_mask(x))
    assert [e.count for e in profile.key_averages() if e.key == "mla_compile::mla_decode"] == [1]


class Call(nn.Module):
    def forward(self, q: Tensor, kv_c: Tensor, lens: Tensor) -> Tensor:
        tensors = q, q[..., :0], kv_c, kv_c[..., :0]
        return mla_compile.mla_decode(*tensors, 0.2, seq_lens=lens, logit_cap=30.0)[0]


def test_an_explicit_call_is_packaged_too(tmp_path: Path) -> None:
    x = torch.randn(3, 4, 32), torch.randn(3, 20, 32), torch.tensor([1, 20, 7])
    path = str(tmp_path / "call.pt2")
    with torch.no_grad():
        aoti_compile_and_package(export(Call(), x), package_path=path)
    torch.testing.assert_close(aoti_load_package(path)(*x), Call()(*x))


@pytest.mark.parametrize(
    "imports, accepted", [("mla_compile", True), ("torch", False)], ids=["with", "without"]
)
def test_another_process_needs_the_op_to_load_a_package(
    package: Path, tmp_path: Path, imports: str, accepted: bool
) -> None:
    x = inputs()
    torch.save(read(x), tmp_path / "inputs.pt")
    torch.save(expanded_sdpa_length_mask(x), tmp_path / "expected.pt")
    files = [str(package), str(tmp_path / "inputs.pt"), str(tmp_path / "expected.pt")]
    command = [sys.executable, "-c", LOAD.format(imports=imports), *files]
    root = Path(__file__).parent.parent
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) is accepted, done.stderr
    if not accepted:
        assert "refused" in done.stderr
