"""The host boundary: every way into the op passes here before anything is launched or written.

`validate` turns the op's arguments into a `Call`, or raises a ValueError that names the argument,
what was expected, what came, and the remedy. Shapes, dtypes, devices and strides are always
checked. What stands *in* a tensor is checked on CPU always, on a GPU only under `debug_checks`,
because reading it there waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from mla_compile.contents import check_contents, due, refuse
from mla_compile.dims import Dims
from mla_compile.paged import PagedKV

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
INDICES = (torch.int32, torch.int64)
MAX_SPLITS = 256  # the combine kernel holds one weight per split in registers
FP32 = torch.finfo(torch.float32)
MAX_CAP = 1e30  # times a tanh, or a score over it, stays within fp32


@dataclass(frozen=True, slots=True)
class Call:
    """A decode call that passed `validate`."""

    dims: Dims
    q_nope: Tensor  # [T, N, Lkv]
    q_pe: Tensor  # [T, N, R]
    cache: PagedKV
    sm_scale: float
    qo_indptr: Tensor | None  # [B+1]; None: every sequence has Sq tokens
    causal: bool  # bottom-right; false where it would hide nothing
    mask: Tensor | None  # [B, N, Sq, columns] by strides; one column stands for all keys
    mask_fill: float  # the score of a key where a bool mask is False
    logit_cap: float
    q_scale: Tensor | None  # [1] fp32
    k_scale: Tensor | None  # [1] fp32

    @property
    def out_dtype(self) -> torch.dtype:
        return output_dtype(self.q_nope.dtype)


def output_dtype(q_dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if q_dtype in FP8 else q_dtype


def validate(
    q_nope: Tensor,
    q_pe: Tensor,
    kv_c: Tensor,
    k_pe: Tensor,
    sm_scale: float,
    *,
    kv_indptr: Tensor | None = None,
    kv_indices: Tensor | None = None,
    kv_last_page_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    seq_lens: Tensor | None = None,
    qo_indptr: Tensor | None = None,
    max_seqlen_q: int = 1,
    causal: bool = True,
    attn_mask: Tensor | None = None,
    mask_fill: float | None = None,
    logit_cap: float = 0.0,
    q_scale: Tensor | None = None,
    k_scale: Tensor | None = None,
    num_kv_splits: int | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Call:
    check_tensors(q_nope, q_pe, kv_c, k_pe)
    paged = kv_indptr is not None or block_table is not None
    _check_layout(q_nope, q_pe, kv_c, k_pe, paged)
    cache = _paging(kv_c, k_pe, kv_indptr, kv_indices, kv_last_page_lens, block_table, seq_lens)
    T, N, Lkv = q_nope.shape
    dims = Dims(B=cache.B, T=T, Sq=max_seqlen_q, N=N, Lkv=Lkv, R=q_pe.shape[2])
    _check_queries(dims, qo_indptr, q_nope.device)
    mask = None if attn_mask is None else _check_mask(dims, cache, attn_mask, mask_fill, q_nope)
    _check_scalars(sm_scale, mask_fill, logit_cap, num_kv_splits)
    for name, scale in (("q_scale", q_scale), ("k_scale", k_scale)):
        if scale is not None:
            _check_scale(name, scale, q_nope.device)
    call = Call(
        dims=dims,
        q_nope=q_nope,
        q_pe=q_pe,
        cache=cache,
        sm_scale=sm_scale,
        qo_indptr=qo_indptr,
        causal=causal and max_seqlen_q > 1,
        mask=mask,
        mask_fill=_as_fp32(mask_fill),
        logit_cap=logit_cap,
        q_scale=q_scale,
        k_scale=k_scale,
    )
    _check_outputs(call, out, lse, workspace)
    if due(q_nope.device):
        check_contents(dims, cache, qo_indptr, q_scale, k_scale)
    return call


def check_tensors(q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor) -> None:
    """Ranks and dtypes: all that may be asked of fake tensors, whose sizes are symbols."""
    for name, tensor, shape in (
        ("q_nope", q_nope, "[T, N, Lkv]"),
        ("q_pe", q_pe, "[T, N, R]"),
        ("kv_c", kv_c, "[pages, page_size, Lkv]"),
        ("k_pe", k_pe, "[pages, page_size, R]"),
    ):
        check_rank(name, tensor, shape)
    check_dtypes("q_nope", q_nope, "kv_c", kv_c)
    if q_pe.dtype != q_nope.dtype:
        refuse("q_pe", f"q_nope's dtype {q_nope.dtype}", q_pe.dtype, "Cast q_pe.")
    if k_pe.dtype != kv_c.dtype:
        refuse("k_pe", f"kv_c's dtype {kv_c.dtype}", k_pe.dtype, "Keep both caches in one dtype.")


def check_rank(name: str, tensor: Tensor | None, shape: str) -> None:
    rank = shape.count(",") + 1
    if tensor is None or tensor.dim() != rank:
        got = None if tensor is None else f"shape {list(tensor.shape)}"
        refuse(name, f"{rank} dims {shape}", got, f"View it as {shape}.")


def check_dtypes(q_name: str, q: Tensor, kv_name: str, kv: Tensor) -> None:
    if kv.dtype in FP8:
        if q.dtype != kv.dtype and q.dtype not in (torch.bfloat16, torch.float16):
            refuse(
                q_name,
                f"bfloat16, float16 or {kv.dtype} over a {kv.dtype} cache",
                q.dtype,
                f"Cast {q_name} to bfloat16.",
            )
        if kv.dtype == torch.float8_e4m3fnuz and kv.is_cuda and torch.version.hip is None:
            refuse(kv_name, "a float8 this GPU has", kv.dtype, "Keep the cache in float8_e4m3fn.")
        return
    if kv.dtype not in FLOATS:
        refuse(kv_name, "bfloat16, float16, float32 or float8", kv.dtype, "Cast the cache.")
    if q.dtype != kv.dtype:
        refuse(q_name, f"{kv_name}'s dtype {kv.dtype}", q.dtype, f"Cast {q_name} or the cache.")
    if kv.dtype == torch.float64 and kv.device.type != "cpu":
        refuse(kv_name, "at most float32 on a GPU", kv.dtype, "float64 is CPU only: cast down.")


def _check_layout(q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, paged: bool) -> None:
    T, N, Lkv = q_nope.shape
    pages, page_size, _ = kv_c.shape
    if N == 0 or Lkv == 0:
        refuse("q_nope", "at least one head and one dim", list(q_nope.shape), "Check its shape.")
    if q_pe.shape[0] != T or q_pe.shape[1] != N:
        refuse("q_pe", f"[{T}, {N}, R] as q_nope has", list(q_pe.shape), "Split both from one q.")
    if kv_c.shape[2] != Lkv:
        refuse(
            "kv_c",
            f"last dim {Lkv} as q_nope has",
            kv_c.shape[2],
            "Absorb W_UK into the query and slice the latent part of the cache.",
        )
    if page_size == 0 and paged:
        refuse("kv_c", "page_size of at least 1", list(kv_c.shape), "Drop the pages.")
    if k_pe.shape != (pages, page_size, q_pe.shape[2]):
        refuse(
            "k_pe",
            f"[{pages}, {page_size}, {q_pe.shape[2]}] as kv_c and q_pe have",
            list(k_pe.shape),
            "Slice both caches from one buffer, or page them alike.",
        )
    device = q_nope.device
    for name, tensor in (("q_nope", q_nope), ("q_pe", q_pe), ("kv_c", kv_c), ("k_pe", k_pe)):
        if tensor.device != device:
            _refuse_device(name, tensor, device)
        if tensor.stride(2) != 1 and tensor.shape[2] > 1:
            refuse(
                name,
                "stride 1 in the last dim",
                f"strides {tensor.stride()}",
                f"Pass {name}.contiguous(), or keep the cache that way.",
            )


def _paging(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_indptr: Tensor | None,
    kv_indices: Tensor | None,
    kv_last_page_lens: Tensor | None,
    block_table: Tensor | None,
    seq_lens: Tensor | None,
) -> PagedKV:
    device = kv_c.device
    if kv_indptr is None and kv_indices is None and kv_last_page_lens is None:
        if seq_lens is not None:
            _check_index("seq_lens", seq_lens, device)
        B = kv_c.shape[0]
        if block_table is not None:
            _check_index("block_table", block_table, device, rank=2)
            B = block_table.shape[0]
            if seq_lens is None:
                refuse("seq_lens", "[B] with block_table", None, "Pass each sequence's tokens.")
        if seq_lens is not None and seq_lens.shape[0] != B:
            holder = "kv_c has pages" if block_table is None else "block_table has rows"
            refuse("seq_lens", f"{B} entries, as many as {holder}", len(seq_lens), "Match them.")
        return PagedKV(kv_c, k_pe, B, block_table, None, seq_lens)

    if kv_indptr is None or kv_indices is None or kv_last_page_lens is None:
        csr = {
            "kv_indptr": kv_indptr,
            "kv_indices": kv_indices,
            "kv_last_page_lens": kv_last_page_lens,
        }
        missing = [name for name, tensor in csr.items() if tensor is None]
        refuse(missing[0], "a tensor: CSR paging takes all three", None, f"Pass {missing}.")
    if block_table is not None or seq_lens is not None:
        name = "seq_lens" if block_table is None else "block_table"
        refuse(name, "None beside kv_indptr", "a tensor", "Choose CSR or block-table paging.")
    _check_index("kv_indptr", kv_indptr, device)
    _check_index("kv_indices", kv_indices, device)
    _check_index("kv_last_page_lens", kv_last_page_lens, device)
    B = kv_indptr.shape[0] - 1
    if B < 0:
        refuse("kv_indptr", "[B+1] entries", "none", "An empty batch is kv_indptr = [0].")
    if kv_last_page_lens.shape[0] != B:
        refuse(
            "kv_last_page_lens",
            f"{B} entries, one less than kv_indptr",
            kv_last_page_lens.shape[0],
            "Pass one entry a sequence.",
        )
    return PagedKV(kv_c, k_pe, B, kv_indices, kv_indptr, kv_last_page_lens)


def _check_index(name: str, tensor: Tensor, device: torch.device, rank: int = 1) -> None:
    if tensor.dim() != rank:
        refuse(name, f"{rank} dim(s)", f"shape {list(tensor.shape)}", "Flatten or unsqueeze it.")
    if tensor.dtype not in INDICES:
        refuse(name, "int32 or int64", tensor.dtype, f"Pass {name}.int().")
    if tensor.device != device:
        _refuse_device(name, tensor, device)
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        refuse(name, "stride 1 in the last dim", tensor.stride(), f"Pass {name}.contiguous().")


def _check_queries(dims: Dims, qo_indptr: Tensor | None, device: torch.device) -> None:
    B, T, Sq = dims.B, dims.T, dims.Sq
    if Sq < 1:
        refuse("max_seqlen_q", "at least 1", Sq, "Pass the longest sequence's query tokens.")
    if qo_indptr is not None:
        _check_index("qo_indptr", qo_indptr, device)
        if qo_indptr.shape[0] != B + 1:
            refuse(
                "qo_indptr",
                f"{B + 1} entries for {B} sequences",
                qo_indptr.shape[0],
                "Pass where each sequence's query tokens start, and T at the end.",
            )
    elif B * Sq != T:
        refuse(
            "q_nope",
            f"T = B * max_seqlen_q = {B} * {Sq} query tokens",
            T,
            "Pass qo_indptr for ragged queries, or mend max_seqlen_q.",
        )


def _check_mask(
    dims: Dims, cache: PagedKV, mask: Tensor, mask_fill: float | None, q: Tensor
) -> Tensor:
    if mask.dtype != torch.bool:
        if mask.dtype not in FLOATS or (mask.dtype == torch.float64 and q.is_cuda):
            refuse("attn_mask", "bool or an additive float", mask.dtype, "Cast it.")
        if mask_fill is not None and mask_fill != -math.inf:
            refuse("mask_fill", "None beside an additive attn_mask", mask_fill, "Drop it.")
    if mask.device != q.device:
        _refuse_device("attn_mask", mask, q.device)
    wanted = (dims.B, dims.N, dims.Sq)
    if not 1 <= mask.dim() <= 4 or any(
        size not in (1, full) for size, full in zip(mask.shape[-2::-1], wanted[::-1], strict=False)
    ):
        refuse(
            "attn_mask",
            f"a shape that broadcasts to [B={dims.B}, N={dims.N}, Sq={dims.Sq}, Skv]",
            list(mask.shape),
            "Size-1 dims broadcast; nothing else does.",
        )
    columns = mask.shape[-1]
    if columns != 1 and cache.capacity is not None and columns < cache.capacity:
        refuse(
            "attn_mask",
            f"1 or at least {cache.capacity} columns, the longest sequence the cache admits",
            columns,
            "Slice the cache to the mask, or pad the mask.",
        )
    return mask.expand(*wanted, columns)


def _as_fp32(mask_fill: float | None) -> float:
    if mask_fill is None or mask_fill == -math.inf:
        return -math.inf
    return max(mask_fill, FP32.min)


def _check_scalars(
    sm_scale: float, mask_fill: float | None, logit_cap: float, num_kv_splits: int | None
) -> None:
    if not abs(sm_scale) <= FP32.max:
        refuse("sm_scale", "a finite float32", sm_scale, "Usually 1/sqrt(P + R) of the model.")
    if mask_fill is not None and not mask_fill <= FP32.max:
        refuse("mask_fill", "a finite float32, -inf or None", mask_fill, "None hides masked keys.")
    if logit_cap != 0 and not 1 / MAX_CAP <= logit_cap <= MAX_CAP:
        within = f"0 (off) or a float from {1 / MAX_CAP} to {MAX_CAP}"
        refuse("logit_cap", within, logit_cap, "Pass 0.0 for none.")
    if num_kv_splits is not None and not 1 <= num_kv_splits <= MAX_SPLITS:
        refuse("num_kv_splits", f"1..{MAX_SPLITS} or None", num_kv_splits, "None chooses.")


def _check_scale(name: str, scale: Tensor, device: torch.device) -> None:
    if scale.dtype != torch.float32 or scale.numel() != 1:
        refuse(
            name,
            "one float32 element",
            f"{scale.dtype} of shape {list(scale.shape)}",
            "Scales are per tensor.",
        )
    if scale.device != device:
        _refuse_device(name, scale, device)


def _check_outputs(
    call: Call, out: Tensor | None, lse: Tensor | None, workspace: Tensor | None
) -> None:
    dims, device = call.dims, call.q_nope.device
    if out is not None:
        check_out("out", out, (dims.T, dims.N, dims.Lkv), call.out_dtype, device)
    if lse is not None:
        check_out("lse", lse, (dims.T, dims.N), torch.float32, device)
        if not lse.is_contiguous():
            refuse("lse", "a contiguous tensor", f"strides {lse.stride()}", "Allocate it afresh.")
    if workspace is not None:
        if workspace.dtype != torch.float32 or workspace.dim() != 1:
            refuse(
                "workspace",
                "float32 of 1 dim",
                f"{workspace.dtype} of shape {list(workspace.shape)}",
                "Pass None to have it allocated.",
            )
        if workspace.device != device:
            _refuse_device("workspace", workspace, device)
        if workspace.stride(0) != 1:
            refuse("workspace", "stride 1", workspace.stride(), "Pass None to have it allocated.")


def check_out(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.shape != shape:
        refuse(name, f"shape {list(shape)}", list(tensor.shape), f"Allocate {name} as [T, N, ·].")
    if tensor.dtype != dtype:
        refuse(name, str(dtype), tensor.dtype, f"Allocate {name} in {dtype}.")
    if tensor.device != device:
        _refuse_device(name, tensor, device)
    if tensor.stride(-1) != 1 and shape[-1] > 1:
        refuse(name, "stride 1 in the last dim", tensor.stride(), f"Allocate {name} contiguous.")
    if any(stride == 0 and n > 1 for stride, n in zip(tensor.stride(), shape, strict=True)):
        refuse(name, "a place for each element", tensor.stride(), f"Allocate {name} contiguous.")


def _refuse_device(name: str, tensor: Tensor, device: torch.device) -> NoReturn:
    refuse(name, f"device {device} as q has", tensor.device, f"Pass {name}.to('{device}').")
