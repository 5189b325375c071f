"""Other MLA decode kernels on the same inputs, where the user has them. Nothing of them is here.

    python -m bench.decode --compare aiter,flashinfer,flash_mla,vllm
    python -m bench.decode --peer my_package.my_module:my_function

A `--peer` is called as AITER's mla_decode_fwd: eight tensors and ints by position, sm_scale by
name, page_size by name if it takes one; it writes `o`. What a peer needs once for all layers of a
step, a plan or the tile schedule, is made outside the time, as engines make it.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.case import LKV, Case, R

Call = Callable[[], Tensor]


def aiter_like(function: Callable[..., Any], case: Case) -> Call:
    named: dict[str, Any] = {"sm_scale": case.sm_scale}
    if "page_size" in inspect.signature(function).parameters:
        named["page_size"] = case.shape.page_size

    def call() -> Tensor:
        function(
            case.q,
            case.kv_buffer,
            case.o,
            case.qo_indptr,
            case.kv_indptr,
            case.kv_indices,
            case.kv_last_page_lens,
            case.shape.Sq,
            **named,
        )
        return case.o

    return call


def aiter(case: Case) -> Call:
    return aiter_like(importlib.import_module("aiter.mla").mla_decode_fwd, case)


def flashinfer(case: Case) -> Call:
    mla = importlib.import_module("flashinfer.mla")
    workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=case.q.device)
    wrapper = mla.BatchMLAPagedAttentionWrapper(workspace)
    wrapper.plan(
        case.qo_indptr,
        case.kv_indptr,
        case.kv_indices,
        case.seq_lens,
        case.shape.N,
        LKV,
        R,
        case.shape.page_size,
        True,
        case.sm_scale,
        case.q.dtype,
        case.kv_buffer.dtype,
    )
    q_nope, q_pe = case.q.split([LKV, R], -1)
    kv_c, k_pe = case.kv_buffer.squeeze(2).split([LKV, R], -1)
    return lambda: wrapper.run(q_nope, q_pe, kv_c, k_pe, out=case.o)


def flash_mla(case: Case) -> Call:
    module = importlib.import_module("flash_mla")
    shape = case.shape
    schedule = module.get_mla_metadata(case.seq_lens, shape.Sq * shape.N, 1)
    q = case.q.view(shape.B, shape.Sq, shape.N, LKV + R)

    def call() -> Tensor:
        out: Tensor = module.flash_mla_with_kvcache(
            q,
            case.kv_buffer,
            case.block_table,
            case.seq_lens,
            LKV,
            *schedule,
            softmax_scale=case.sm_scale,
            causal=True,
        )[0]
        return out.flatten(0, 1)

    return call


def vllm(case: Case) -> Call:
    """The Triton kernel of its TRITON_MLA backend, with that backend's four splits."""
    ops = importlib.import_module("vllm.v1.attention.ops.triton_decode_attention")
    shape, splits = case.shape, 4
    if shape.Sq > 1:
        raise ValueError(f"expected one query a sequence, got {shape.Sq}.")
    partial = case.q.new_empty(shape.B, shape.N, splits, LKV + 1, dtype=torch.float32)
    lse = case.q.new_empty(shape.B, shape.N)

    def call() -> Tensor:
        ops.decode_attention_fwd(
            case.q,
            case.kv_buffer,
            case.kv_buffer[..., :LKV],
            case.o,
            lse,
            case.block_table,
            case.seq_lens,
            partial,
            splits,
            case.sm_scale,
            shape.page_size,
        )
        return case.o

    return call


KNOWN: dict[str, Callable[[Case], Call]] = {
    "aiter": aiter,
    "flashinfer": flashinfer,
    "flash_mla": flash_mla,
    "vllm": vllm,
}


def find(names: str, paths: list[str]) -> tuple[dict[str, Callable[[Case], Call]], list[str]]:
    """Peers by name, in the order asked for, and which of `names` are not installed."""
    asked = [name for name in names.split(",") if name]
    unknown = [name for name in asked if name not in KNOWN]
    if unknown:
        raise ValueError(f"--compare: expected {', '.join(KNOWN)}, got {', '.join(unknown)}.")
    missing = [name for name in asked if importlib.util.find_spec(name) is None]
    found = {name: KNOWN[name] for name in asked if name not in missing}
    return found | {path: _load(path) for path in paths}, missing


def _load(path: str) -> Callable[[Case], Call]:
    module, colon, function = path.partition(":")
    if not colon:
        raise ValueError(f"--peer: expected module:function, got {path}.")
    loaded = getattr(importlib.import_module(module), function)
    return lambda case: aiter_like(loaded, case)
