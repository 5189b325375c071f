"""The host's side of a launch: a plan decides once what Triton would decide anew in every call."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
ARCHS = ["sm90", "gfx942"]


def command(*arguments: str) -> str:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = [sys.executable, *arguments]
    result = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@functools.cache
def launches(arch: str) -> Any:
    return json.loads(command("-m", "tests.launches", arch))


@pytest.mark.parametrize("arch", ARCHS)
def test_a_planned_launch_is_the_one_triton_would_make(arch: str) -> None:
    found = launches(arch)
    assert [name for name, same in found["same"].items() if not same] == []
    alike = 1 if arch == "sm90" else 0  # no NVIDIA kernel minds how large a buffer is
    assert found["plans"] == len(found["same"]) - alike


@pytest.mark.parametrize("arch", ARCHS)
def test_one_kernel_is_launched_where_the_kv_is_not_split(arch: str) -> None:
    counts = launches(arch)["launches"]
    assert counts.pop("not split") == 1
    assert set(counts.values()) == {2}


@pytest.mark.parametrize(
    ("arch", "call", "shared"),
    [
        ("sm90", "another scale", True),
        ("sm90", "a longer cache", True),
        ("sm90", "a buffer beyond 2 GB", True),
        ("sm90", "queries off the grid", False),
        ("sm90", "lengths", False),
        ("gfx942", "a longer cache", True),
        ("gfx942", "a buffer beyond 2 GB", False),
        ("gfx942", "rope cache off the grid", False),
    ],
)
def test_calls_share_a_binary_where_triton_says_so(arch: str, call: str, shared: bool) -> None:
    binaries = launches(arch)["binaries"]
    assert (binaries[call] == binaries["dense"]) is shared


def test_the_host_benchmark_runs_anywhere() -> None:
    assert "the op behind it" in command("-m", "bench.host")
