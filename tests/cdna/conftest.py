"""One compiler for the whole run; how many binaries were executed, how many mutations noticed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from tests.cdna.compiler import Compiler, Ran

RUNS = pytest.StashKey[Counter[Ran]]()
SCORE = pytest.StashKey[Counter[tuple[str, str]]]()


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    compiler = Compiler(tmp_path_factory.mktemp("triton"))
    yield compiler
    compiler.close()


@pytest.fixture(scope="session")
def runs(pytestconfig: pytest.Config) -> Counter[Ran]:
    """Wave instructions executed, by binary."""
    return pytestconfig.stash.setdefault(RUNS, Counter())


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    runs = config.stash.get(RUNS, Counter[Ran]())
    for arch in sorted({ran.arch for ran in runs}):
        of_arch = {ran: n for ran, n in runs.items() if ran.arch == arch}
        kernels = Counter(ran.kernel for ran in of_arch)
        counts = ", ".join(f"{n} of {kernel}" for kernel, n in sorted(kernels.items()))
        terminalreporter.write_line(
            f"{arch}: executed {len(of_arch)} different binaries ({counts}), "
            f"{sum(of_arch.values()):,} wave instructions"
        )
    score = config.stash.get(SCORE, Counter[tuple[str, str]]())
    for kind in sorted({kind for kind, _ in score}):
        noticed, tried = score[kind, "noticed"], score[kind, "tried"]
        terminalreporter.write_line(f"mutations: {noticed} of {tried} {kind} missing were noticed")
