"""Bars of naive PyTorch against the op, per context, from a CSV of bench.decode alone.

python -m bench.plot bench/results/decode-nvidia-h200.csv     # writes the .svg beside it
"""

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

OURS = "mla_compile"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("--batch", type=int, help="the largest in the CSV if absent")
    parser.add_argument("--page", type=int, default=1)
    parser.add_argument("--native", default="naive torch.compile", help="provider to compare with")
    parser.add_argument("--out", type=Path, help="SVG or PNG, else the CSV's name with .svg")
    args = parser.parse_args()

    with args.csv.open() as file:
        rows = list(csv.DictReader(file))
    batch = args.batch or max(int(row["batch"]) for row in rows)
    chosen = [r for r in rows if (int(r["batch"]), int(r["page"])) == (batch, args.page)]
    ms = {(r["provider"], int(r["context"])): float(r["ms"]) for r in chosen if r["ms"]}
    contexts = sorted({c for p, c in ms if p == OURS} & {c for p, c in ms if p == args.native})

    plt.rcParams["svg.hashsalt"] = "mla-compile"  # the same CSV gives the same bytes
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    for shift, provider, colour in [(-0.2, args.native, "#9aa0a6"), (0.2, OURS, "#d1452b")]:
        heights = [ms[provider, c] for c in contexts]
        axes.bar(
            [i + shift for i in range(len(contexts))], heights, 0.4, label=provider, color=colour
        )
    for i, c in enumerate(contexts):
        ours = ms[OURS, c]
        axes.annotate(
            f"{ms[args.native, c] / ours:.1f}×", (i + 0.2, ours), ha="center", va="bottom"
        )
    axes.set_xticks(range(len(contexts)), [str(c) for c in contexts])
    axes.set_xlabel("cached tokens")
    axes.set_ylabel("ms")
    first = chosen[0]
    axes.set_title(
        f"MLA decode, {first['device']}, bf16, batch {batch}, {first['heads']} heads, "
        f"page {args.page}\ntorch {first['torch']}, triton {first['triton']}, {first['commit']}",
        fontsize=9,
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    out = args.out or args.csv.with_suffix(".svg")
    figure.savefig(out, metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
