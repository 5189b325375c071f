"""Compile the shipped configs for GPUs that need not be there; print what they use as JSON.

Run as `python -m tests.offline ARCH... [--plain]`, without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from mla_compile.kernels import decode
from mla_compile.kernels.combine import combine_kernel
from mla_compile.kernels.config import GLUON, Config, ceil_pow2, combine_blocks, pick, tuned_arch

TARGETS = {
    **{f"sm{n}": GPUTarget("cuda", n, 32) for n in (80, 86, 89, 90, 100, 120)},
    **{arch: GPUTarget("hip", arch, 64) for arch in ("gfx942", "gfx950")},
    **{arch: GPUTarget("hip", arch, 32) for arch in ("gfx1100", "gfx1201")},
}
NO_FP8 = {"sm80", "sm86", "gfx1100"}  # Triton has no OCP fp8 there
ALIGNED = [["tt.divisibility", 16]]
N, LKV, R = 128, 512, 64


def compile_kernel(
    arch: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> Any:
    """Strides are multiples of 16, as they are at 512 + 64; what is not typed is None or an int."""
    unspecialised = {p.name for p in kernel.params if p.do_not_specialize}
    signature, attrs, values = {}, {}, dict(constants)
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in types:
            signature[name] = types[name]
        elif name.endswith("_ptr") or name == "logit_cap":
            signature[name], values[name] = "constexpr", None
        else:
            signature[name] = "i32"
        if signature[name].startswith("*") or (
            signature[name] == "i32" and name not in unspecialised
        ):
            attrs[(i,)] = ALIGNED
    ast = GluonASTSource if kernel.is_gluon() else ASTSource
    source = ast(fn=kernel, signature=signature, constexprs=values, attrs=attrs)
    return triton.compile(source, target=TARGETS[arch], options=options)


def compile_split(arch: str, config: Config, types: dict[str, str], page_size: int) -> Any:
    constants = {
        "max_seqlen_q": 1,
        "N": N,
        "LKV": LKV,
        "R": R,
        "PAGE_SIZE": page_size,
        "CAUSAL": False,
        "MASK_ROWS": False,
        "SPLIT": types["out_ptr"] == "*fp32",
        "TILED": types["out_ptr"] == "*fp32",
        "BLOCK_B": 64,
        "ALIKE": True,
        "RELOAD_V": config.reload_v,
        "CHUNK": config.chunk,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_L": ceil_pow2(LKV),
        "BLOCK_R": ceil_pow2(R),
    }
    types = {"sm_scale": "fp32", "mask_fill": "fp32", "lse_ptr": "*fp32", **types}
    kernel = decode._stage1(config.kernel)
    constants = {name: constants[name] for name in constants if name in kernel.arg_names}
    stages = config.num_stages - (config.table_stage and page_size == 0)
    launch = {"num_warps": config.num_warps, "num_stages": stages}
    return compile_kernel(arch, kernel, types, constants, {**launch, **dict(config.options)})


def compile_combine(arch: str) -> Any:
    tiled = arch == "sm90"
    _, block_s, block_l = combine_blocks(64, LKV, tiled)
    types = dict.fromkeys(("part_out_ptr", "part_ml_ptr", "lse_ptr"), "*fp32")
    types["out_ptr"] = "*bf16"
    constants = {
        "N": N,
        "LKV": LKV,
        "EARLY": arch == "sm90",
        "TILED": tiled,
        "BLOCK_S": block_s,
        "BLOCK_L": block_l,
    }
    return compile_kernel(arch, combine_kernel, types, constants, {"num_warps": 1})


def usage(arch: str, binary: Any) -> dict[str, int]:
    shared = binary.metadata.shared
    if not arch.startswith("sm"):
        asm = binary.asm["amdgcn"]
        # Scalars spill into lanes of a vector register, not to memory.
        spilled = sum(map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", asm)))
        matrix = asm.count("v_mfma") + asm.count("v_wmma")
        return {"shared": shared, "spilled": spilled, "matrix": matrix}
    ptx = binary.asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(binary.asm["cubin"])
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        dump = subprocess.run(
            [tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    stack, local = (int(re.search(rf"{key}:(\d+)", dump)[1]) for key in ("STACK", "LOCAL"))  # type: ignore[index]
    wgmma = ptx.count("wgmma.mma_async")
    return {
        "shared": shared,
        "spilled": stack + local,
        "wgmma": wgmma,
        "matrix": wgmma + ptx.count("mma.sync") + ptx.count("tcgen05.mma"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("archs", choices=TARGETS, nargs="+")
    parser.add_argument("--plain", action="store_true", help="bf16 pages of one token alone")
    args = parser.parse_args()
    bf16 = dict.fromkeys(("q_nope_ptr", "q_pe_ptr", "kv_c_ptr", "k_pe_ptr", "out_ptr"), "*bf16")
    csr = dict.fromkeys(("table_ptr", "starts_ptr", "lens_ptr"), "*i32")
    fp32 = dict.fromkeys(bf16, "*fp32")
    fp8 = {"kv_c_ptr": "*fp8e4nv", "k_pe_ptr": "*fp8e4nv"}
    paths = {  # name: element bytes, rows, page size, pointer types
        "bf16": [
            (2, 16, 1, {**bf16, **csr}),
            (2, 64, 1, {**bf16, **csr}),
        ],
        "bf16, pages of 64, split": [(2, 64, 64, {**bf16, **csr, "out_ptr": "*fp32"})],
        "bf16, dense": [(2, 64, 0, bf16)],
        "bf16, dense under a mask": [
            (2, 16, 0, {**bf16, "mask_ptr": "*i1"}),
            (2, 64, 0, {**bf16, "mask_ptr": "*i1"}),
        ],
        "fp32": [(4, 64, 1, {**fp32, **csr})],
        "fp8 cache": [(2, 64, 1, {**bf16, **csr, **fp8})],
    }
    rows = []
    for arch in args.archs:
        for path, cases in paths.items():
            if (args.plain and path != "bf16") or (path == "fp8 cache" and arch in NO_FP8):
                continue
            for size, count, page_size, types in cases:
                key = tuned_arch(arch, triton.__version__)
                kv_bytes = 1 if "fp8" in types["kv_c_ptr"] else size
                config = pick(key, rows=count, Lkv=LKV, q_bytes=size, kv_bytes=kv_bytes)
                binary = compile_split(arch, config, types, page_size)
                rows.append({"arch": arch, "path": path, "rows": count, **usage(arch, binary)})
        for config in GLUON.get(tuned_arch(arch, triton.__version__), ()):
            for page_size in (1, 64):
                binary = compile_split(arch, config, {**bf16, **csr}, page_size)
                row = {"arch": arch, "path": config.kernel, "rows": config.block_m}
                rows.append({**row, **usage(arch, binary)})
        rows.append({"arch": arch, "path": "combine", **usage(arch, compile_combine(arch))})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
