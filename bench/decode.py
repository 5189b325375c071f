"""MLA decode: native PyTorch against the op on the AITER tutorial's shapes, and the op on many.

    python -m bench.decode                  # batch 128 and 1, contexts 512 to 8192, page 1
    python -m bench.decode --sweep          # batches, heads, pages, ragged lengths, MTP, fp16
    python -m bench.decode --device cpu     # small shapes, the same path; also with --sweep

Every provider gets the same inputs. A result is compared with float64 first; one whose error is
over twice that of plain PyTorch in the same dtype gets no time: its row stays, empty, and the exit
code is 1. `--check` stops there. Peers: see bench.peers.

The sweep also times the kernels that the tables did not pick, so that a wrong pick shows.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

import mla_compile  # noqa: F401  registers the op
from bench import peers
from bench.case import (
    DTYPES,
    LKV,
    SPREAD,
    Case,
    R,
    Shape,
    batched,
    batched_bytes,
    looped,
    make_case,
    visible,
)
from bench.common import (
    arguments,
    ceilings,
    compared,
    failures,
    judge,
    max_error,
    parse,
    progress,
    provenance,
    say,
    table,
    untimed,
    verdict,
    write,
)
from bench.peers import Call
from mla_compile.kernels import decode as kernels
from mla_compile.kernels.config import GLUON, Config
from mla_compile.validate import validate

Row = dict[str, Any]
Make = Callable[[Case], Call]
SHAPE = ("batch", "context", "page", "heads", "Sq", "dtype", "lengths", "tokens")
OURS = "mla_compile"
EAGER = "naive eager"
PIN = "MLA_COMPILE_KERNEL"


def eager(case: Case) -> Call:
    inputs = _batched_inputs(case)
    return lambda: batched(*inputs)


def compiled(case: Case) -> Call:
    # Each case compiles for its own shapes; without the reset the ninth would silently run eagerly.
    torch.compiler.reset()
    fn = torch.compile(batched, dynamic=False)
    inputs = _batched_inputs(case)
    return lambda: fn(*inputs)


def _batched_inputs(case: Case) -> tuple[Any, ...]:
    shape = case.shape
    q = case.q.view(shape.B, shape.Sq, shape.N, LKV + R)
    rest = (case.kv_buffer, case.block_table, visible(case), case.sm_scale)
    return (q, *rest, max(shape.lens))


def fp32_loop(case: Case) -> Call:
    return lambda: looped(case, torch.float32).to(case.q.dtype)


def ours(case: Case) -> Call:
    return peers.aiter_like(torch.ops.mla_compile.mla_decode_fwd, case)


TUTORIAL: dict[str, Make] = {
    "naive eager bf16": eager,
    "naive fp32 loop": fp32_loop,
    "naive torch.compile": compiled,
    OURS: ours,
}


@contextmanager
def pinned(kernel: str | None) -> Iterator[None]:
    """Calls in here are planned with that kernel; None lets the tables pick."""
    kernels._plans.clear()
    with patch.dict(os.environ):
        os.environ.pop(PIN, None)
        if kernel:
            os.environ[PIN] = kernel
        yield
    kernels._plans.clear()


def compile_ahead(cases: Sequence[Case]) -> None:
    """Compile the kernels of all cases at once: one after the other they take minutes."""
    arch, _ = kernels._device(cases[0].q.device)
    for kernel in (None, *_kernels(arch)):
        with pinned(kernel), ThreadPoolExecutor() as pool:
            for case in cases:
                pool.submit(ours(case))  # what fails here will fail again in its row


def picked(case: Case) -> tuple[Config, str]:
    """What the tables pick for the op, or the pin, and why."""
    q_nope, q_pe = case.q.split([LKV, R], -1)
    kv_c, k_pe = case.kv_buffer.squeeze(2).split([LKV, R], -1)
    names = ("kv_indptr", "kv_indices", "kv_last_page_lens", "qo_indptr")
    options: dict[str, Any] = {name: getattr(case, name) for name in names}
    options["max_seqlen_q"] = case.shape.Sq
    return kernels.configure(validate(q_nope, q_pe, kv_c, k_pe, case.sm_scale, **options))


def others(case: Case) -> list[str]:
    """The arch's kernels that the tables do not pick."""
    arch, _ = kernels._device(case.q.device)
    with pinned(None):
        return [kernel for kernel in _kernels(arch) if kernel != picked(case)[0].kernel]


