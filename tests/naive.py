"""Naive MLA decode: gather the keys of each sequence, one matmul, softmax, one matmul.

Independent of the package on purpose, and in whatever dtype it is given: in fp64 it is the truth
the tests compare with, in the tested dtype it is the error they allow twice of.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_decode(
    queries: list[Tensor],  # per sequence [Sq, N, Lkv + R]
    keys: list[Tensor],  # per sequence [Skv, Lkv + R]
    Lkv: int,
    scale: float,
    *,
    causal: bool = True,
    masks: list[Tensor] | None = None,  # per sequence, broadcasts to [N, Sq, Skv]
    mask_fill: float = float("-inf"),
    logit_cap: float = 0.0,
    v_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """out [T, N, Lkv] and lse [T, N], both in the dtype of the queries."""
    outs, lses = [], []
    for b, (q, k) in enumerate(zip(queries, keys, strict=True)):
        score = torch.einsum("tnd,sd->nts", q, k) * scale
        if logit_cap > 0:
            score = logit_cap * torch.tanh(score / logit_cap)
        if masks is not None:
            mask = masks[b].expand(score.shape)
            if mask.dtype == torch.bool:
                fill = (
                    max(mask_fill, torch.finfo(score.dtype).min) if mask_fill > -1e300 else -1e999
                )
                score = torch.where(mask, score, fill)
            else:
                score = score + mask.to(score.dtype)
        if causal:
            token = torch.arange(q.shape[0])[:, None]
            hidden = torch.arange(k.shape[0]) > token + (k.shape[0] - q.shape[0])
            score = score.masked_fill(hidden, float("-inf"))
        lse = score.logsumexp(-1)  # [N, Sq]
        prob = score.softmax(-1).nan_to_num()  # a row with no visible key: 0/0, by convention 0
        outs.append(torch.einsum("nts,sd->tnd", prob, k[:, :Lkv]) * v_scale)
        lses.append(lse.T)
    return torch.cat(outs), torch.cat(lses)
