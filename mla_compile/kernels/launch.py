"""A kernel launch whose arguments are settled once."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor


class Launch:
    """A kernel with its grid and every argument but its tensors, which come first; None is missing.

    Triton's own launch looks at 48 arguments, for longer than a small batch runs. It serves the
    first call; later ones, whose tensors have the same `facts`, go straight to what it compiled.
    """

    def __init__(
        self, kernel: Any, grid: tuple[int, int, int], arguments: dict[str, Any], **options: int
    ):
        self.kernel, self.grid, self.options = kernel, grid, options
        pointers, names = _names(kernel)
        self.pointers = pointers
        self.arguments = tuple([arguments[name] for name in names])
        self.compiled: Callable[..., None] | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        missing = (None,) * (self.pointers - len(tensors))
        if self.compiled is not None:
            self.compiled(*tensors, *missing, *self.arguments)
            return
        binary = self.kernel[self.grid](*tensors, *missing, *self.arguments, **self.options)
        if binary is not None:  # the interpreter compiles nothing
            self.compiled = binary[self.grid]


@lru_cache
def _names(kernel: Any) -> tuple[int, list[str]]:
    """How many pointers a kernel takes, and the names of what follows them."""
    names = [name for name in kernel.arg_names if not name.endswith("_ptr")]
    return len(kernel.arg_names) - len(names), names
