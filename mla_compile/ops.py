"""The operators: schema, fake, CPU, GPU, in that order.

`Library.define` + `impl` costs 2.7 µs a call where `custom_op` costs 10-37 (torch 2.11-2.15). The
schema grammar has no infinity, so mask_fill=None stands for -inf. Kernels are imported at the first
call on a GPU: importing this module imports no Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mla_compile.contents import refuse
from mla_compile.reference import mla_decode_reference
from mla_compile.validate import (
    check_dtypes,
    check_out,
    check_rank,
    check_tensors,
    output_dtype,
    validate,
)

_INPUTS = "Tensor q_nope, Tensor q_pe, Tensor kv_c, Tensor k_pe, float sm_scale"
_OPTIONS = (
    "Tensor? kv_indptr=None, Tensor? kv_indices=None, Tensor? kv_last_page_lens=None, "
    "Tensor? block_table=None, Tensor? seq_lens=None, "
    "Tensor? qo_indptr=None, SymInt max_seqlen_q=1, bool causal=True, "
    "Tensor? attn_mask=None, float? mask_fill=None, float logit_cap=0.0, "
    "Tensor? q_scale=None, Tensor? k_scale=None, SymInt? num_kv_splits=None"
)
_OUTPUTS = "Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? workspace=None"
_AITER = (
    "Tensor q, Tensor kv_buffer, Tensor(a!) o, Tensor qo_indptr, Tensor kv_indptr, "
    "Tensor kv_indices, Tensor kv_last_page_lens, SymInt max_seqlen_q, float? sm_scale=None, "
    "float logit_cap=0.0, SymInt? num_kv_splits=None, *, SymInt? page_size=None, "
    "SymInt nhead_kv=1, Tensor? q_scale=None, Tensor? kv_scale=None, bool causal=True"
)

_AITERS_NAMES = {"k_scale": "kv_scale", "kv_c": "kv_buffer", "q_nope": "q", "out": "o"}

# Rows are of consecutive features: Inductor must not choose other strides.
_TAGS = (torch.Tag.needs_exact_strides,)

_library = torch.library.Library("mla_compile", "DEF")
_library.define(f"mla_decode({_INPUTS}, *, {_OPTIONS}) -> (Tensor out, Tensor lse)", tags=_TAGS)
_library.define(f"mla_decode_out({_INPUTS}, *, {_OPTIONS}, {_OUTPUTS}) -> ()", tags=_TAGS)
_library.define(f"mla_decode_fwd({_AITER}) -> Tensor lse", tags=_TAGS)


def _empty_outputs(q_nope: Tensor) -> tuple[Tensor, Tensor]:
    T, N, _ = q_nope.shape
    return (
        q_nope.new_empty(q_nope.shape, dtype=output_dtype(q_nope.dtype)),
        q_nope.new_empty((T, N), dtype=torch.float32),
    )


def _decode_fake(
    q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, sm_scale: float, **options: Any
) -> tuple[Tensor, Tensor]:
    check_tensors(q_nope, q_pe, kv_c, k_pe)
    return _empty_outputs(q_nope)


def _decode_out_fake(*inputs: Any, **options: Any) -> None:
    check_tensors(*inputs[:4])


def _fwd_fake(q: Tensor, kv_buffer: Tensor, o: Tensor, *args: Any, **options: Any) -> Tensor:
    _check_fused(q, kv_buffer, o)
    return q.new_empty(q.shape[:2], dtype=torch.float32)


torch.library.register_fake("mla_compile::mla_decode", _decode_fake, lib=_library)
torch.library.register_fake("mla_compile::mla_decode_out", _decode_out_fake, lib=_library)
torch.library.register_fake("mla_compile::mla_decode_fwd", _fwd_fake, lib=_library)


def _run_cpu(
    inputs: tuple[Any, ...],
    options: dict[str, Any],
    out: Tensor | None = None,
    lse: Tensor | None = None,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    call = validate(*inputs, **options, out=out, lse=lse, workspace=workspace)
    fresh_out, fresh_lse = _empty_outputs(call.q_nope)
    out, lse = fresh_out if out is None else out, fresh_lse if lse is None else lse
    with torch.autocast("cpu", enabled=False):
        mla_decode_reference(call, out, lse)
    return out, lse


def _run_gpu(*args: Any, **outputs: Any) -> tuple[Tensor, Tensor]:
    from mla_compile.kernels.decode import decode

    return decode(*args, **outputs)


def _register(key: str, run: Callable[..., tuple[Tensor, Tensor]]) -> None:
    def decode(
        q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, sm_scale: float, **options: Any
    ) -> tuple[Tensor, Tensor]:
        return run((q_nope, q_pe, kv_c, k_pe, sm_scale), options)

    def decode_out(
        q_nope: Tensor,
        q_pe: Tensor,
        kv_c: Tensor,
        k_pe: Tensor,
        sm_scale: float,
        *,
        out: Tensor,
        lse: Tensor,
        workspace: Tensor | None = None,
        **options: Any,
    ) -> None:
        if out is None or lse is None:
            name = "out" if out is None else "lse"
            refuse(name, "a tensor to write to", None, "mla_decode allocates both.")
        run((q_nope, q_pe, kv_c, k_pe, sm_scale), options, out, lse, workspace)

    def decode_fwd(
        q: Tensor,
        kv_buffer: Tensor,
        o: Tensor,
        qo_indptr: Tensor,
        kv_indptr: Tensor,
        kv_indices: Tensor,
        kv_last_page_lens: Tensor,
        max_seqlen_q: int,
        sm_scale: float | None = None,
        logit_cap: float = 0.0,
        num_kv_splits: int | None = None,
        *,
        page_size: int | None = None,
        nhead_kv: int = 1,
        q_scale: Tensor | None = None,
        kv_scale: Tensor | None = None,
        causal: bool = True,
    ) -> Tensor:
        _check_fused(q, kv_buffer, o)
        _check_fused_sizes(q, kv_buffer, o, page_size, nhead_kv)
        Lkv, width = o.shape[2], q.shape[2]
        q_nope, q_pe = q.split_with_sizes((Lkv, width - Lkv), -1)
        kv_c, k_pe = kv_buffer.squeeze(2).split_with_sizes((Lkv, width - Lkv), -1)
        scale = width**-0.5 if sm_scale is None else sm_scale
        options = {
            "kv_indptr": kv_indptr,
            "kv_indices": kv_indices,
            "kv_last_page_lens": kv_last_page_lens,
            "qo_indptr": qo_indptr,
            "max_seqlen_q": max_seqlen_q,
            "causal": causal,
            "logit_cap": logit_cap,
            "q_scale": q_scale,
            "k_scale": kv_scale,
            "num_kv_splits": num_kv_splits,
        }
        try:
            return run((q_nope, q_pe, kv_c, k_pe, scale), options, o)[1]
        except ValueError as error:
            ours, _, rest = str(error).partition(":")
            raise ValueError(f"{_AITERS_NAMES.get(ours, ours)}:{rest}") from None

    _library.impl("mla_decode", decode, key)
    _library.impl("mla_decode_out", decode_out, key)
    _library.impl("mla_decode_fwd", decode_fwd, key)


def _check_fused(q: Tensor, kv_buffer: Tensor, o: Tensor) -> None:
    """Ranks and dtypes of AITER's call: all that may be asked of fake tensors."""
    for name, tensor, shape in (
        ("q", q, "[T, N, Lkv + R]"),
        ("kv_buffer", kv_buffer, "[pages, page_size, 1, Lkv + R]"),
        ("o", o, "[T, N, Lkv]"),
    ):
        check_rank(name, tensor, shape)
    check_dtypes("q", q, "kv_buffer", kv_buffer)


