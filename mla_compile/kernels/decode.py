"""Plan and launch stage 1 and, where the KV is split, stage 2. The only place that asks the device
anything, and it asks nothing that waits: no sync, so calls can be captured in CUDA and HIP graphs.

Layers and steps of a model make the same call over and over. What the `facts` of a call decide is
decided once: whether it is valid, its `Plan`, and what Triton specialises its kernels on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from mla_compile.contents import due, refuse
from mla_compile.dims import Dims
from mla_compile.kernels.combine import combine_cut_kernel, combine_kernel
from mla_compile.kernels.config import (
    KEY_MASK,
    MAX_EVEN,
    Config,
    ceil_pow2,
    choose,
    combine_blocks,
    combine_of,
    evenly,
    num_splits,
    tuned_arch,
    workspace_numel,
)
from mla_compile.kernels.launch import Launch
from mla_compile.kernels.split import split_kernel
from mla_compile.validate import Call, output_dtype, validate

ALL_KEYS = 2**31 - 1  # columns of a mask whose one column stands for every key
MAX_PLANS = 1024  # kept at once, a few KB each; a cache that grows needs a new one every step
ROCM = torch.version.hip is not None


@dataclass(frozen=True, slots=True)
class Plan:
    """A call without its tensors."""

    split: Launch
    combine: Launch | None  # None: the KV is not split
    part_ml: int  # where the parts' (m, l) start in the workspace, after their out
    workspace: int  # fp32 elements
    even: bool = False  # by a `schedule`: what is not cut goes straight to out and lse

    def run(
        self,
        inputs: tuple[Tensor, ...],  # q_nope, q_pe, kv_c, k_pe
        optional: tuple[Tensor | None, ...],  # table, starts, lens, qo_indptr, mask, scales
        out: Tensor,
        lse: Tensor,
        workspace: Tensor | None,
    ) -> None:
        if not len(out):
            return
        if self.combine is None:
            self.split(*inputs, out, lse, *optional)
            return
        if workspace is None:
            workspace = out.new_empty(self.workspace, dtype=torch.float32)
        part_ml = workspace[self.part_ml :]
        if self.even:
            self.split(*inputs, out, lse, *optional, workspace, part_ml)
            self.combine(workspace, part_ml, out, lse, optional[3])
        else:
            self.split(*inputs, workspace, part_ml, *optional)
            self.combine(workspace, part_ml, out, lse)


_plans: dict[tuple[Any, ...], Plan] = {}


def decode(
    inputs: tuple[Any, ...],  # q_nope, q_pe, kv_c, k_pe, sm_scale
    options: dict[str, Any],  # of the op
    out: Tensor | None = None,
    lse: Tensor | None = None,
    workspace: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The op on a GPU: validate, plan, launch. What is None is allocated."""
    q_nope = inputs[0]
    key = (*options, *map(facts, (*inputs, *options.values(), out, lse, workspace)))
    plan = _plans.get(key)
    if plan is None or due(q_nope.device):
        call = validate(*inputs, **options, out=out, lse=lse, workspace=workspace)
        strides = (call.dims.N * call.dims.Lkv, call.dims.Lkv) if out is None else out.stride()
        plan = make_plan(call, strides, workspace, options.get("num_kv_splits"))
        if len(_plans) >= MAX_PLANS:
            _plans.clear()
        _plans[key] = plan

    if out is None:
        out = q_nope.new_empty(q_nope.shape, dtype=output_dtype(q_nope.dtype))
    if lse is None:
        lse = q_nope.new_empty(q_nope.shape[:2], dtype=torch.float32)
    option = options.get
    optional = (
        option("block_table") if option("kv_indices") is None else option("kv_indices"),
        option("kv_indptr"),
        option("seq_lens") if option("kv_indptr") is None else option("kv_last_page_lens"),
        option("qo_indptr"),
        option("attn_mask"),
        option("q_scale"),
        option("k_scale"),
    )
    with torch.cuda.device(q_nope.get_device()):  # Triton launches on the current one
        plan.run(inputs[:4], optional, out, lse, workspace)
    return out, lse


def facts(x: Any) -> Any:
    """All of an argument that validity, plan and Triton's specialisation depend on."""
    if not isinstance(x, Tensor):
        return x
    within_2gb = not ROCM or x.untyped_storage().nbytes() < 2**31  # AMD's buffer loads reach so far
    aligned = x.data_ptr() % 16 == 0
    return x.dtype, x.get_device(), x.shape, x.stride(), aligned, within_2gb


def launch(
    call: Call,
    out: Tensor,
    lse: Tensor,
    splits: int | None = None,
    workspace: Tensor | None = None,
    config: Config | None = None,
) -> None:
    """Write out [T,N,Lkv] and lse [T,N]. None chooses; workspace holds the partials of splits."""
    cache = call.cache
    optional = (cache.table, cache.starts, cache.lens, call.qo_indptr, call.mask)
    plan = make_plan(call, out.stride(), workspace, splits, config)
    plan.run(
        (call.q_nope, call.q_pe, cache.kv_c, cache.k_pe),
        (*optional, call.q_scale, call.k_scale),
        out,
        lse,
        workspace,
    )


