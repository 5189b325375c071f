"""Launch stage 1 and, where the KV is split, stage 2. The only place that asks the device anything,
and it asks nothing that waits: no sync, so calls can be captured in CUDA and HIP graphs."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from mla_compile.contents import refuse
from mla_compile.kernels.combine import combine_kernel
from mla_compile.kernels.config import (
    Config,
    ceil_pow2,
    combine_blocks,
    num_splits,
    pick,
    tuned_arch,
    workspace_numel,
)
from mla_compile.kernels.split import split_kernel
from mla_compile.validate import Call

ALL_KEYS = 2**31 - 1  # columns of a mask whose one column stands for every key


@lru_cache
def _device(device: torch.device) -> tuple[str, int]:
    """Arch name and number of compute units."""
    if device.type == "cpu":  # Triton's interpreter
        return "interpreter", 4
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        arch = tuned_arch(properties.gcnArchName.split(":")[0], triton.__version__)
        return arch, properties.multi_processor_count
    return f"sm{properties.major}{properties.minor}", properties.multi_processor_count


def launch(
    call: Call,
    out: Tensor,
    lse: Tensor,
    splits: int | None = None,
    workspace: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Write out [T,N,Lkv] and lse [T,N]. None chooses; workspace holds the partials of splits."""
    dims, cache = call.dims, call.cache
    if dims.T == 0:
        return
    arch, units = _device(out.device)
    if config is None:
        config = pick(
            arch,
            rows=dims.Sq * dims.N,
            Lkv=dims.Lkv,
            q_bytes=call.q_nope.element_size(),
            kv_bytes=cache.kv_c.element_size(),
        )
    row_blocks = -(-dims.Sq * dims.N // config.block_m)
    if splits is None:
        splits = num_splits(dims.B * row_blocks, -(-cache.typical_len // config.block_n), units)
    if splits == 1:
        _split(call, config, row_blocks, 1, out, lse, (*out.stride()[:2], 0))
        return

    needed = workspace_numel(dims, splits)
    if workspace is None:
        workspace = out.new_empty(needed, dtype=torch.float32)
    elif workspace.numel() < needed:
        refuse("workspace", f"at least {needed} elements", workspace.numel(), "Allocate more.")
    rows = dims.T * dims.N
    part_out, part_ml = workspace[:needed].split((rows * splits * dims.Lkv, rows * splits * 2))
    strides = (dims.N * splits * dims.Lkv, splits * dims.Lkv, dims.Lkv)
    _split(call, config, row_blocks, splits, part_out, part_ml, strides)
    block_s, block_l = combine_blocks(splits, dims.Lkv)
    combine_kernel[(rows, -(-dims.Lkv // block_l))](
        part_out,
        part_ml,
        out,
        lse,
        splits,
        out.stride(0),
        out.stride(1),
        N=dims.N,
        LKV=dims.Lkv,
        BLOCK_S=block_s,
        BLOCK_L=block_l,
        num_warps=4,
    )


def _split(
    call: Call,
    config: Config,
    row_blocks: int,
    splits: int,
    out: Tensor,
    lse: Tensor,
    out_strides: tuple[int, ...],
) -> None:
    dims, cache, mask = call.dims, call.cache, call.mask
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    mask_columns, mask_rows = 0, False
    if mask is not None:
        mask_strides, mask_columns = mask.stride(), mask.shape[3]
        if mask_columns == 1:
            mask_strides, mask_columns = (*mask_strides[:3], 0), ALL_KEYS
        varies = (mask_strides[1] != 0 and dims.N > 1) or (mask_strides[2] != 0 and dims.Sq > 1)
        mask_rows = varies or call.causal
    split_kernel[(row_blocks * splits * dims.B,)](
        call.q_nope,
        call.q_pe,
        cache.kv_c,
        cache.k_pe,
        out,
        lse,
        cache.table,
        cache.starts,
        cache.lens,
        call.qo_indptr,
        mask,
        call.q_scale,
        call.k_scale,
        call.sm_scale,
        call.logit_cap if call.logit_cap > 0 else None,
        call.mask_fill,
        dims.Sq,
        cache.page_size,
        splits,
        mask_columns,
        *call.q_nope.stride()[:2],
        *call.q_pe.stride()[:2],
        *cache.kv_c.stride()[:2],
        *cache.k_pe.stride()[:2],
        *out_strides,
        cache.table.stride(0) if cache.table is not None else 0,
        *mask_strides,
        N=dims.N,
        LKV=dims.Lkv,
        R=dims.R,
        PAGE_SIZE=cache.page_size if cache.table is not None else 0,
        CAUSAL=call.causal,
        MASK_ROWS=mask_rows,
        SPLIT=splits > 1,
        RELOAD_V=config.reload_v,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_L=max(16, ceil_pow2(dims.Lkv)),
        BLOCK_R=max(16, ceil_pow2(dims.R)),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **dict(config.options),
    )
