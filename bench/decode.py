"""MLA decode on the AITER tutorial's shapes: naive PyTorch in three forms against the op.

    python -m bench.decode                  # the GPU: batch 128 and 1, contexts 512 to 8192
    python -m bench.decode --device cpu     # small shapes, the same path

Every provider gets the same inputs. A result is compared with float64 first; one whose error is
over twice that of plain PyTorch in bf16 gets no time: its row stays, empty, and the exit code is 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mla_compile  # noqa: F401  registers the op
from bench.common import (
    Times,
    arguments,
    captured,
    ceilings,
    max_error,
    measure,
    provenance,
    say,
    table,
    within,
    write,
)

LKV, R = 512, 64


@dataclass(frozen=True)
class Case:
    """One shape with its inputs; the symbols of the README."""

    B: int
    N: int
    Skv: int
    page_size: int
    sm_scale: float
    q: Tensor  # [B, N, LKV + R]
    kv_buffer: Tensor  # [pages, page_size, 1, LKV + R]
    o: Tensor  # [B, N, LKV]
    qo_indptr: Tensor  # [B + 1]
    kv_indptr: Tensor  # [B + 1], in pages
    kv_indices: Tensor  # [B * pages of one sequence]
    kv_last_page_lens: Tensor  # [B]

    @property
    def flops(self) -> int:
        scores = 2 * self.B * self.N * self.Skv * (LKV + R)  # q_nope·kv_c + q_pe·k_pe
        output = 2 * self.B * self.N * self.Skv * LKV  # probabilities times latent
        return scores + output

    @property
    def bytes(self) -> int:
        cache = self.B * self.Skv * (LKV + R)  # every visible latent once, for all heads
        q = self.B * self.N * (LKV + R)
        out = self.B * self.N * LKV
        return (cache + q + out) * self.q.element_size()


def make_case(B: int, Skv: int, page_size: int, N: int, pool: Tensor) -> Case:
    """The tutorial's inputs: full-length sequences whose pages lie at random places of the pool."""
    device = pool.device
    kv_buffer = pool.view(-1, page_size, 1, LKV + R)
    pages = -(-Skv // page_size)
    ints: dict[str, Any] = {"dtype": torch.int32, "device": device}
    return Case(
        B=B,
        N=N,
        Skv=Skv,
        page_size=page_size,
        sm_scale=128**-0.5,  # as the tutorial calls it
        q=torch.randn(B, N, LKV + R, dtype=pool.dtype, device=device),
        kv_buffer=kv_buffer,
        o=torch.empty(B, N, LKV, dtype=pool.dtype, device=device),
        qo_indptr=torch.arange(B + 1, **ints),
        kv_indptr=torch.arange(B + 1, **ints) * pages,
        kv_indices=torch.randint(kv_buffer.shape[0], (B * pages,), **ints),
        kv_last_page_lens=torch.full((B,), Skv - (pages - 1) * page_size, **ints),
    )


def batched(q: Tensor, kv_buffer: Tensor, kv_indices: Tensor, sm_scale: float, Skv: int) -> Tensor:
    """Naive PyTorch for sequences of one length: gather, two contractions, softmax in fp32."""
    kv = kv_buffer[kv_indices.view(q.shape[0], -1)].flatten(1, 3)[:, :Skv]  # [B, Skv, LKV + R]
    scores = torch.einsum("bnd,bsd->bns", q, kv) * sm_scale
    p = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.einsum("bns,bsl->bnl", p, kv[..., :LKV])


def looped(case: Case, dtype: torch.dtype) -> Tensor:
    """AITER's test reference: one sequence at a time, in dtype throughout."""
    outs = []
    starts = case.kv_indptr.tolist()
    for b, last in enumerate(case.kv_last_page_lens.tolist()):
        pages = case.kv_indices[starts[b] : starts[b + 1]]
        kv = case.kv_buffer.index_select(0, pages).flatten(0, 2).to(dtype)
        kv = kv[: (len(pages) - 1) * case.page_size + last]
        scores = torch.einsum("nd,sd->ns", case.q[b].to(dtype), kv) * case.sm_scale
        outs.append(torch.einsum("ns,sl->nl", torch.softmax(scores, dim=-1), kv[:, :LKV]))
    return torch.stack(outs)


def ours(case: Case) -> Tensor:
    torch.ops.mla_compile.mla_decode_fwd(
        case.q,
        case.kv_buffer,
        case.o,
        case.qo_indptr,
        case.kv_indptr,
        case.kv_indices,
        case.kv_last_page_lens,
        1,
        case.sm_scale,
    )
    return case.o


def providers(case: Case) -> dict[str, Callable[[], Tensor]]:
    # Each case compiles for its own shapes; without the reset the ninth would silently run eagerly.
    torch.compiler.reset()
    compiled = torch.compile(batched, dynamic=False)
    inputs = (case.q, case.kv_buffer, case.kv_indices, case.sm_scale, case.Skv)
    return {
        "naive eager bf16": lambda: batched(*inputs),
        "naive fp32 loop": lambda: looped(case, torch.float32).to(case.q.dtype),
        "naive torch.compile": lambda: compiled(*inputs),
        "mla_compile": lambda: ours(case),
    }


def run_case(case: Case, graph: bool, ceiling: tuple[float, float]) -> list[dict[str, Any]]:
    device = case.q.device
    reference = looped(case, torch.float64)
    plain = max_error(looped(case, case.q.dtype), reference)
    rows: list[dict[str, Any]] = []
    for name, call in providers(case).items():
        case.o.fill_(-1)
        error = max_error(call(), reference)
        capture = graph and name != "naive fp32 loop"  # the loop reads lengths on the host
        times = None
        if within(error, plain):
            times = measure(captured(call) if capture else call, device)
        rows.append(make_row(case, name, "graph" if capture else "eager", times, error, ceiling))
        shape = f"batch {case.B} context {case.Skv} page {case.page_size}"
        result = f"{times.p50:.4f} ms" if times else f"WRONG, not timed: bf16 PyTorch {plain:.2e}"
        say(f"{shape}  {name}: {result}, error {error:.2e}")
    for row in rows:
        for base in rows[:3]:
            known = base["ms"] is not None and row["ms"] is not None
            row[f"vs {base['provider']}"] = base["ms"] / row["ms"] if known else None
    return rows


def make_row(
    case: Case,
    provider: str,
    launch: str,
    times: Times | None,
    error: float,
    ceiling: tuple[float, float],
) -> dict[str, Any]:
    tflops = case.flops / times.p50 * 1e-9 if times else None
    gbs = case.bytes / times.p50 * 1e-6 if times else None
    return {
        "provider": provider,
        "batch": case.B,
        "context": case.Skv,
        "page": case.page_size,
        "heads": case.N,
        "launch": launch,
        "ms": times and times.p50,
        "ms p20": times and times.p20,
        "ms p80": times and times.p80,
        "TFLOP/s": tflops,
        "GB/s": gbs,
        "% matmul": tflops and 100 * tflops / ceiling[0],
        "% copy": gbs and 100 * gbs / ceiling[1],
        "error": error,
    }


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--contexts", type=int, nargs="+")
    parser.add_argument("--pages", type=int, nargs="+", default=[1, 64])
    args = parser.parse_args()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    if args.graph and not gpu:
        parser.error("--graph needs a GPU")
    batches = args.batches or ([128, 1] if gpu else [3, 1])
    contexts = args.contexts or ([512, 1024, 2048, 4096, 8192] if gpu else [64, 200])
    heads, slots = (128, 2_097_152) if gpu else (16, 4096)

    torch.manual_seed(0)
    origin = provenance(device, args.commit)
    ceiling = ceilings(device)
    say(f"{origin['device']}: matmul {ceiling[0]:.4g} TFLOP/s, copy {ceiling[1]:.4g} GB/s")
    pool = torch.randn(slots, LKV + R, dtype=torch.bfloat16, device=device)
    limits = {"matmul TFLOP/s": ceiling[0], "copy GB/s": ceiling[1]}
    rows = [
        row | limits | origin
        for B in batches
        for page_size in args.pages
        for Skv in contexts
        for row in run_case(make_case(B, Skv, page_size, heads, pool), args.graph, ceiling)
    ]
    print(table(rows, [c for c in rows[0] if c not in {"heads", *limits, *origin}]))
    write(args.out, "decode", rows)
    return int(any(row["ms"] is None for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
