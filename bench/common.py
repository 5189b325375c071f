"""What the benchmarks share: checks, times, ceilings of the device, rows that know their origin."""

import argparse
import csv
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"
START = time.perf_counter()
T = TypeVar("T")


@dataclass(frozen=True)
class Times:
    """Quantiles of one call in milliseconds."""

    p20: float
    p50: float
    p80: float


def say(text: str) -> None:
    tqdm.write(f"[{time.perf_counter() - START:6.1f} s] {text}")
    sys.stdout.flush()


def progress(steps: Sequence[T]) -> Iterator[T]:
    """Each step, and how far it is: a bar on a terminal, else a line."""
    bar = tqdm(steps, disable=None)
    for i, step in enumerate(bar):
        if bar.disable:
            say(f"{i + 1} of {len(steps)}")
        yield step


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="commit measured, where the checkout has no .git")
    parser.add_argument(
        "--graph",
        action=argparse.BooleanOptionalAction,
        help="time CUDA graph replays, or launches from Python; a GPU's default is graphs",
    )
    parser.add_argument("--check", action="store_true", help="check every result, time none")
    parser.add_argument("--out", type=Path, help="CSV, else bench/results/<bench>-<device>.csv")
    return parser


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, torch.device]:
    args = parser.parse_args()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    if args.graph and not gpu:
        parser.error("--graph needs a GPU")
    args.graph = gpu if args.graph is None else args.graph
    return args, device


def provenance(device: torch.device, commit: str | None) -> dict[str, str]:
    gpu = device.type == "cuda"
    return {
        "cache": "cold, flushed by reads" if gpu else "warm",
        "device": torch.cuda.get_device_name(device) if gpu else f"cpu {platform.machine()}",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit("this checkout has no git history: pass --commit, rows must name the code")
    return result.stdout.strip()


def measure(fn: Callable[[], object], device: torch.device) -> Times:
    """Quantiles over at most 200 calls or about 100 ms on a GPU, 5 calls on a CPU.

    Before each call on a GPU a buffer of twice the largest cache there is (MI300X, 256 MB) is read.
    Triton's do_bench writes one: what of it fits the cache, 50 MB on an H200, is then written back
    while the call runs, 12 µs of bandwidth that are no cost of the call.
    """
    if device.type == "cuda":
        milliseconds = _cold(fn, device)
    else:
        fn()
        milliseconds = []
        for _ in range(5):
            start = time.perf_counter()
            fn()
            milliseconds.append((time.perf_counter() - start) * 1e3)
    q = torch.quantile(torch.tensor(milliseconds), torch.tensor([0.2, 0.5, 0.8]))
    return Times(*q.tolist())


def _cold(fn: Callable[[], object], device: torch.device) -> list[float]:
    buffer = torch.zeros(2**27, device=device)  # 512 MB

    def timed(count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            buffer.sum()
            start.record()
            fn()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    typical = sorted(timed(5))[2]
    timed(min(50, int(25 / typical)))  # clocks settle
    return timed(max(5, min(200, int(100 / typical))))


def captured(fn: Callable[[], object]) -> Callable[[], None]:
    """fn as one CUDA graph: what it costs once the host's launch time is out of the way."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def ceilings(device: torch.device) -> tuple[float, float]:
    """What this device reaches in this run: TFLOP/s of a bf16 matmul, GB/s of a copy."""
    side, size = (8192, 2**31) if device.type == "cuda" else (512, 2**24)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    matmul = measure(lambda: a @ b, device).p50
    src = torch.zeros(size, dtype=torch.uint8, device=device)
    dst = torch.empty_like(src)
    copy = measure(lambda: dst.copy_(src), device).p50
    return 2 * side**3 / matmul * 1e-9, 2 * size / copy * 1e-6  # one read and one write


def max_error(out: Tensor, reference: Tensor) -> float:
    return float((out.double() - reference).abs().max())


def within(error: float, plain: float) -> bool:
    """At most twice the error plain PyTorch makes in the same dtype; a NaN is never within."""
    return error <= 2 * plain


def judge(
    call: Callable[[], Tensor], reference: Tensor, plain: float, *, graph: bool, timed: bool
) -> dict[str, Any]:
    """Columns of a call: its error, and if that is within reason its times."""
    error = max_error(call(), reference)
    status, times = "ok" if within(error, plain) else "wrong", None
    if status == "ok" and timed:
        times = measure(captured(call) if graph else call, reference.device)
    return {
        "status": status,
        "launch": "graph" if graph else "eager",
        "ms": times and times.p50,
        "ms p20": times and times.p20,
        "ms p80": times and times.p80,
        "error": error,
    }


def untimed(status: str) -> dict[str, Any]:
    """Columns of what was not called to an end, and why."""
    return {"status": status} | dict.fromkeys(("launch", "ms", "ms p20", "ms p80", "error"))


def failures(rows: Sequence[Mapping[str, Any]]) -> int:
    """An exit code: 1 where a result is wrong or did not come."""
    return int(any(row["status"].startswith(("wrong", "failed")) for row in rows))


def compared(rows: list[dict[str, Any]], provider: str) -> list[dict[str, Any]]:
    """Rows of one case, each with how many times as long as `provider` it takes."""
    base = next(row["ms"] for row in rows if row["provider"] == provider)
    return [row | {f"vs {provider}": row["ms"] and base and row["ms"] / base} for row in rows]


def verdict(row: Mapping[str, Any], plain: float) -> str:
    """A row in a few words, for those who watch."""
    if row["status"] == "wrong":
        return f"WRONG, not timed: error {row['error']:.2e}, plain PyTorch's {plain:.2e}"
    if row["status"] != "ok":
        return str(row["status"])
    time = f"{row['ms']:.4f} ms" if row["ms"] else "not timed"
    return f"{time}, error {row['error']:.2e}"


def write(path: Path | None, bench: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """All rows so far, after each case: a run that is cut short leaves what it has."""
    if path is None:
        slug = re.sub(r"[^a-z0-9]+", "-", rows[0]["device"].lower())
        path = RESULTS / f"{bench}-{slug}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    return path


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Right-aligned text table of some columns; absent values print as a dash."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [list(columns), *([cell(row[c]) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
        for line in lines
    )
