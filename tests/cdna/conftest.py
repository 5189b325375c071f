"""One compiler for the whole run, and how many binaries it ran them on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.cdna.compiler import Compiler, Request

RUNS = pytest.StashKey[Counter[Request]]()


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    compiler = Compiler(tmp_path_factory.mktemp("triton"))
    yield compiler
    compiler.close()


@pytest.fixture(scope="session")
def runs(pytestconfig: pytest.Config) -> Counter[Request]:
    """Wave instructions executed, by binary."""
    return pytestconfig.stash.setdefault(RUNS, Counter())


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    runs = config.stash.get(RUNS, Counter[Request]())
    for arch in sorted({request.arch for request in runs}):
        of_arch = {r: n for r, n in runs.items() if r.arch == arch}
        kernels = Counter(request.kernel[1] for request in of_arch)
        counts = ", ".join(f"{n} of {kernel}" for kernel, n in sorted(kernels.items()))
        terminalreporter.write_line(
            f"{arch}: executed {len(of_arch)} binaries ({counts}), "
            f"{sum(of_arch.values()):,} wave instructions"
        )
