"""Every python snippet of the README runs, each on its own; every time in it stands in a CSV."""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
TEXT = README.read_text()
SNIPPETS = list(re.finditer(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
TIMES = re.findall(r"^\| (the op|Hugging Face attention) \| (.*) \|$", TEXT, re.MULTILINE)
MEASURED = {
    "the op": ("decode", "page", "1", "naive eager bf16", "naive torch.compile", "mla_compile"),
    "Hugging Face attention": ("model", "part", "attention", "eager", "torch.compile", "mla"),
}


def test_the_readme_has_snippets() -> None:
    assert SNIPPETS


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s[1].strip().splitlines()[-1])
def test_a_snippet_runs(snippet: re.Match[str]) -> None:
    above = "\n" * TEXT.count("\n", 0, snippet.start(1))  # errors name the README's own lines
    exec(compile(above + snippet[1], str(README), "exec"), {"__name__": "readme"})


def measured(what: str) -> list[str]:
    """The table's cells as the CSV has them: batch, context, three times, two speed-ups."""
    bench, column, value, *providers = MEASURED[what]
    with (ROOT / f"bench/results/{bench}-h200.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row[column] == value]
    cells = []
    for case in dict.fromkeys((row["batch"], row["context"]) for row in rows):
        same = [row for row in rows if (row["batch"], row["context"]) == case]
        ms = [next(float(r["ms"]) for r in same if r["provider"] == p) for p in providers]
        speedups = [f"{r:.2f}×" if r < 10 else f"{r:.1f}×" for r in (t / ms[2] for t in ms[:2])]
        cells.append(" | ".join((*case, *(f"{t:.3g}" for t in ms), *speedups)))
    return cells


@pytest.mark.parametrize("what", MEASURED)
def test_the_table_is_what_was_measured_with_no_row_left_out(what: str) -> None:
    assert [cells for name, cells in TIMES if name == what] == measured(what)


PEERS = {"ours": "mla_compile", "FlashMLA": "flash_mla", "FlashInfer": "flashinfer"}
SHAPE = r"(\d+) × (\d+)(?:, Sq (\d+))?(?:, (\d+) heads)?(?:, ([a-z-]+))?"


def test_the_times_of_peers_are_what_was_measured() -> None:
    header, *lines = re.findall(
        rf"^\| (µs, page 64|{'|'.join(PEERS)}) \| (.*) \|$", TEXT, re.MULTILINE
    )
    with (ROOT / "bench/results/sweep-h200.csv").open() as file:
        rows = [r for r in csv.DictReader(file) if (r["page"], r["dtype"]) == ("64", "bf16")]
    columns = ("provider", "batch", "context", "Sq", "heads", "lengths")
    assert [name for name, _ in lines] == list(PEERS)
    for name, cells in lines:
        for shape, cell in zip(header[1].split(" | "), cells.split(" | "), strict=True):
            batch, context, Sq, heads, lengths = re.fullmatch(SHAPE, shape).groups()  # type: ignore[union-attr]
            wanted = PEERS[name], batch, context, Sq or "1", heads or "128", lengths or "even"
            (row,) = (r for r in rows if tuple(r[c] for c in columns) == wanted)
            assert cell == f"{float(row['ms']) * 1e3:.3g}"


def test_the_readme_is_short() -> None:
    assert TEXT.count("\n") <= 150
