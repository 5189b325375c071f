"""A second process takes the rewritten code from Inductor's cache, unless the pass has changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mla_compile
from mla_compile import passes

pytestmark = pytest.mark.extra  # minutes of compilation
DECODE = """
import json, torch, mla_compile
from torch._dynamo.utils import counters
from tests.spellings import inputs
from tests.spellings.expanded import expanded_sdpa_length_mask as decode

x = inputs()
with torch.no_grad():
    run = torch.compile(decode, backend="inductor", options=mla_compile.options())
    torch.testing.assert_close(run(x), decode(x))
    with torch.profiler.profile() as profile:
        run(x)
print(json.dumps({
    "rewritten": mla_compile.counters["rewritten"],
    "hits": counters["inductor"]["fxgraph_cache_hit"],
    "misses": counters["inductor"]["fxgraph_cache_miss"],
    "bypassed": counters["inductor"]["fxgraph_cache_bypass"],
    "calls": sum(e.key == "mla_compile::mla_decode" for e in profile.key_averages()),
}))
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources that a test may change."""
    package, tests = Path(mla_compile.__file__).parent, Path(__file__).parent
    shutil.copytree(package, tmp_path / "mla_compile", ignore=shutil.ignore_patterns("passes"))
    shutil.copytree(Path(passes.__file__).parent, tmp_path / "mla_compile" / "passes")
    shutil.copytree(tests, tmp_path / "tests")
    return tmp_path


def decode(checkout: Path) -> dict[str, Any]:
    """A process that compiles a decode step with the cache beside the checkout, and runs it."""
    cache = {"TORCHINDUCTOR_CACHE_DIR": str(checkout / "cache"), "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-c", DECODE]
    done = subprocess.run(
        command, cwd=checkout, env=os.environ | cache, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    counted: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return counted


def test_a_second_process_hits_the_cache_and_a_changed_pass_misses_it(checkout: Path) -> None:
    compiled = {"rewritten": 1, "hits": 0, "misses": 1, "bypassed": 0, "calls": 1}
    cached = {"rewritten": 0, "hits": 1, "misses": 0, "bypassed": 0, "calls": 1}
    assert decode(checkout) == compiled
    assert decode(checkout) == cached
    with (checkout / "mla_compile" / "passes" / "recognise.py").open("a") as file:
        file.write("\n# another version\n")
    assert decode(checkout) == compiled
    assert decode(checkout) == cached
