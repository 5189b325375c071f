"""What a call costs the host: all of it but Triton's launcher, which is stubbed, so on any machine.

python -m bench.host
"""

import time
import timeit
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from mla_compile.kernels import decode
from mla_compile.kernels.cdna3 import cdna3_kernel
from mla_compile.kernels.cdna4 import cdna4_kernel
from mla_compile.kernels.combine import combine_cut_kernel, combine_kernel
from mla_compile.kernels.sm90 import sm90_kernel
from mla_compile.kernels.split import split_kernel
from mla_compile.validate import validate

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, float]


KERNELS = (
    split_kernel,
    cdna3_kernel,
    cdna4_kernel,
    sm90_kernel,
    combine_kernel,
    combine_cut_kernel,
)
ARCHS = {
    "sm90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Driver:
    """As much of a driver as Triton's launch asks for."""

    def __init__(self, target: GPUTarget):
        self.target, self.utils = target, SimpleNamespace(unload_module=lambda module: None)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


class Binary(CompiledKernel):  # type: ignore[misc]
    """What Triton makes of a kernel, but for the code in it. Launching it calls `launched`."""

    def __init__(self, source: Any, launched: Callable[..., None]):
        self.src, self.name, self.function = source, source.name, id(self)
        self.packed_metadata, self.module, self._module_pid = (), self, None
        self._run = launched


def stub(arch: str, launched: Callable[..., None]) -> None:
    """Let the op plan for a GPU of 132 compute units, and launch CPU tensors on nothing."""
    driver.set_active(Driver(ARCHS[arch]))
    for kernel in KERNELS:
        assert kernel.device_caches[0]  # made at first sight, and sets the compiler
        kernel.compile = lambda source, **options: Binary(source, launched)
    replaced = {
        "_device": lambda device: (arch, 132),
        "ROCM": ARCHS[arch].backend == "hip",
        "due": lambda device: False,
    }
    vars(decode).update(replaced)


def dense(B: int = 1, N: int = 128, Skv: int = 4096) -> Inputs:
    """DeepSeek-V3's call by the compiler pass: two slices of one query and of one cache."""
    q, kv = (torch.randn(B, n, 576).bfloat16() for n in (N, Skv))
    return q[..., :512], q[..., 512:], kv[..., :512], kv[..., 512:], 0.1


def microseconds(fn: Callable[[], object]) -> float:
    """CPU time of this thread, in the quietest of many short runs."""
    fn()
    return min(timeit.repeat(fn, timer=time.thread_time, number=50, repeat=100)) / 50 * 1e6


def main() -> None:
    stub("sm90", lambda *arguments: None)
    inputs = dense()
    options: dict[str, Any] = {
        "causal": False,
        "attn_mask": torch.ones(1, 1, 1, 4096, dtype=torch.bool),
    }
    library = torch.library.Library("mla_host", "DEF")
    schema = str(torch.ops.mla_compile.mla_decode.default._schema).partition("(")[2]
    library.define(f"nothing({schema}")
    outputs = decode.decode(inputs, options)
    library.impl("nothing", lambda *args, **kwargs: outputs, "CPU")
    nothing = torch.ops.mla_host.nothing.default

    call = validate(*inputs, **options)

    def missed() -> None:
        decode._plans.clear()
        decode.decode(inputs, options)

    parts: dict[str, Callable[[], object]] = {
        "torch's dispatcher": lambda: nothing(*inputs, **options),
        "the op behind it": lambda: decode.decode(inputs, options),
        "  of which its key": lambda: [*map(decode.facts, (*inputs, *options.values()))],
        "a call not seen before": missed,
        "  of which validate": lambda: validate(*inputs, **options),
        "  of which the plan": lambda: decode.make_plan(call, (65536, 512), None),
    }
    for name, fn in parts.items():
        print(f"{name:24}{microseconds(fn):8.1f} µs")


if __name__ == "__main__":
    main()
