"""Stand-ins for Triton kernels: the host code launches them as it would on the GPU, they compile
for it and run in the emulator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.cdna.asm import Kernel, parse
from tests.cdna.compiler import LARGE, Binary, Compiler, Pointer, Ran, Request
from tests.cdna.launch import Argument, Buffer, launch

WRITTEN = ("out_ptr", "lse_ptr")  # every other pointer is read-only
PARTS = ("part_out_ptr", "part_ml_ptr")  # but for these in stage 1
FORMATS = {"fp32": "f", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "i1": "?"}


@dataclass(eq=False)
class Emulated:
    """The kernel `function`, compiled for `arch`."""

    function: Any
    arch: str
    compiler: Compiler
    large: bool = False  # as if every tensor were a view of a large storage
    planned: list[Request] | None = None  # note what would be compiled, run nothing
    runs: Counter[Ran] = field(default_factory=Counter)  # wave instructions by binary

    @property
    def arg_names(self) -> list[str]:
        names: list[str] = self.function.arg_names
        return names

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self._launch(grid, arguments, options)

    def request(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Request:
        python = self.function.fn
        name = python.__module__, python.__name__
        described = tuple(map(self._describe, arguments))
        return Request(name, self.arch, described, tuple(options.items()))

    def _launch(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        request = self.request(arguments, options)
        compiled = self.compiler.submit(request)
        if self.planned is not None:
            self.planned.append(request)
            return
        binary = compiled.result()
        values = dict(zip(self.arg_names, arguments, strict=False)) | options
        ran = Ran(self.arch, request.kernel[1], sha256(binary.hsaco).hexdigest())
        self.runs[ran] += execute(binary, self.arch, grid, values)

    def _describe(self, argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        large = self.large or argument.untyped_storage().nbytes() >= LARGE
        dtype = str(argument.dtype).removeprefix("torch.")
        return Pointer(dtype, argument.data_ptr() % 16 == 0, LARGE if large else 0)


def execute(
    binary: Binary,
    arch: str,
    grid: tuple[int, ...],
    values: dict[str, Any],
    kernel: Kernel | None = None,
) -> int:
    """Run a binary, or an altered kernel in its place, on tensors; count its wave instructions."""
    memories: dict[int, np.ndarray[Any, Any]] = {}
    arguments: list[Argument] = []
    written = WRITTEN + PARTS if "q_nope_ptr" in values else WRITTEN
    for name, kind in binary.parameters:
        value = values[name]
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            memory = memories.setdefault(storage.data_ptr(), _bytes(storage))
            offset = value.data_ptr() - storage.data_ptr()
            arguments.append(Buffer(memory, offset, name in written))
        else:
            arguments.append((FORMATS[kind], value))
    kernel = kernel or parse(binary.asm)
    run = launch(kernel, arch, grid, arguments, waves=binary.waves, lds=binary.lds)
    return run.wave_instructions


def _bytes(storage: torch.UntypedStorage) -> np.ndarray[Any, Any]:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
