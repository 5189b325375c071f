"""Stand-ins for Triton kernels: the host code launches them as it would on the GPU, they compile
for it and run in the emulator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.cdna.asm import Kernel, parse
from tests.cdna.compiler import LARGE, Binary, Compiler, Pointer, Request
from tests.cdna.launch import Argument, Buffer, launch

WRITTEN = ("out_ptr", "lse_ptr")  # every other pointer is read-only
FORMATS = {"fp32": "f", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "i1": "?"}


class Emulated:
    """The kernel `function`, compiled for `arch`."""

    executed: dict[Request, int] = {}  # noqa: RUF012  wave instructions by binary, of all instances

    def __init__(self, compiler: Compiler, function: Any, arch: str, large: bool = False) -> None:
        self.compiler, self.arch, self.large = compiler, arch, large
        python = getattr(function, "fn", function)
        self.name = python.__module__, python.__name__
        self.parameters: list[str] = list(function.arg_names)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.run(grid, arguments, options)

    def request(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Request:
        described = tuple(self._describe(a) for a in arguments)
        return Request(self.name, self.arch, described, tuple(options.items()))

    def _describe(self, argument: Any) -> Any:
        if not isinstance(argument, Tensor):
            return argument
        size = LARGE if self.large else argument.untyped_storage().nbytes()
        dtype = str(argument.dtype).removeprefix("torch.")
        return Pointer(dtype, argument.data_ptr() % 16 == 0, min(size, LARGE) & LARGE)

    def run(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> None:
        request = self.request(arguments, options)
        binary = self.compiler.compile(request)
        values = dict(zip(self.parameters, arguments, strict=False)) | options
        run = execute(binary, self.arch, grid, values)
        self.executed[request] = self.executed.get(request, 0) + run


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
    for name, kind in binary.parameters:
        value = values[name]
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            memory = memories.setdefault(storage.data_ptr(), _bytes(storage))
            offset = value.data_ptr() - storage.data_ptr()
            arguments.append(Buffer(memory, offset, name in WRITTEN))
        else:
            arguments.append((FORMATS[kind], value))
    kernel = kernel or parse(binary.asm)
    run = launch(kernel, arch, grid, arguments, waves=binary.waves, lds=binary.lds)
    return run.wave_instructions


def _bytes(storage: torch.UntypedStorage) -> np.ndarray[Any, Any]:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()  # type: ignore[call-overload, no-any-return]
