"""Bars of native PyTorch beside the op, from the CSVs of bench.decode and bench.model alone.

    python -m bench.plot bench/results/decode-h200.csv bench/results/model-h200.csv

One panel a CSV; the number above a native bar is how many times as long it takes as the last bar.
"""

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

Row = dict[str, str]
COLOURS = ["#c4c7cc", "#8b9098", "#d1452b"]
LABELS = {"mla": 'torch.compile, backend="mla"'}


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
    ("naive eager bf16", "naive torch.compile", "mla_compile"),
)
MODEL = Panel(
    "Hugging Face DeepSeek-V3 attention, {context} tokens",
    "batch",
    "batch",
    {"part": "attention"},
    ("eager", "torch.compile", "mla"),
)


def multiple(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio < 10 else f"{ratio:.0f}×"


def draw(axes: Axes, panel: Panel, rows: list[Row]) -> None:
    chosen = [r for r in rows if r["ms"] and all(r[k] == v for k, v in panel.only.items())]
    ms = {(int(r[panel.x]), r["provider"]): float(r["ms"]) for r in chosen}
    groups = sorted({x for x, _ in ms})
    ours = panel.providers[-1]
    for i, (provider, colour) in enumerate(zip(panel.providers, COLOURS, strict=True)):
        at = [g + (i - 1) * 0.28 for g in range(len(groups))]
        bars = axes.bar(
            at,
            [ms[x, provider] for x in groups],
            0.26,
            color=colour,
            label=LABELS.get(provider, provider),
        )
        if provider != ours:
            times = [multiple(ms[x, provider] / ms[x, ours]) for x in groups]
            axes.bar_label(bars, times, fontsize=7, padding=1)
    axes.set_xticks(range(len(groups)), [str(x) for x in groups])
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel("ms")
    axes.set_title(panel.title.format(**chosen[0]), fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, help="SVG, else the first CSV's name with .svg")
    args = parser.parse_args()

    # The same CSV gives the same bytes; text stays text.
    plt.rcParams |= {"svg.hashsalt": "mla-compile", "svg.fonttype": "none"}
    count = len(args.csv)
    figure, panels = plt.subplots(
        ncols=count, figsize=(5 * count, 3), layout="constrained", squeeze=False
    )
    for path, axes in zip(args.csv, panels[0], strict=True):
        with path.open() as file:
            rows = list(csv.DictReader(file))
        draw(axes, MODEL if "part" in rows[0] else DECODE, rows)
    first = rows[0]
    origin = f"{first['device']}, torch {first['torch']}, triton {first['triton']}"
    figure.suptitle(f"{origin}, bf16, {first['heads']} heads, CUDA graphs", fontsize=10)
    figure.savefig(args.out or args.csv[0].with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