def _kernels(arch: str) -> list[str]:
    return ["portable", *dict.fromkeys(config.kernel for config in GLUON.get(arch, ()))]


def run_case(
    case: Case,
    providers: dict[str, Make],
    pins: dict[str, str],  # the kernel of providers that do not leave it to the tables
    ceiling: tuple[float, float],
    graph: bool,
    timed: bool,
) -> list[Row]:
    reference = looped(case, torch.float64)
    plain = max_error(looped(case, case.q.dtype), reference)
    gpu = case.q.is_cuda
    rows: list[Row] = []
    for name, make in providers.items():
        own = name == OURS or name in pins
        capture = graph and make is not fp32_loop  # the loop reads lengths on the host
        case.o.fill_(-1)
        with pinned(pins.get(name)):
            config, why = picked(case) if own and gpu else (None, "")
            try:
                result = judge(make(case), reference, plain, graph=capture, timed=timed)
            except Exception as error:
                verb = "refused" if name in peers.KNOWN or ":" in name else "failed"
                result = untimed(f"{verb}: {error}".splitlines()[0])
        tile = f"{config.kernel} {config.block_m}×{config.block_n}: {why}" if config else ""
        rows.append(facts(case.shape, name) | {"kernel": tile} | result)
        say(f"{case.shape}  {name}: {verdict(result, plain)}")
    return compared([row | rates(case.shape, row["ms"], ceiling) for row in rows], OURS)


def sweep_providers(case: Case, memory: int) -> tuple[dict[str, Make], dict[str, str]]:
    """Eager where it fits, the op, and the kernels that the tables do not pick, with their pins."""
    pins = {f"{kernel} pinned": kernel for kernel in others(case)} if case.q.is_cuda else {}
    naive: dict[str, Make] = {EAGER: eager} if batched_bytes(case.shape) < memory / 2 else {}
    return {**naive, OURS: ours, **dict.fromkeys(pins, ours)}, pins


def facts(shape: Shape, provider: str) -> Row:
    lens = shape.lens
    values = (shape.B, max(lens), shape.page_size, shape.N, shape.Sq, shape.dtype, shape.lengths)
    return {"provider": provider, **dict(zip(SHAPE, (*values, sum(lens)), strict=True))}


def rates(shape: Shape, ms: float | None, ceiling: tuple[float, float]) -> Row:
    tflops = ms and shape.flops / ms * 1e-9
    gbs = ms and shape.bytes / ms * 1e-6
    return {
        "FLOP/byte": shape.flops / shape.bytes,
        "TFLOP/s": tflops,
        "GB/s": gbs,
        "% matmul": tflops and 100 * tflops / ceiling[0],
        "% copy": gbs and 100 * gbs / ceiling[1],
    }


def tutorial(
    batches: Sequence[int], contexts: Sequence[int], pages: Sequence[int], N: int
) -> list[Shape]:
    return [Shape(B, Skv, page, N) for B in batches for page in pages for Skv in contexts]


