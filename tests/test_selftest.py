"""`python -m mla_compile selftest`, on a CPU."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mla_compile import ops, selftest
from mla_compile.__main__ import COMMANDS
from mla_compile.selftest import Case

FEW = [Case(N=16), Case(N=8, Sq=2, page_size=16), Case(lens=(0, 5), N=3, dtype=torch.float16)]


def run(monkeypatch: pytest.MonkeyPatch, path: Path) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(selftest, "CASES", FEW)
    arguments = ["--device", "cpu", "--json", str(path)]

    code = COMMANDS["selftest"](argparse.ArgumentParser(), arguments)
    return code, json.loads(path.read_text())


def test_it_writes_what_it_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, result = run(monkeypatch, tmp_path / "result.json")
    assert code == 0
    assert len(result["checks"]) == 3 and all(row["right"] for row in result["checks"])
    assert all(row["ms"] > 0 for row in result["benchmark"])
    assert result["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize("wrong", [0.5, math.nan])
def test_it_fails_where_the_op_is_wrong(
    wrong: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = ops.mla_decode

    def mla_decode(*args: Any, **options: Any) -> Any:
        out, lse = right(*args, **options)
        return out + wrong, lse

    monkeypatch.setattr(ops, "mla_decode", mla_decode)
    code, result = run(monkeypatch, tmp_path / "result.json")
    assert code == 1
    assert not any(row["right"] for row in result["checks"])
