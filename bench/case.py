"""A batch of MLA decode, its inputs in AITER's layout, and attention on it in naive PyTorch."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

LKV, R = 512, 64
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _even(B: int, Skv: int) -> list[int]:
    return [Skv] * B


def _log_uniform(B: int, Skv: int) -> list[int]:
    """From Skv / 256 to Skv, each doubling as often as any other; in no order."""
    lens = [round(Skv * 256 ** -((b + 0.5) / B)) for b in range(B)]
    random.Random(0).shuffle(lens)
    return lens


def _one_long(B: int, Skv: int) -> list[int]:
    """The last to start is the longest, which is the worst for a grid in order."""
    return [-(-Skv // 64)] * (B - 1) + [Skv]


LENGTHS: dict[str, Callable[[int, int], list[int]]] = {
    "even": _even,
    "log-uniform": _log_uniform,
    "one long": _one_long,
}
SPREAD = ", spread"  # as many tokens in all, the same for each sequence


@dataclass(frozen=True)
class Shape:
    """What is measured; the symbols of the README."""

    B: int
    Skv: int  # of the longest sequence; "spread" has the same sum
    page_size: int = 64
    N: int = 128
    Sq: int = 1
    dtype: str = "bf16"
    lengths: str = "even"

    @property
    def lens(self) -> list[int]:
        lens = LENGTHS[self.lengths.removesuffix(SPREAD)](self.B, self.Skv)
        if not self.lengths.endswith(SPREAD):
            return lens
        each, more = divmod(sum(lens), self.B)
        return [each + (b < more) for b in range(self.B)]

    @property
    def flops(self) -> int:
        # Query i of a sequence sees all keys but the Sq - 1 - i that come after it.
        seen = sum(self.Sq * length - self.Sq * (self.Sq - 1) // 2 for length in self.lens)
        scores = 2 * self.N * seen * (LKV + R)  # q_nope·kv_c + q_pe·k_pe
        output = 2 * self.N * seen * LKV  # probabilities times latent
        return scores + output

    @property
    def bytes(self) -> int:
        cache = sum(self.lens) * (LKV + R)  # every visible latent once, for all heads
        q = self.B * self.Sq * self.N * (LKV + R)
        out = self.B * self.Sq * self.N * LKV
        return 2 * (cache + q + out)

    def __str__(self) -> str:
        parts = [f"batch {self.B} context {max(self.lens)} page {self.page_size} heads {self.N}"]
        parts += [f"Sq {self.Sq}"] * (self.Sq > 1) + [self.dtype] * (self.dtype != "bf16")
        parts += [self.lengths] * (self.lengths != "even")
        return " ".join(parts)


@dataclass(frozen=True)
class Case:
    """The inputs of one shape, T = B * Sq."""

    shape: Shape
    sm_scale: float
    q: Tensor  # [T, N, LKV + R]
    kv_buffer: Tensor  # [pages, page_size, 1, LKV + R]
    o: Tensor  # [T, N, LKV]
    qo_indptr: Tensor  # [B + 1]
    kv_indptr: Tensor  # [B + 1], in pages
    kv_indices: Tensor  # [kv_indptr[-1]]
    kv_last_page_lens: Tensor  # [B]
    block_table: Tensor  # [B, most pages of a sequence], the same pages
    seq_lens: Tensor  # [B]


def make_case(shape: Shape, pool: Tensor) -> Case:
    """Sequences whose pages lie at random places of the pool [slots, LKV + R], no page twice.

    The tutorial draws its slots with replacement. At half of a full pool a fifth of what is drawn
    so is shared, which no cache does and which asks less of memory than `bytes` says.
    """
    device, B = pool.device, shape.B
    kv_buffer = pool.view(-1, shape.page_size, 1, LKV + R)
    lens = shape.lens
    counts = [-(-length // shape.page_size) for length in lens]
    if sum(counts) > len(kv_buffer):
        raise ValueError(f"{shape}: expected at most {len(kv_buffer)} pages, got {sum(counts)}.")

    def ints(values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    kv_indices = torch.randperm(len(kv_buffer), device=device)[: sum(counts)].int()
    rows = kv_indices.split(counts)
    last = [n - (count - 1) * shape.page_size for n, count in zip(lens, counts, strict=True)]
    T = B * shape.Sq
    return Case(
        shape=shape,
        sm_scale=128**-0.5,  # as the tutorial calls it
        q=torch.randn(T, shape.N, LKV + R, dtype=pool.dtype, device=device),
        kv_buffer=kv_buffer,
        o=torch.empty(T, shape.N, LKV, dtype=pool.dtype, device=device),
        qo_indptr=ints(range(0, T + 1, shape.Sq)),
        kv_indptr=ints([0, *accumulate(counts)]),
        kv_indices=kv_indices,
        kv_last_page_lens=ints(last),
        block_table=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
        seq_lens=ints(lens),
    )


def visible(case: Case) -> Tensor | None:
    """[B, Sq, 1, Skv], or None where every query sees every key."""
    lens, Sq = case.shape.lens, case.shape.Sq
    if Sq == 1 and min(lens) == max(lens):
        return None
    device = case.q.device
    last = case.seq_lens[:, None] - Sq + torch.arange(Sq, device=device)  # [B, Sq]
    return torch.arange(max(lens), device=device) <= last[:, :, None, None]


def batched(
    q: Tensor,  # [B, Sq, N, LKV + R]
    kv_buffer: Tensor,
    block_table: Tensor,
    keep: Tensor | None,
    sm_scale: float,
    Skv: int,
) -> Tensor:
    """Naive PyTorch for all sequences at once: gather, two contractions, softmax in fp32."""
    kv = kv_buffer[block_table].flatten(1, 3)[:, :Skv]  # [B, Skv, LKV + R]
    scores = torch.einsum("bqnd,bsd->bqns", q, kv) * sm_scale
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    p = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.einsum("bqns,bsl->bqnl", p, kv[..., :LKV]).flatten(0, 1)


def looped(case: Case, dtype: torch.dtype) -> Tensor:
    """AITER's test reference: one sequence at a time, in dtype throughout."""
    outs, Sq = [], case.shape.Sq
    for b, length in enumerate(case.shape.lens):
        pages = case.block_table[b, : -(-length // case.shape.page_size)]
        kv = case.kv_buffer.index_select(0, pages).flatten(0, 2)[:length].to(dtype)
        q = case.q[b * Sq : (b + 1) * Sq].to(dtype)
        scores = torch.einsum("qnd,sd->qns", q, kv) * case.sm_scale
        if Sq > 1:
            keep = torch.ones(Sq, length, dtype=torch.bool, device=q.device)
            scores.masked_fill_(~keep.tril(length - Sq)[:, None], float("-inf"))
        outs.append(torch.einsum("qns,sl->qnl", torch.softmax(scores, dim=-1), kv[:, :LKV]))
    return torch.cat(outs)


def batched_bytes(shape: Shape) -> int:
    """Roughly what `batched` takes: the gathered cache twice, scores in bf16, fp32 and bf16."""
    columns = shape.B * max(shape.lens)
    return columns * (2 * 2 * (LKV + R) + 14 * shape.Sq * shape.N)