def sweep(B: int, Skv: int, N: int) -> list[Shape]:
    """One line at a time through B sequences of Skv tokens and N heads."""
    of = partial(replace, Shape(B, Skv, N=N))
    long = of(B=B // 2, Skv=8 * Skv)
    few = N // 8  # heads of one GPU of eight
    shapes = [
        *(of(B=2**i) for i in range((2 * B).bit_length())),
        *(of(B=1, Skv=Skv * i // 8) for i in (1, 2, 16, 64)),
        of(B=B // 2, Skv=2 * Skv),
        *(of(Skv=2 * Skv, N=n) for n in (few, N // 4, N // 2)),
        *(of(B=b, N=few) for b in (1, max(1, B // 8))),
        *(of(B=1, Skv=Skv * i // 8, N=few) for i in (1, 64)),
        *(of(page_size=page) for page in (1, 16, 256)),
        *(of(B=1, Skv=Skv * i, page_size=1) for i in (1, 8)),
        *(replace(long, lengths=f"log-uniform{s}") for s in ("", SPREAD)),
        *(replace(long, B=B, lengths=f"one long{s}") for s in ("", SPREAD)),
        *(of(B=B // 2, Sq=Sq) for Sq in (2, 3, 4)),
        *(of(N=few, Sq=Sq) for Sq in (2, 4)),
        *(of(B=b, dtype="fp16") for b in (1, B)),
    ]
    return list(dict.fromkeys(shapes))


def picks(rows: list[Row]) -> list[Row]:
    """Each pick beside a kernel that was not picked; SLOWER where the quantiles are apart."""
    found = []
    for row in rows:
        same = [r for r in rows if all(r[c] == row[c] for c in SHAPE)]
        for other in same if row["provider"] == OURS else []:
            if other["provider"].endswith(" pinned") and row["ms"] and other["ms"]:
                slower = other["ms p80"] < row["ms p20"]
                cells = {"picked": row["kernel"].partition(":")[0], "ms": row["ms"]}
                cells |= {"instead": other["kernel"].partition(":")[0], "its ms": other["ms"]}
                cells |= {"its / picked": other["ms"] / row["ms"], "": "SLOWER" * slower}
                found.append({c: row[c] for c in SHAPE} | cells)
    return found


def ragged(rows: list[Row]) -> list[Row]:
    """Ragged lengths beside the same tokens spread evenly."""
    mine = {(r["batch"], r["lengths"]): r for r in rows if r["provider"] == OURS and r["ms"]}
    return [
        {
            "lengths": row["lengths"],
            "tokens": row["tokens"],
            "ms": row["ms"],
            "spread ms": mine[B, lengths + SPREAD]["ms"],
            "ragged / spread": row["ms"] / mine[B, lengths + SPREAD]["ms"],
        }
        for (B, lengths), row in mine.items()
        if (B, lengths + SPREAD) in mine
    ]


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--sweep", action="store_true", help="many shapes, not the tutorial's")
    parser.add_argument("--batches", type=int, nargs="+", help="of the tutorial's experiment")
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--pages", type=int, nargs="+", default=[1])
    parser.add_argument("--compare", default="", metavar="A,B", help=f"of {', '.join(peers.KNOWN)}")
    parser.add_argument("--peer", action="append", default=[], metavar="MODULE:FUNCTION")
    args, device = parse(parser)
    gpu = device.type == "cuda"
    try:
        compare, missing = peers.find(args.compare, args.peer)
    except (ValueError, ImportError, AttributeError) as error:
        parser.error(str(error))
    for name in missing:
        say(f"{name} is not installed here: left out")

    heads, slots = (128, 2_097_152) if gpu else (16, 4096)
    if args.sweep:
        shapes = sweep(128, 4096, heads) if gpu else sweep(4, 64, heads)
    else:
        batches = args.batches or ([128, 1] if gpu else [3, 1])
        contexts = args.contexts or ([512, 1024, 2048, 4096, 6144, 8192] if gpu else [64, 200])
        shapes = tutorial(batches, contexts, args.pages, heads)

    torch.manual_seed(0)
    origin: Row = {"experiment": "sweep" if args.sweep else "tutorial"}
    origin |= provenance(device, args.commit)
    ceiling = ceilings(device)
    say(f"{origin['device']}: matmul {ceiling[0]:.4g} TFLOP/s, copy {ceiling[1]:.4g} GB/s")
    origin |= {"matmul TFLOP/s": ceiling[0], "copy GB/s": ceiling[1]}
    pools = {
        name: torch.randn(slots, LKV + R, dtype=dtype, device=device)
        for name, dtype in DTYPES.items()
        if any(shape.dtype == name for shape in shapes)
    }
    memory = torch.cuda.mem_get_info(device)[0] if gpu else 2**32

    cases = [make_case(shape, pools[shape.dtype]) for shape in shapes]
    if gpu and args.sweep:
        compile_ahead(cases)
        say("compiled")

    rows: list[Row] = []
    for case in progress(cases):
        providers, pins = sweep_providers(case, memory) if args.sweep else (TUTORIAL, {})
        found = run_case(case, providers | compare, pins, ceiling, args.graph, not args.check)
        rows += [row | origin for row in found]
        path = write(args.out, "sweep" if args.sweep else "decode", rows)
    print(table(rows, [c for c in rows[0] if c not in {"kernel", "ms p20", "ms p80", *origin}]))
    for title, summary in (("Picks", picks(rows)), ("Ragged", ragged(rows))):
        if summary:
            print(f"\n{title}\n{table(summary, list(summary[0]))}")
    say(f"{len(rows)} rows in {path}")
    return failures(rows)


if __name__ == "__main__":
    raise SystemExit(main())
