"""What reaches Triton's launcher, planned and unplanned, for calls that differ in one thing each.

Run as `python -m tests.launches sm90`, without TRITON_INTERPRET; prints a JSON object.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import Tensor

from bench.host import KERNELS, Inputs, dense, stub
from mla_compile.kernels import decode

B, N, SKV = 2, 32, 256
WORKSPACE = torch.empty(2**24)


def paged(page_size: int) -> dict[str, Any]:
    pages = torch.arange(B + 1, dtype=torch.int32) * (SKV // page_size)
    indices = torch.arange(int(pages[-1]), dtype=torch.int32)
    last = torch.full((B,), page_size, dtype=torch.int32)
    return {"kv_indptr": pages, "kv_indices": indices, "kv_last_page_lens": last}


def pool(inputs: Inputs, page_size: int) -> Inputs:
    q_nope, q_pe, _, _, scale = inputs
    kv = torch.randn(B * SKV // page_size, page_size, 576).bfloat16()
    return q_nope, q_pe, kv[..., :512], kv[..., 512:], scale


def shifted(inputs: Inputs, which: int) -> Inputs:
    """One tensor at an address that is no multiple of 16, all else equal."""
    changed = list(inputs)
    tensor = changed[which]
    assert isinstance(tensor, Tensor)
    room = tensor.new_zeros(tensor.untyped_storage().nbytes() // tensor.element_size() + 8)
    changed[which] = room[1:].as_strided(tensor.shape, tensor.stride(), 1)
    return tuple(changed)  # type: ignore[return-value]


def beyond_2gb(inputs: Inputs) -> Inputs:
    """The caches as part of a buffer that AMD's 32-bit buffer loads do not span."""
    q_nope, q_pe, _, _, scale = inputs
    kv = torch.empty(2**30 + 1, dtype=torch.bfloat16)[: B * SKV * 576].view(B, SKV, 576)
    return q_nope, q_pe, kv[..., :512], kv[..., 512:], scale


def calls() -> dict[str, tuple[Inputs, dict[str, Any]]]:
    inputs = dense(B, N, SKV)
    q_nope, q_pe, kv_c, k_pe, _ = inputs
    mask = torch.ones(B, 1, 1, SKV, dtype=torch.bool)
    lens = torch.full((B,), SKV, dtype=torch.int32)
    return {
        "dense": (inputs, {}),
        "another scale": ((q_nope, q_pe, kv_c, k_pe, 0.2), {}),
        "queries off the grid": (shifted(inputs, 0), {}),
        "rope cache off the grid": (shifted(inputs, 3), {}),
        "separate caches": ((q_nope, q_pe, kv_c.contiguous(), k_pe.contiguous(), 0.1), {}),
        "a buffer beyond 2 GB": (beyond_2gb(inputs), {}),
        "fp16": ((*(t.half() for t in inputs[:4]), 0.1), {}),  # type: ignore[dict-item]
        "a longer cache": ((dense(B, N, 2 * SKV)), {}),
        "lengths": (inputs, {"seq_lens": lens}),
        "lengths as int64": (inputs, {"seq_lens": lens.long()}),
        "bool mask": (inputs, {"attn_mask": mask}),
        "bool mask with a fill": (inputs, {"attn_mask": mask, "mask_fill": -1e9}),
        "float mask": (inputs, {"attn_mask": mask.bfloat16()}),
        "mask of every head": (inputs, {"attn_mask": mask.repeat(1, N, 1, 1)}),
        "soft cap": (inputs, {"logit_cap": 30.0}),
        "scale of the cache": (inputs, {"k_scale": torch.ones(1)}),
        "not split": (inputs, {"num_kv_splits": 1}),
        "three splits": (inputs, {"num_kv_splits": 3}),
        "pages of 1": (pool(inputs, 1), paged(1)),
        "pages of 64": (pool(inputs, 64), paged(64)),
    }


def main() -> None:
    launched: list[Any] = []

    def record(*arguments: Any) -> None:
        x, y, z, _, function, *rest = arguments
        rest = [r.data_ptr() if isinstance(r, Tensor) else r for r in rest[4:]]
        launched.append((x, y, z, function, *rest))

    stub(sys.argv[1], record)
    cases = calls()
    results = {
        name: (torch.empty_like(inputs[0].contiguous()), torch.empty(B, N))
        for name, (inputs, _) in cases.items()
    }

    def launches(name: str) -> list[Any]:
        launched.clear()
        decode.decode(*cases[name], *results[name], WORKSPACE)
        return list(launched)

    alone = {}
    for name in cases:
        decode._plans.clear()
        alone[name] = launches(name)
    decode._plans.clear()
    together = {name: launches(name) for name in cases}
    plans = len(decode._plans)
    for kernel in KERNELS:
        kernel.run = None  # Triton's own launch is out of reach from here
    again = {name: launches(name) for name in cases}
    report = {
        "same": {name: alone[name] == together[name] == again[name] for name in cases},
        "launches": {name: len(alone[name]) for name in cases},
        "binaries": {name: [x[3] for x in alone[name]][:1] for name in cases},
        "plans": plans,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
