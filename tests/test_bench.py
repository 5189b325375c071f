"""The benchmarks check before they time, and run on a CPU."""

import csv
from pathlib import Path

import pytest
import torch

from bench import decode, model


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def run(module: object, monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> int:
    common = ["bench", "--device", "cpu", "--commit", "0123abc", "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*common, *arguments])
    code: int = module.main()  # type: ignore[attr-defined]
    return code


def test_decode_times_every_provider(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "decode.csv"
    assert run(decode, monkeypatch, out, "--batches", "2", "--contexts", "70", "--pages", "64") == 0
    timed = rows(out)
    assert [r["provider"] for r in timed if float(r["ms"]) > 0] == [
        "naive eager bf16",
        "naive fp32 loop",
        "naive torch.compile",
        "mla_compile",
    ]
    assert {(r["commit"], r["device"][:3]) for r in timed} == {("0123abc", "cpu")}


def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "decode.csv"
    monkeypatch.setattr(decode, "ours", lambda case: torch.zeros_like(case.o))
    assert run(decode, monkeypatch, out, "--batches", "1", "--contexts", "64", "--pages", "1") == 1
    assert [r["ms"] for r in rows(out) if r["provider"] == "mla_compile"] == [""]


def test_model_times_the_module_and_the_attention(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "model.csv"
    assert run(model, monkeypatch, out, "--batches", "2", "--context", "64") == 0
    timed = [(r["part"], r["provider"]) for r in rows(out) if float(r["ms"]) > 0]
    forms = ("eager", "torch.compile", "mla")
    assert timed == [(part, form) for part in ("module", "attention") for form in forms]