def _check_fused_sizes(
    q: Tensor, kv_buffer: Tensor, o: Tensor, page_size: int | None, nhead_kv: int
) -> None:
    T, N, width = q.shape
    if kv_buffer.shape[3] != width:
        refuse("kv_buffer", f"last dim {width} as q has", kv_buffer.shape[3], "Use one Lkv + R.")
    if kv_buffer.shape[2] != 1 or nhead_kv != 1:
        refuse(
            "kv_buffer" if nhead_kv == 1 else "nhead_kv",
            "one KV head: MLA's latent is shared by all heads",
            kv_buffer.shape[2] if nhead_kv == 1 else nhead_kv,
            "View the cache as [pages, page_size, 1, Lkv + R].",
        )
    if page_size is not None and page_size != kv_buffer.shape[1]:
        refuse("page_size", f"kv_buffer.shape[1] = {kv_buffer.shape[1]}", page_size, "Drop it.")
    if o.shape[2] > width:
        refuse("o", f"a last dim Lkv of at most {width}", o.shape[2], "Allocate o as [T, N, Lkv].")
    for name, tensor in (("q", q), ("kv_buffer", kv_buffer)):
        if tensor.stride(-1) != 1:
            refuse(name, "stride 1 in the last dim", tensor.stride(), f"Pass {name}.contiguous().")
    check_out("o", o, (T, N, o.shape[2]), output_dtype(q.dtype), q.device)