@lru_cache
def _device(device: torch.device) -> tuple[str, int]:
    """Arch name and number of compute units."""
    if device.type == "cpu":  # Triton's interpreter
        return "interpreter", 4
    properties = torch.cuda.get_device_properties(device)
    if ROCM:
        arch = tuned_arch(properties.gcnArchName.split(":")[0], triton.__version__)
        return arch, properties.multi_processor_count
    return f"sm{properties.major}{properties.minor}", properties.multi_processor_count


def configure(call: Call) -> tuple[Config, str]:
    """The config of a call on its device, and why."""
    dims = call.dims
    return configure_for(
        call.q_nope.device,
        rows=dims.Sq * dims.N,
        Lkv=dims.Lkv,
        R=dims.R,
        q_bytes=call.q_nope.element_size(),
        kv_bytes=call.cache.kv_c.element_size(),
        keys=dims.B * call.cache.typical_len,
        rare=_rare(call),
    )


def configure_for(device: torch.device, **shape: Any) -> tuple[Config, str]:
    """As `config.choose`, on a device and under the pin of the environment."""
    return choose(_device(device)[0], pinned=os.environ.get("MLA_COMPILE_KERNEL"), **shape)


def make_plan(
    call: Call,
    out_strides: tuple[int, ...],
    workspace: Tensor | None,
    splits: int | None = None,
    config: Config | None = None,
) -> Plan:
    dims, cache = call.dims, call.cache
    _, units = _device(call.q_nope.device)
    if config is None:
        config, _ = configure(call)
    row_blocks = -(-dims.Sq * dims.N // config.block_m)
    if splits is None:
        programs, tiles = dims.B * row_blocks, -(-cache.typical_len // config.block_n)
        at_once = units * config.per_unit
        secret = cache.lens is not None and 1 < dims.B <= MAX_EVEN  # lengths that may differ
        if secret and call.mask is None and evenly(config, programs, tiles, at_once):
            return _evenly(call, config, out_strides, workspace, at_once)
        combine = combine_of(config, dims.Sq * dims.N)
        rates = (config.stream, combine, config.late, config.again)
        splits = num_splits(programs, tiles, at_once, *rates)
    items = row_blocks * splits * dims.B
    programs = min(items, units) if config.persistent and call.mask is None else items
    if splits == 1:
        stage1 = _split(call, config, (programs, items), 1, (*out_strides[:2], 0))
        return Plan(stage1, None, 0, 0)

    needed = workspace_numel(dims, splits)
    _check_workspace(workspace, needed)
    rows = dims.T * dims.N
    strides = (dims.N * splits * dims.Lkv, splits * dims.Lkv, dims.Lkv)
    stage1 = _split(call, config, (programs, items), splits, strides)
    tiled = _tiled(dims, config)
    block_r, block_s, block_l = combine_blocks(splits, dims.Lkv, tiled)
    stage2 = Launch(
        combine_kernel,
        (rows // block_r, -(-dims.Lkv // block_l), 1),
        {
            "num_splits": splits,
            "TILED": tiled,
            "BLOCK_S": block_s,
            "BLOCK_L": block_l,
            **_combined(dims, config, out_strides),
        },
        num_warps=1,
        **_overlap(config),
    )
    return Plan(stage1, stage2, rows * splits * dims.Lkv, needed)


def _evenly(
    call: Call,
    config: Config,
    out_strides: tuple[int, ...],
    workspace: Tensor | None,
    at_once: int,  # programs
) -> Plan:
    """By the lengths that only the device knows: see `schedule`."""
    dims = call.dims
    row_blocks = -(-dims.Sq * dims.N // config.block_m)
    groups = max(at_once // row_blocks, 1)
    slots, slot_rows = 2 * groups, row_blocks * config.block_m
    part_ml = slots * slot_rows * dims.Lkv
    needed = part_ml + 2 * slots * slot_rows + 3 * groups
    _check_workspace(workspace, needed)
    stage1 = _split(call, config, (groups * row_blocks, dims.B), 1, (*out_strides[:2], 0), True)
    shares = 8 * row_blocks
    stage2 = Launch(
        combine_cut_kernel,
        (groups * shares, 1, 1),
        {
            "max_seqlen_q": dims.Sq,
            "num_groups": groups,
            "ROWS": slot_rows,
            "TILED": _tiled(dims, config),
            "SHARES": shares,
            "BLOCK_L": ceil_pow2(dims.Lkv),
            **_combined(dims, config, out_strides),
        },
        num_warps=4,
        **_overlap(config),
    )
    return Plan(stage1, stage2, part_ml, needed, even=True)


def _combined(dims: Dims, config: Config, out_strides: tuple[int, ...]) -> dict[str, Any]:
    return {
        "stride_ot": out_strides[0],
        "stride_on": out_strides[1],
        "N": dims.N,
        "LKV": dims.Lkv,
        "EARLY": config.early,
    }


def _overlap(config: Config) -> dict[str, Any]:
    return {"launch_pdl": True} if config.early else {}


def _tiled(dims: Dims, config: Config) -> bool:
    return config.tiled and dims.N % 16 == 0


def _check_workspace(workspace: Tensor | None, needed: int) -> None:
    if workspace is not None and workspace.numel() < needed:
        refuse("workspace", f"at least {needed} elements", workspace.numel(), "Allocate more.")


def _rare(call: Call) -> str:
    """The first feature of a call that the Gluon kernels lack."""
    inputs = (call.q_nope, call.q_pe, call.cache.kv_c, call.cache.k_pe)
    # Direct loads to LDS or shared memory take 16 bytes a lane, which Triton must be able to prove.
    aligned = all(
        t.data_ptr() % 16 == 0 and not any(s % 16 for s in t.stride()[:2]) for t in inputs
    )
    key_mask = call.mask is not None and not _mask_rows(call) and call.cache.table is None
    features = {
        "attn_mask": call.mask is not None and not key_mask,
        "logit_cap": call.logit_cap > 0,
        "q_scale or k_scale": call.q_scale is not None or call.k_scale is not None,
        "sm_scale of 0 or less": call.sm_scale <= 0,
        "strides that are not multiples of 16": not aligned,
        KEY_MASK: key_mask,
    }
    return next((name for name, present in features.items() if present), "")


def _mask_rows(call: Call) -> bool:
    """Whether what the mask hides differs between the rows of a sequence."""
    if call.mask is None:
        return False
    _, stride_n, stride_q, _ = call.mask.stride()
    varies = (stride_n != 0 and call.dims.N > 1) or (stride_q != 0 and call.dims.Sq > 1)
    return varies or call.causal


def _stage1(kernel: str) -> Any:
    if kernel == "cdna3":
        from mla_compile.kernels.cdna3 import cdna3_kernel

        return cdna3_kernel
    if kernel == "cdna4":
        from mla_compile.kernels.cdna4 import cdna4_kernel

        return cdna4_kernel
    if kernel == "sm90":
        from mla_compile.kernels.sm90 import sm90_kernel

        return sm90_kernel
    return split_kernel


def _split(
    call: Call,
    config: Config,
    work: tuple[int, int],  # programs, and the items they share
    splits: int,
    out_strides: tuple[int, ...],
    even: bool = False,
) -> Launch:
    dims, cache, mask = call.dims, call.cache, call.mask
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    mask_columns = 0
    if mask is not None:
        mask_strides, mask_columns = mask.stride(), mask.shape[3]
        if mask_columns == 1:
            mask_strides, mask_columns = (*mask_strides[:3], 0), ALL_KEYS
    return Launch(
        _stage1(config.kernel),
        (work[0], 1, 1),
        {
            "sm_scale": call.sm_scale,
            "logit_cap": call.logit_cap if call.logit_cap > 0 else None,
            "mask_fill": call.mask_fill,
            "max_seqlen_q": dims.Sq,
            "page_size": cache.page_size,
            "num_splits": splits,
            "num_programs": work[0],
            "num_items": work[1],
            "mask_columns": mask_columns,
            "stride_qt": call.q_nope.stride(0),
            "stride_qn": call.q_nope.stride(1),
            "stride_pt": call.q_pe.stride(0),
            "stride_pn": call.q_pe.stride(1),
            "stride_cp": cache.kv_c.stride(0),
            "stride_cs": cache.kv_c.stride(1),
            "stride_kp": cache.k_pe.stride(0),
            "stride_ks": cache.k_pe.stride(1),
            "stride_ot": out_strides[0],
            "stride_on": out_strides[1],
            "stride_os": out_strides[2],
            "stride_table": cache.table.stride(0) if cache.table is not None else 0,
            "stride_mb": mask_strides[0],
            "stride_mn": mask_strides[1],
            "stride_mq": mask_strides[2],
            "stride_ms": mask_strides[3],
            "N": dims.N,
            "LKV": dims.Lkv,
            "R": dims.R,
            "PAGE_SIZE": cache.page_size if cache.table is not None else 0,
            "CAUSAL": call.causal,
            "MASK_ROWS": _mask_rows(call),
            "SPLIT": splits > 1,
            "TILED": (even or splits > 1) and _tiled(dims, config),
            "BLOCK_B": max(64, ceil_pow2(dims.B)),
            "ALIKE": cache.kv_c.stride()[:2] == cache.k_pe.stride()[:2],
            "RELOAD_V": config.reload_v,
            "CHUNK": config.chunk,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_L": max(16, ceil_pow2(dims.Lkv)),
            "BLOCK_R": max(16, ceil_pow2(dims.R)),
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages - (config.table_stage and cache.table is None),
        **dict(config.options),
    )
