"""Where there is a GPU, kernels are compiled for it. Where there is none, they are interpreted."""

from __future__ import annotations

import os

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels' modules are imported
if "PYTEST_XDIST_WORKER" in os.environ:  # one core each
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-cases", action="store_true", help="run the tests marked extra as well")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreter: runs kernels in Triton's interpreter")
    config.addinivalue_line("markers", "extra: one more case of many, run with --all-cases")
    if not GPU:
        _multiply_bf16_as_floats()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--all-cases"):
        extra = [item for item in items if item.get_closest_marker("extra")]
        config.hook.pytest_deselected(items=extra)
        items[:] = [item for item in items if item not in extra]
    no_gpu = pytest.mark.skip(reason="needs a CUDA or ROCm device, and torch sees none")
    compiled = pytest.mark.skip(reason="the interpreter runs only where there is no GPU")
    for item in items:
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)
        if GPU and item.get_closest_marker("interpreter"):
            item.add_marker(compiled)


def _multiply_bf16_as_floats() -> None:
    """Triton's interpreter keeps bf16 as uint16 and its dot multiplies those integers (#11584)."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    dot = InterpreterBuilder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(
        self, widened(a), widened(b), *rest
    )


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
