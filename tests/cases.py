"""The op's cases: built with poison around everything a call does not own.

Cache slots that no sequence owns, and keys that every row's mask hides, hold NaN; unused entries of
page tables hold absurd numbers; outputs start as NaN. The truth is naive PyTorch in fp64, and the
error allowed is twice what naive PyTorch makes in the case's own dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mla_compile.paged import build_block_table, build_csr
from mla_compile.reference import HIDDEN
from tests.naive import naive_decode

ABSURD = 1 << 30  # a page that does not exist
SHORT = 20  # columns of a mask that ends before its sequences do


@dataclass(frozen=True)
class Case:
    name: str
    lens: tuple[int, ...] = (100, 1, 37, 64)
    queries: tuple[int, ...] | int = 1  # per sequence; an int: uniform, without qo_indptr
    N: int = 3
    Lkv: int = 32
    R: int = 16
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: torch.dtype | None = None
    page_size: int = 16
    paging: str = "csr"  # csr, table, dense (lengths given), whole (every length is page_size)
    index_dtype: torch.dtype = torch.int32
    fused: bool = True  # kv_c and k_pe are slices of one buffer
    causal: bool = True
    mask: str = ""  # see _mask
    mask_fill: float | None = None
    logit_cap: float = 0.0
    scaled: bool = False  # pass q_scale and k_scale
    num_kv_splits: int | None = None
    gpu: bool = True  # False: says nothing on a GPU that another case does not

    def __str__(self) -> str:
        return self.name.replace(" ", "-")


@dataclass
class Problem:
    case: Case
    args: tuple[Any, ...]
    options: dict[str, Any]
    truth: tuple[Tensor, Tensor]
    naive: tuple[Tensor, Tensor] = field(repr=False)

    def to(self, device: str) -> Problem:
        def move(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        if device == "cpu":
            return self
        # One copy for both slices of a fused cache keeps them slices of one buffer.
        args = tuple(map(move, self.args))
        if self.case.fused:
            q = torch.cat(args[:2], -1)
            cache = torch.cat([t.view(torch.uint8) for t in args[2:4]], -1).view(args[2].dtype)
            L = self.case.Lkv
            args = (q[..., :L], q[..., L:], cache[..., :L], cache[..., L:], args[4])
        options = {name: move(value) for name, value in self.options.items()}
        return Problem(self.case, args, options, self.truth, self.naive)


def build(case: Case) -> Problem:
    c, D = case, case.Lkv + case.R
    B = len(c.lens)
    uniform = isinstance(c.queries, int)
    Sqs = [c.queries] * B if isinstance(c.queries, int) else list(c.queries)
    cache_dtype = c.cache_dtype or c.dtype
    width = max(c.lens, default=0)
    page_size = {"csr": c.page_size, "table": c.page_size, "dense": width + 11, "whole": width}[
        c.paging
    ]

    keys = [torch.randn(n, D).to(cache_dtype) for n in c.lens]
    queries = [torch.randn(s, c.N, D).to(c.dtype) for s in Sqs]
    masks = [_mask(c, b, Sqs[b], n) for b, n in enumerate(c.lens)] if c.mask else None
    cache, paging = _page(c, keys, masks, max(page_size, 1))
    q = torch.cat([*queries, torch.empty(0, c.N, D, dtype=c.dtype)])
    halves = (q[..., : c.Lkv], q[..., c.Lkv :], cache[..., : c.Lkv], cache[..., c.Lkv :])
    if not c.fused:
        halves = tuple(t.contiguous() for t in halves)  # type: ignore[assignment]

    options = dict(paging, causal=c.causal, logit_cap=c.logit_cap, num_kv_splits=c.num_kv_splits)
    options["max_seqlen_q"] = max(Sqs, default=1)
    if not uniform:
        starts = [0, *torch.tensor(Sqs).cumsum(0).tolist()]
        options["qo_indptr"] = torch.tensor(starts, dtype=c.index_dtype)
    if masks is not None:
        capacity = (
            page_size if c.paging in ("dense", "whole") else -(-width // page_size) * page_size
        )
        options["attn_mask"] = _stack(c, masks, max(Sqs), capacity)
        options["mask_fill"] = c.mask_fill
    q_scale, k_scale = (0.75, 1.5) if c.scaled else (1.0, 1.0)
    if c.scaled:
        options["q_scale"], options["k_scale"] = torch.tensor([q_scale]), torch.tensor(k_scale)

    sm_scale = D**-0.5

    def oracle(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if not keys:
            return torch.empty(0, c.N, c.Lkv), torch.empty(0, c.N)
        return naive_decode(
            [t.to(dtype) for t in queries],
            [t.to(dtype) for t in keys],
            c.Lkv,
            sm_scale * q_scale * k_scale,
            causal=c.causal,
            masks=masks,
            mask_fill=-math.inf if c.mask_fill is None else c.mask_fill,
            logit_cap=c.logit_cap,
            v_scale=k_scale,
        )

    own = c.dtype if c.dtype.itemsize > 1 else torch.bfloat16
    return Problem(c, (*halves, sm_scale), options, oracle(torch.float64), oracle(own))


def outputs(problem: Problem, device: str = "cpu") -> tuple[Tensor, Tensor]:
    T, N, Lkv = problem.args[0].shape
    dtype = problem.case.dtype if problem.case.dtype.itemsize > 1 else torch.bfloat16
    return (
        torch.full((T, N, Lkv), math.nan, dtype=dtype, device=device),
        torch.full((T, N), math.nan, device=device),
    )


def assert_right(problem: Problem, out: Tensor, lse: Tensor) -> None:
    for name, got, truth, naive in zip(
        ("out", "lse"), (out, lse), problem.truth, problem.naive, strict=True
    ):
        got = got.cpu().double()
        assert got.shape == truth.shape
        # Rows without a visible key, or with nothing but finite fills, must be so in place;
        # their lse is -inf or a fill, which no tolerance applies to.
        low = truth <= HIDDEN
        assert torch.equal(got == -math.inf, truth == -math.inf), f"{name}: -inf out of place"
        assert bool((got[low] <= HIDDEN).all()), f"{name}: a masked row has a score"
        got, truth, naive = got[~low], truth[~low], naive.double()[~low]
        if truth.numel() == 0:
            continue
        # Where plain PyTorch happens to be exact, one rounding of the largest value is allowed.
        rounding = torch.finfo(out.dtype if name == "out" else torch.float32).eps
        allowed = max(2 * _error(naive, truth), rounding * truth.abs().max().item())
        assert _error(got, truth) <= allowed, f"{name}: {_error(got, truth)} > {allowed}"


def _error(got: Tensor, truth: Tensor) -> float:
    error = (got - truth).abs().max().item()
    return math.inf if math.isnan(error) else error


def _page(
    c: Case, keys: list[Tensor], masks: list[Tensor] | None, page_size: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """A NaN cache with the keys scattered in it, and the paging options that find them."""
    counts = [-(-len(k) // page_size) for k in keys]
    dense = c.paging in ("dense", "whole")
    pool = len(keys) if dense else sum(counts) + 3
    order = list(range(pool)) if dense else torch.randperm(pool).tolist()
    pages, taken = [], 0
    for b, count in enumerate(counts):
        pages.append([b] if dense else order[taken : taken + count])
        taken += count
    cache = torch.full((pool, page_size, c.Lkv + c.R), math.nan).to(
        keys[0].dtype if keys else c.dtype
    )
    for b, k in enumerate(keys):
        for j, page in enumerate(pages[b]):
            part = k[j * page_size : (j + 1) * page_size]
            cache[page, : len(part)] = part
    if c.mask == "holes" and masks is not None:
        for b, mask in enumerate(masks):
            for j in (~mask.flatten(0, 1).any(0)).nonzero().flatten().tolist():
                cache[pages[b][j // page_size], j % page_size] = math.nan

    lens = [len(k) for k in keys]
    if c.paging == "whole":
        return cache, {}
    if c.paging == "dense":
        return cache, {"seq_lens": torch.tensor(lens, dtype=c.index_dtype)}
    if c.paging == "table":
        table = build_block_table(pages, fill=ABSURD, dtype=c.index_dtype)
        return cache, {"block_table": table, "seq_lens": torch.tensor(lens, dtype=c.index_dtype)}
    indptr, indices, last = build_csr(pages, lens, page_size, dtype=c.index_dtype)
    indices = torch.cat([indices, torch.full((5,), ABSURD, dtype=c.index_dtype)])
    return cache, {"kv_indptr": indptr, "kv_indices": indices, "kv_last_page_lens": last}


def _mask(c: Case, b: int, Sq: int, n: int) -> Tensor:
    """The mask of one sequence, [1 or N, 1 or Sq, n]."""
    low = torch.finfo(c.dtype).min
    length = torch.arange(n) < max(n * 2 // 3, 1)
    some = torch.rand(c.N, Sq, n) < 0.5
    some[..., 0] = True
    nothing = torch.zeros(1, 1, n, dtype=torch.bool)
    return {
        "length": length.expand(1, 1, n),
        "left padded": (torch.arange(n) >= n // 3).expand(1, 1, n),
        "holes": ((torch.arange(n) // 16 % 3 == 1) | (torch.arange(n) == n - 1)).expand(1, 1, n),
        "short": (torch.arange(n) < SHORT).expand(1, 1, n),
        "per head": some[:, :1],
        "per query": some[:1],
        "per row": some,
        "nothing": nothing,
        "nothing per row": nothing.expand(c.N, Sq, n),
        "nothing for one": nothing if b == 0 else length.expand(1, 1, n),
        "one column": nothing if b == 0 else ~nothing,
        "additive": torch.randn(c.N, Sq, n).to(c.dtype),
        "additive per key": torch.randn(1, 1, n).to(c.dtype),
        "additive -inf": torch.where(some, 0.0, -math.inf).to(c.dtype),
        "additive lowest": torch.where(length, 0.0, low).expand(1, 1, n).to(c.dtype),
        "additive lowest per row": torch.where(some, 0.0, low).to(c.dtype),
        "additive lowest everywhere": torch.full((1, 1, n), low).to(c.dtype),
        "additive lowest but last": torch.where(torch.arange(n) == n - 1, 0.0, low)
        .expand(1, 1, n)
        .to(c.dtype),
        "additive lowest and -inf": torch.where(length, low, -math.inf).expand(1, 1, n).to(c.dtype),
    }[c.mask]


def _stack(c: Case, masks: list[Tensor], Sq: int, capacity: int) -> Tensor:
    """[B, 1 or N, 1 or Sq, capacity]; where no key stands the mask says "attend"."""
    if c.mask == "one column":
        return torch.stack([m[..., :1] for m in masks])
    rows = masks[0].shape[1] if masks[0].shape[1] == 1 else Sq
    full = torch.zeros(len(masks), masks[0].shape[0], rows, capacity, dtype=masks[0].dtype)
    if full.dtype == torch.bool:
        full.fill_(True)
    for b, m in enumerate(masks):
        full[b, :, : m.shape[1], : m.shape[2]] = m
    if c.mask == "short":
        full[..., SHORT:] = True  # past its columns: not the mask's to say
        full = full[..., :SHORT]
    return full


CASES = [
    *[Case(f"pages of {n}", page_size=n) for n in (1, 16, 64, 37)],
    *[Case(f"block table of pages of {n}", page_size=n, paging="table") for n in (1, 64, 37)],
    Case("dense cache with lengths", paging="dense"),
    Case("dense cache that is full", paging="whole", lens=(70, 70)),
    Case("dense cache of one sequence", paging="whole", lens=(130,)),
    Case("int64 indices", index_dtype=torch.int64, queries=(1, 2, 1, 0)),
    Case("int64 block table", index_dtype=torch.int64, paging="table"),
    Case("two separate buffers", fused=False),
    *[Case(f"{n} heads", N=n, gpu=n in (1, 63, 128)) for n in (1, 3, 8, 12, 16, 63, 128)],
    Case("dims 16 and 8", Lkv=16, R=8),
    Case("dims 24 and 8, not powers of two", Lkv=24, R=8, num_kv_splits=2),
    Case("dims 256 and 32", Lkv=256, R=32, N=16),
    *[
        Case(f"dims 512 and {R}, {name}", Lkv=512, R=R, N=16, dtype=dtype, lens=(130, 5))
        for R in (64, 0)
        for name, dtype in (
            ("bf16", torch.bfloat16),
            ("fp16", torch.float16),
            ("fp32", torch.float32),
        )
    ],
    Case("64 rows of 512 and 64", Lkv=512, R=64, N=128, lens=(150,), paging="whole"),
    Case("fp16", dtype=torch.float16),
    Case("fp32", dtype=torch.float32),
    *[Case(f"{n} splits", num_kv_splits=n) for n in (1, 2, 7)],
    Case("more splits than tiles", num_kv_splits=64),
    Case("splits that the heuristic chooses", lens=(300,), N=1),
    Case("zero-length sequences", lens=(0, 33, 0)),
    Case("zero-length sequences, split", lens=(0, 33, 0), num_kv_splits=3, paging="table"),
    Case("nothing but zero-length sequences", lens=(0, 0), page_size=1),
    Case("empty batch", lens=(), queries=()),
    Case("empty batch of a block table", lens=(), queries=(), paging="table"),
    Case("four query tokens", queries=4),
    Case("four query tokens of 16 heads fill a block", queries=4, N=16, Lkv=512, R=64),
    Case("four query tokens, all see all", queries=4, causal=False),
    Case("seventeen query tokens", queries=17, lens=(100, 1, 37), num_kv_splits=2),
    Case("ragged query tokens", queries=(3, 1, 5, 2)),
    Case("ragged query tokens, split", queries=(3, 1, 5, 2), num_kv_splits=3),
    Case("ragged query tokens, some none", queries=(0, 2, 0, 4), paging="table"),
    Case("more query tokens than keys", queries=(3, 4, 1, 2), lens=(1, 2, 0, 40)),
    Case("more query tokens than keys, split", queries=4, lens=(1, 2, 0, 40), num_kv_splits=2),
    *[
        Case(f"mask: {name}", mask=name, dtype=dtype, queries=queries, num_kv_splits=splits)
        for name, dtype, queries, splits in (
            ("length", torch.bfloat16, 1, None),
            ("left padded", torch.bfloat16, 1, 2),
            ("holes", torch.bfloat16, 1, 2),
            ("per head", torch.bfloat16, 1, None),
            ("per query", torch.bfloat16, 3, 2),
            ("per row", torch.bfloat16, (2, 1, 3, 2), None),
            ("nothing", torch.bfloat16, 1, 2),
            ("nothing per row", torch.bfloat16, 3, 2),
            ("nothing for one", torch.bfloat16, 1, None),
            ("one column", torch.bfloat16, 1, None),
            ("additive", torch.bfloat16, 3, 2),
            ("additive per key", torch.float32, 1, 2),
            ("additive -inf", torch.bfloat16, 2, None),
            ("additive lowest", torch.bfloat16, 1, 3),
            ("additive lowest per row", torch.float32, 2, 3),
            ("additive lowest everywhere", torch.float32, 1, 3),
            ("additive lowest and -inf", torch.bfloat16, 1, None),
        )
    ],
    Case("mask: length under causal", mask="length", queries=3),
    Case("mask: only the last key, under causal", mask="additive lowest but last", queries=3),
    Case("mask: keys past its columns are hidden", mask="short", num_kv_splits=2),
    Case(
        "mask: filled holes are not read", mask="holes", mask_fill=torch.finfo(torch.bfloat16).min
    ),
    Case("mask: dense cache", mask="length", paging="dense"),
    Case("mask: fp16 lowest is an ordinary score", mask="additive lowest", dtype=torch.float16),
    *[
        Case(f"mask: {name}, filled with {fill:.3g}", mask=name, mask_fill=fill, num_kv_splits=2)
        for name in ("length", "nothing", "nothing per row")
        for fill in (-5.0, torch.finfo(torch.bfloat16).min)
    ],
    Case(
        "mask: one row sees nothing, filled",
        mask="nothing for one",
        mask_fill=torch.finfo(torch.float32).min,
        dtype=torch.float32,
        queries=2,
    ),
    Case("soft cap", logit_cap=2.0, num_kv_splits=2),
    Case("soft cap in fp32", logit_cap=30.0, dtype=torch.float32),
    Case("soft cap under a mask", logit_cap=2.0, mask="additive lowest", dtype=torch.float32),
    Case("scales without fp8", scaled=True, dtype=torch.float32),
    *[
        Case(f"{name} cache under bf16", cache_dtype=dtype, scaled=True, num_kv_splits=2)
        for name, dtype in (("e4m3fn", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2))
    ],
    Case("fp8 cache under fp16", cache_dtype=torch.float8_e4m3fn, dtype=torch.float16),
    Case("fp8 query and cache", dtype=torch.float8_e4m3fn, scaled=True),
    Case("e4m3fnuz cache", cache_dtype=torch.float8_e4m3fnuz, scaled=True, gpu=False),
]
