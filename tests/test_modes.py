"""Beside other passes, and under every mode of torch.compile that a CPU takes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import mla_compile
from tests.compiling import OP, error
from tests.spellings import inputs
from tests.spellings.expanded import expanded_sdpa_length_mask as decode

pytestmark = pytest.mark.extra  # minutes of compilation


class Seeing(CustomGraphPass):
    """Somebody else's pass: does it see the op, or still the attention?"""

    def __init__(self, name: str):
        self.name, self.ops = name, -1

    def __call__(self, graph: Graph) -> None:
        self.ops = sum(n.target is OP for n in graph.nodes)

    def uuid(self) -> str:
        return self.name


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    mla_compile.counters.clear()
    with config.patch(force_disable_caches=True), torch.no_grad():
        yield


@pytest.mark.parametrize("hook", ["joint_custom_post_pass", "post_grad_custom_pre_pass"])
def test_a_pass_at_a_later_hook_sees_the_op(hook: str) -> None:
    seeing = Seeing(hook)
    with mla_compile.enable(), config.patch({hook: seeing}):
        torch.compile(decode)(inputs())
    assert seeing.ops == 1


def test_a_pass_set_before_enable_runs_after_ours() -> None:
    seeing = Seeing("before enable")
    with config.patch(joint_custom_pre_pass=seeing), mla_compile.enable():
        torch.compile(decode)(inputs())
    assert seeing.ops == 1


@pytest.mark.skipif(
    torch.__version__ < "2.13", reason="torch 2.11 takes one pass a hook, not a sequence"
)
def test_a_sequence_puts_passes_before_and_after_ours() -> None:
    first, last = Seeing("first"), Seeing("last")
    ours = mla_compile.options()["joint_custom_pre_pass"]
    with config.patch(joint_custom_pre_pass=[first, ours, last]):
        torch.compile(decode)(inputs())
    assert (first.ops, last.ops) == (0, 1)
    assert mla_compile.counters == {"rewritten": 1}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_every_mode_rewrites_and_is_right_at_two_sizes(mode: str) -> None:
    run = torch.compile(decode, backend="inductor", mode=mode)
    with mla_compile.enable():
        for Skv in (48, 32):
            x = inputs(Skv=Skv)
            exact = decode(x.to(torch.float64))
            assert error(run(x), exact) <= 2 * error(decode(x), exact)
    assert mla_compile.counters == {"rewritten": 2}