_register("CPU", _run_cpu)
_register("CUDA", _run_gpu)  # ROCm dispatches on the CUDA key


def mla_decode(
    q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, sm_scale: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """Decode attention over a paged latent cache: (out [T,N,Lkv], lse [T,N]).

    `options` are those of `torch.ops.mla_compile.mla_decode`: paging by kv_indptr, kv_indices and
    kv_last_page_lens, by block_table and seq_lens, or dense; qo_indptr and max_seqlen_q; causal;
    attn_mask and mask_fill; logit_cap; q_scale and k_scale; num_kv_splits, equally many for each
    sequence, None to choose: on Hopper and CDNA by the lengths, so that all units have as much.
    There is no backward.

    >>> q, cache = torch.randn(2, 4, 48), torch.randn(2, 100, 48)  # 2 sequences of 100 tokens
    >>> out, lse = mla_decode(q[..., :32], q[..., 32:], cache[..., :32], cache[..., 32:], 0.1)
    >>> out.shape, lse.shape
    (torch.Size([2, 4, 32]), torch.Size([2, 4]))
    """
    result: tuple[Tensor, Tensor] = torch.ops.mla_compile.mla_decode.default(
        q_nope, q_pe, kv_c, k_pe, sm_scale, **options
    )
    return result


def mla_decode_fwd(
    q: Tensor,  # [T, N, Lkv + R]
    kv_buffer: Tensor,  # [pages, page_size, 1, Lkv + R]
    o: Tensor,  # [T, N, Lkv], written in place
    qo_indptr: Tensor,  # [B+1]
    kv_indptr: Tensor,  # [B+1], in pages
    kv_indices: Tensor,  # [kv_indptr[-1]]
    kv_last_page_lens: Tensor,  # [B]
    max_seqlen_q: int,
    sm_scale: float | None = None,  # 1/sqrt(Lkv + R), as in AITER
    logit_cap: float = 0.0,
    num_kv_splits: int | None = None,
    *,
    page_size: int | None = None,
    nhead_kv: int = 1,
    q_scale: Tensor | None = None,
    kv_scale: Tensor | None = None,
    causal: bool = True,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """AITER's mla_decode_fwd: writes o, returns (o, lse [T,N] or None)."""
    if isinstance(sm_scale, int):
        refuse(
            "sm_scale",
            "a float in 9th place",
            f"the int {sm_scale}",
            "Newer AITER has page_size there: pass page_size= and sm_scale= by keyword.",
        )
    lse: Tensor = torch.ops.mla_compile.mla_decode_fwd.default(
        q,
        kv_buffer,
        o,
        qo_indptr,
        kv_indptr,
        kv_indices,
        kv_last_page_lens,
        max_seqlen_q,
        sm_scale,
        logit_cap,
        num_kv_splits,
        page_size=page_size,
        nhead_kv=nhead_kv,
        q_scale=q_scale,
        kv_scale=kv_scale,
        causal=causal,
    )
    return o, lse if return_lse else None
