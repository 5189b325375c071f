"""What the benchmarks share: checks, times, ceilings of the device, rows that know their origin."""

import argparse
import csv
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

RESULTS = Path(__file__).parent / "results"
START = time.perf_counter()


@dataclass(frozen=True)
class Times:
    """Quantiles of one call in milliseconds."""

    p20: float
    p50: float
    p80: float


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:6.1f} s] {text}", flush=True)


def arguments(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", help="commit measured, where the checkout has no .git")
    parser.add_argument("--graph", action="store_true", help="time CUDA graph replays, on a GPU")
    parser.add_argument("--out", type=Path, help="CSV, else bench/results/<bench>-<device>.csv")
    return parser


def provenance(device: torch.device, commit: str | None) -> dict[str, str]:
    gpu = device.type == "cuda"
    return {
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
    """Quantiles over about 100 ms of calls on a GPU, L2 flushed before each; 5 calls on a CPU."""
    if device.type == "cuda":
        quantiles = triton.testing.do_bench(fn, warmup=25, rep=100, quantiles=[0.2, 0.5, 0.8])
        return Times(*quantiles)
    fn()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        fn()
        seconds.append(time.perf_counter() - start)
    q = torch.quantile(torch.tensor(seconds), torch.tensor([0.2, 0.5, 0.8])) * 1e3
    return Times(*q.tolist())


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


def write(path: Path | None, bench: str, rows: Sequence[Mapping[str, Any]]) -> None:
    if path is None:
        slug = re.sub(r"[^a-z0-9]+", "-", rows[0]["device"].lower())
        path = RESULTS / f"{bench}-{slug}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    say(f"{len(rows)} rows in {path}")


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
