"""compute-sanitizer finds nothing in the kernels that run on an NVIDIA GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mla_compile.kernels.config import GLUON
from mla_compile.kernels.decode import _device
from tests.sanitized import CASES, CONFIGS

TOOL = shutil.which("compute-sanitizer")
CLEAN = {
    "memcheck": "ERROR SUMMARY: 0 errors",
    "racecheck": "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
}


@pytest.mark.gpu
@pytest.mark.parametrize("tool", CLEAN)
@pytest.mark.parametrize("kernel", CONFIGS)
def test_it_finds_nothing(kernel: str, tool: str) -> None:
    if TOOL is None:
        pytest.skip("no compute-sanitizer on PATH")
    if kernel in GLUON and _device(torch.device("cuda", 0))[0] != kernel:
        pytest.skip(f"the kernel runs on {kernel} alone")
    done = subprocess.run(
        [TOOL, "--tool", tool, sys.executable, "-m", "tests.sanitized", kernel],
        env=os.environ | {"MLA_COMPILE_RACECHECK": str(int(tool == "racecheck"))},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.stdout.count("right:") == len(CASES), done.stdout + done.stderr
    assert CLEAN[tool] in done.stdout, done.stdout
