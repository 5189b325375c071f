"""Figures from the CSVs of bench.decode and bench.model alone.

    python -m bench.plot bench/results/decode-h200.csv bench/results/model-h200.csv
    python -m bench.plot bench/results/sweep-h200.csv

Bars of native PyTorch beside the op, a panel a CSV; the number above a native bar is how many times
as long it takes as the last bar. A sweep gives two panels: its roofline, and how it scales with the
batch.
"""

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, str]
COLOURS = ["#c4c7cc", "#8b9098", "#d1452b"]
PEERS = ["#4c78a8", "#59a14f", "#b07aa1", "#edc948", "#76b7b2"]
LABELS = {"mla": 'torch.compile, backend="mla"'}
OURS = "mla_compile"
MARKERS = "osD^vP"


@dataclass(frozen=True)
class Panel:
    """What to draw of a CSV: rows where `only` holds, one group of bars for each value of `x`."""

    title: str
    x: str
    xlabel: str
    only: Row
    providers: tuple[str, str, str]  # the last is ours


DECODE = Panel(
    "the op, batch {batch}, page {page}",
    "context",
    "cached tokens",
    {"batch": "128", "page": "1"},
    ("naive eager bf16", "naive torch.compile", OURS),
)
MODEL = Panel(
    "Hugging Face DeepSeek-V3 attention, {context} tokens",
    "batch",
    "batch",
    {"part": "attention", "context": "4096"},
    ("eager", "torch.compile", "mla"),
)


def multiple(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio < 10 else f"{ratio:.0f}×"


def bars(panel: Panel, axes: Axes, rows: list[Row]) -> None:
    chosen = [r for r in rows if r["ms"] and all(r[k] == v for k, v in panel.only.items())]
    ms = {(int(r[panel.x]), r["provider"]): float(r["ms"]) for r in chosen}
    groups = sorted({x for x, _ in ms})
    ours = panel.providers[-1]
    for i, (provider, colour) in enumerate(zip(panel.providers, COLOURS, strict=True)):
        timed = [(at, x) for at, x in enumerate(groups) if (x, provider) in ms]
        drawn = axes.bar(
            [at + (i - 1) * 0.28 for at, _ in timed],
            [ms[x, provider] for _, x in timed],
            0.26,
            color=colour,
            label=LABELS.get(provider, provider),
        )
        if provider != ours:
            times = [multiple(ms[x, provider] / ms[x, ours]) for _, x in timed]
            axes.bar_label(drawn, times, fontsize=7, padding=1)
    axes.set_xticks(range(len(groups)), [str(x) for x in groups])
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel("ms")
    axes.set_title(panel.title.format(**chosen[0]), fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def roofline(axes: Axes, rows: list[Row]) -> None:
    """The op's TFLOP/s by FLOP/byte under what a copy and a matmul reached in the same run."""
    matmul, copy = float(rows[0]["matmul TFLOP/s"]), float(rows[0]["copy GB/s"])
    mine = [row for row in rows if row["ms"] and row["provider"] == OURS]
    at = [float(row["FLOP/byte"]) for row in mine]
    ridge = matmul / copy * 1e3
    ends = sorted({min(at), ridge, max(*at, 2 * ridge)})
    roof = [min(matmul, x * copy * 1e-3) for x in ends]
    axes.plot(
        ends, roof, color=COLOURS[1], label=f"matmul {matmul:.0f} TFLOP/s, copy {copy:.0f} GB/s"
    )
    for marker, heads in zip(MARKERS, sorted({int(row["heads"]) for row in mine}), strict=False):
        some = [row for row in mine if int(row["heads"]) == heads]
        axes.scatter(
            [float(row["FLOP/byte"]) for row in some],
            [float(row["TFLOP/s"]) for row in some],
            s=[6 + 3 * int(row["batch"]).bit_length() for row in some],
            marker=marker,
            color=COLOURS[2],
            alpha=0.7,
            label=f"{heads} heads",
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.get_xaxis().set_major_formatter("{x:.0f}")
    axes.set_xlabel("FLOP / byte")
    axes.set_ylabel("TFLOP/s")
    axes.set_title("roofline; a larger mark is a larger batch", fontsize=9)
    axes.legend(frameon=False, fontsize=7, loc="lower right")


def scaling(axes: Axes, rows: list[Row]) -> None:
    """TFLOP/s by batch at the shape that was measured at the most batches."""
    fixed = ("context", "page", "heads", "Sq", "dtype", "lengths")
    batches: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        batches.setdefault(tuple(row[c] for c in fixed), set()).add(row["batch"])
    shape = max(batches, key=lambda key: len(batches[key]))
    line = [row for row in rows if row["ms"] and tuple(row[c] for c in fixed) == shape]
    others = cycle((*COLOURS[:2], *PEERS))
    for provider in dict.fromkeys(row["provider"] for row in line):
        points = sorted(
            (int(r["batch"]), float(r["TFLOP/s"])) for r in line if r["provider"] == provider
        )
        colour = COLOURS[2] if provider == OURS else next(others)
        axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=provider, color=colour)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({int(row["batch"]) for row in line}))
    axes.get_xaxis().set_major_formatter("{x:.0f}")
    axes.set_xlabel("batch")
    axes.set_ylabel("TFLOP/s")
    axes.set_title("{context} tokens, page {page}, {heads} heads".format(**line[0]), fontsize=9)
    axes.legend(frameon=False, fontsize=7, loc="upper left")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="SVG, else the first CSV's name with .svg")
    args = parser.parse_args()

    panels: list[tuple[Callable[[Axes, list[Row]], None], list[Row]]] = []
    for path in args.csv:
        with path.open() as file:
            rows = list(csv.DictReader(file))
        if rows[0].get("experiment") == "sweep":
            panels += [(roofline, rows), (scaling, rows)]
        else:
            panels.append((partial(bars, MODEL if "part" in rows[0] else DECODE), rows))

    # The same CSV gives the same bytes; text stays text.
    plt.rcParams |= {"svg.hashsalt": "mla-compile", "svg.fonttype": "none"}
    count = len(panels)
    figure, drawn = plt.subplots(
        ncols=count, figsize=(5 * count, 3), layout="constrained", squeeze=False
    )
    for (draw, rows), axes in zip(panels, drawn[0], strict=True):
        draw(axes, rows)
        axes.spines[["top", "right"]].set_visible(False)
    first = panels[0][1][0]
    origin = f"{first['device']}, torch {first['torch']}, triton {first['triton']}"
    launch = "CUDA graphs" if first["launch"] == "graph" else "launched from Python"
    figure.suptitle(f"{origin}, bf16, {launch}", fontsize=10)
    figure.savefig(args.out or args.csv[0].with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
