"""Is the op right here, and how fast? Runs the installed op on this machine's device, prints tables
and writes all of it as JSON, to be sent back from hardware the project has not seen.

Every case is compared with float64; the error allowed is twice what plain PyTorch makes in the same
dtype. Cache slots that no sequence owns hold NaN. The benchmark is that of AITER's MLA tutorial,
with AITER's own kernel beside ours where it is installed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

import mla_compile.kernels.decode as decode
from mla_compile import ops
from mla_compile.paged import build_csr
from mla_compile.validate import validate

LKV, R = 512, 64


@dataclass(frozen=True)
class Case:
    lens: tuple[int, ...] = (517, 0, 1, 63, 64, 65, 130)
    N: int = 128
    page_size: int = 1
    dtype: torch.dtype = torch.bfloat16
    Sq: int = 1
    num_kv_splits: int | None = None
    logit_cap: float = 0.0


CASES = [
    *[Case(N=N, page_size=page) for N in (8, 12, 16, 32, 64, 128) for page in (1, 16, 64)],
    *[Case(N=N, dtype=torch.float16) for N in (16, 128)],
    *[Case(N=N, num_kv_splits=splits) for N in (16, 128) for splits in (1, 3, 7)],
    *[Case(N=N, Sq=Sq, page_size=16) for N in (16, 128) for Sq in (2, 4)],
    Case(lens=(8192, 3000), N=128),
    Case(N=128, dtype=torch.float32),
    Case(N=128, logit_cap=30.0),
]


def pool_of(case: Case) -> tuple[Tensor, list[list[int]]]:
    """A cache of NaN but for the keys, whose pages are scattered over it."""
    counts = [-(-n // case.page_size) for n in case.lens]
    order = torch.randperm(sum(counts) + 7).tolist()
    pages = [[order.pop() for _ in range(count)] for count in counts]
    pool = torch.full((sum(counts) + 7, case.page_size, LKV + R), torch.nan)
    for b, n in enumerate(case.lens):
        slots = torch.randn(len(pages[b]) * case.page_size, LKV + R)
        slots[n:] = torch.nan
        pool[pages[b]] = slots.view(-1, case.page_size, LKV + R)
    return pool.to(case.dtype), pages


def plain(case: Case, q: Tensor, pool: Tensor, pages: list[list[int]], scale: float) -> Tensor:
    """The contraction as anyone would write it, in the dtype of q."""
    outs = []
    for b, n in enumerate(case.lens):
        keys = pool[pages[b]].flatten(0, 1)[:n].to(q.dtype)
        scores = torch.einsum("qnd,sd->qns", q[b * case.Sq : (b + 1) * case.Sq], keys) * scale
        if case.logit_cap:
            scores = (scores / case.logit_cap).tanh() * case.logit_cap
        late = torch.ones(case.Sq, n, dtype=torch.bool, device=q.device).triu(n - case.Sq + 1)
        p = scores.masked_fill(late[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)
        outs.append(torch.einsum("qns,sl->qnl", p, keys[:, :LKV]))
    return torch.cat(outs)


def check(case: Case, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    pool, pages = pool_of(case)
    q = torch.randn(len(case.lens) * case.Sq, case.N, LKV + R).to(case.dtype)
    scale = (128 + 64) ** -0.5
    indptr, indices, last = build_csr(pages, case.lens, case.page_size, device=device)
    here, cache = q.to(device), pool.to(device)
    inputs = (here[..., :LKV], here[..., LKV:], cache[..., :LKV], cache[..., LKV:], scale)
    options: dict[str, Any] = {
        "kv_indptr": indptr,
        "kv_indices": indices,
        "kv_last_page_lens": last,
        "max_seqlen_q": case.Sq,
        "logit_cap": case.logit_cap,
        "num_kv_splits": case.num_kv_splits,
    }
    picked = None
    if device.type == "cuda":
        config, why = decode.configure(validate(*inputs, **options))
        picked = f"{config.kernel}, {config.block_m} rows × {config.block_n} keys: {why}"
    out, _ = ops.mla_decode(*inputs, **options)
    truth = plain(case, q.double(), pool, pages, scale)
    allowed = 2 * (plain(case, here, cache, pages, scale).cpu() - truth).abs().max().item()
    error = (out.cpu() - truth).abs().max().item()  # NaN is never within
    row = {name: str(value).removeprefix("torch.") for name, value in asdict(case).items()}
    return row | {"kernel": picked, "error": error, "allowed": allowed, "right": error <= allowed}


def tutorial(Skv: int, device: torch.device, B: int, N: int) -> tuple[Tensor, ...]:
    """q, kv_buffer, o, qo_indptr, kv_indptr, kv_indices, kv_last_page_lens."""
    slots = B * 16384
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
    floats: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    return (
        torch.randn(B, N, LKV + R, **floats),
        torch.randn(slots, 1, 1, LKV + R, **floats),
        torch.empty(B, N, LKV, **floats),
        torch.arange(B + 1, **ints),
        torch.arange(B + 1, **ints) * Skv,
        torch.randint(0, slots, (B * Skv,), **ints),
        torch.ones(B, **ints),
    )


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        return float(triton.testing.do_bench(call, warmup=25, rep=100, return_mode="median"))
    call()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def providers() -> dict[str, Callable[..., object]]:
    found: dict[str, Callable[..., object]] = {"mla_compile": ops.mla_decode_fwd}
    if find_spec("aiter") is not None:
        found["aiter"] = importlib.import_module("aiter.mla").mla_decode_fwd
    return found


def benchmark(device: torch.device, B: int, N: int, contexts: list[int]) -> list[dict[str, Any]]:
    rows = []
    for Skv in contexts:
        torch.manual_seed(0)
        inputs = tutorial(Skv, device, B, N)
        outs: dict[str, Tensor] = {}
        for name, provider in providers().items():
            row: dict[str, Any] = {"provider": name, "batch": B, "heads": N, "context": Skv}
            call = partial(provider, *inputs, 1, sm_scale=128**-0.5)
            try:
                call()
                outs[name] = inputs[2].float()
                ms = milliseconds(call, device)
            except Exception as error:
                if name == "mla_compile":
                    raise
                rows.append(row | {"failed": f"{type(error).__name__}: {error}"[:200]})
                continue
            row |= {
                "ms": ms,
                "TFLOP/s": 2 * B * N * Skv * (2 * LKV + R) / ms * 1e-9,
                "GB/s": 2 * B * Skv * (LKV + R) / ms * 1e-6,
                "differs from ours by": (outs[name] - outs["mla_compile"]).abs().max().item(),
            }
            rows.append(row)
    return rows


@contextmanager
def pinned(kernel: str | None) -> Iterator[None]:
    before = os.environ.get("MLA_COMPILE_KERNEL")
    os.environ["MLA_COMPILE_KERNEL"] = kernel or before or ""
    decode._plans.clear()
    try:
        yield
    finally:
        os.environ["MLA_COMPILE_KERNEL"] = before or ""
        decode._plans.clear()


def machine(device: torch.device) -> dict[str, Any]:
    described = {
        "device": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "hip": torch.version.hip,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described |= {
            "device": properties.name,
            "arch": getattr(properties, "gcnArchName", f"sm{properties.major}{properties.minor}"),
            "units": properties.multi_processor_count,
        }
    return described


def show(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns]
    for row in rows:
        values = (row.get(name, "") for name in columns)
        cells.append([f"{v:.4g}" if isinstance(v, float) else str(v) for v in values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
        for line in cells
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, default=Path("mla-compile-selftest.json"))


def main(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    kernels = [None, "portable"] if gpu and torch.version.hip else [None]
    B, N, contexts = (128, 128, [512, 1024, 2048, 4096, 8192]) if gpu else (2, 16, [64, 512])
    checks, times = [], []
    for kernel in kernels:
        with pinned(kernel):
            label = {"pinned": kernel} if len(kernels) > 1 else {}
            checks += [label | check(case, device) for case in CASES]
            times += [label | row for row in benchmark(device, B, N, contexts)]
            if gpu:
                times += [label | row for row in benchmark(device, B, 16, [4096])]
    wrong = [row for row in checks if not row["right"]]
    about = machine(device)
    print(", ".join(f"{name} {value}" for name, value in about.items() if value))
    print(show(checks))
    print(show(times))
    if find_spec("aiter") is None:
        print("AITER is not installed: nothing to compare with")
    print(f"{len(checks) - len(wrong)} of {len(checks)} cases are right")
    result = {"machine": about, "checks": checks, "benchmark": times}
    args.json.write_text(json.dumps(result, indent=1))
    print(f"Please send back {args.json}")
    return int(bool(wrong))
