"""Compile a kernel for an AMD GPU as Triton's runtime would for the same call, without the GPU.

Triton reads TRITON_INTERPRET when it is imported, and the tests set it; so a process of its own
compiles: this file, run as a program, answers the requests of `Compiler`.
"""

from __future__ import annotations

import importlib
import os
import pickle
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

LARGE = 1 << 31  # a storage from here on is addressed with 64-bit pointers, not as a buffer


class Pointer(NamedTuple):
    """What Triton specialises a tensor on."""

    dtype: str
    aligned: bool  # to 16 bytes
    bytes: int  # of its storage


class Request(NamedTuple):
    kernel: tuple[str, str]  # module, function
    arch: str
    arguments: tuple[Any, ...]  # Pointers, numbers, None
    options: tuple[tuple[str, Any], ...]  # constexprs and compiler options


class Ran(NamedTuple):
    """A binary that was executed. Different requests may compile to the same code."""

    arch: str
    kernel: str
    digest: str


@dataclass(frozen=True)
class Binary:
    asm: str
    hsaco: bytes
    lds: int
    waves: int
    parameters: tuple[tuple[str, str], ...]  # name and type of what is passed at run time


class Compiler:
    """Compiles each request once, in the order they come, while the caller does something else."""

    def __init__(self, cache: Path) -> None:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env |= {"TRITON_CACHE_DIR": str(cache), "PYTHONWARNINGS": "ignore"}
        self.binaries: dict[Request, Future[Binary]] = {}
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cdna.compiler"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            cwd=Path(__file__).parents[2],
        )

    def submit(self, request: Request) -> Future[Binary]:
        if request not in self.binaries:
            self.binaries[request] = self.pool.submit(self._ask, request)
        return self.binaries[request]

    def _ask(self, request: Request) -> Binary:
        assert self.process.stdin and self.process.stdout
        pickle.dump(request, self.process.stdin)
        self.process.stdin.flush()
        answer: Binary | str = pickle.load(self.process.stdout)
        if isinstance(answer, str):
            raise RuntimeError(f"Triton could not compile {request}:\n{answer}")
        return answer

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


class _Tensor:
    def __init__(self, pointer: Pointer) -> None:
        import torch

        self.dtype = getattr(torch, pointer.dtype)
        self._address = 0 if pointer.aligned else 8
        self._bytes = pointer.bytes

    def data_ptr(self) -> int:
        return self._address

    def ptr_range(self) -> int:
        return self._bytes


class _Driver:
    """Says that a GPU is there. A device is an arch, for Triton keeps kernels by device."""

    arch = ""

    def get_current_device(self) -> str:
        return self.arch

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("hip", self.arch, 64)


def _compile(request: Request, driver: _Driver) -> Binary:
    module, name = request.kernel
    kernel = getattr(importlib.import_module(module), name)
    driver.arch = request.arch
    arguments = [_Tensor(a) if isinstance(a, Pointer) else a for a in request.arguments]
    binary = kernel.warmup(*arguments, grid=(1,), **dict(request.options))
    passed = [(n, t) for n, t in binary.src.signature.items() if t != "constexpr"]
    return Binary(
        asm=binary.asm["amdgcn"],
        hsaco=binary.asm["hsaco"],
        lds=binary.metadata.shared,
        waves=binary.metadata.num_warps,
        parameters=tuple(passed),
    )


def main() -> None:
    import triton

    answers = sys.stdout.buffer
    sys.stdout = sys.stderr  # what compilers print must not get between the answers
    driver = _Driver()
    triton.runtime.driver.set_active(driver)
    while True:
        try:
            request = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Binary | str = _compile(request, driver)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    from tests.cdna import compiler  # the classes that are pickled must not be those of __main__

    compiler.main()
    os._exit(0)  # Triton's bindings print pages of what they leak when Python shuts down
