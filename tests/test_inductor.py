"""The pass inside Inductor: one hook shared with others, honest cache keys, and failing open."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NoReturn

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config as functorch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import mla_compile
from mla_compile.passes import inductor
from mla_compile.passes.inductor import MLAPass
from tests.compiling import error
from tests.spellings import SCALE, Inputs, inputs
from tests.spellings.absorbed import deepseek_absorbed
from tests.spellings.expanded import expanded_sdpa_length_mask


class Counting(CustomGraphPass):
    """Somebody else's pass."""

    def __init__(self, name: str = "counting"):
        self.name, self.graphs = name, 0

    def __call__(self, graph: Graph) -> None:
        self.graphs += 1

    def uuid(self) -> Any:
        return self.name


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    mla_compile.counters.clear()
    with config.patch(force_disable_caches=True), torch.no_grad():
        yield


def test_the_backend_is_found_by_its_name() -> None:
    x = inputs()
    result = torch.compile(expanded_sdpa_length_mask, backend="mla")(x)
    exact = expanded_sdpa_length_mask(x.to(torch.float64))
    assert mla_compile.counters == {"rewritten": 1}
    assert error(result, exact) <= 2 * error(expanded_sdpa_length_mask(x), exact)


@pytest.mark.parametrize("layout", ["needs_exact_strides", "flexible_layout"])
def test_the_op_gets_the_strides_that_it_was_planned_with(layout: str) -> None:
    """Autocast reads rope keys transposed; Inductor would store the cast as it is read."""

    def decode(x: Inputs) -> Tensor:
        k, v = F.linear(x.kv_c, x.w).unflatten(-1, (x.N, -1)).transpose(1, 2).chunk(2, dim=-1)
        rope = x.k_pe[:, None].mT.to(k.dtype)
        s = x.q_nope.transpose(1, 2) @ k.mT + x.q_pe.transpose(1, 2).to(k.dtype) @ rope
        out: Tensor = (s * SCALE).softmax(-1) @ v
        return out

    exact, x = decode(inputs().to(torch.float64)), inputs().to(torch.bfloat16)
    x = replace(x, q_pe=x.q_pe.float(), k_pe=x.k_pe.float())
    with functorch.patch(custom_op_default_layout_constraint=layout):
        result = torch.compile(decode, backend="mla")(x)
    assert mla_compile.counters == {"rewritten": 1}
    assert error(result, exact) <= 2 * error(decode(x), exact)


def test_a_mode_that_switches_the_pass_off_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    options: dict[str, Any] = {"use_joint_graph_passes": False}
    torch.compile(deepseek_absorbed, backend="mla", options=options)(inputs())
    assert "use_joint_graph_passes is off" in caplog.text


def test_equal_options_compile_once() -> None:
    """As where every layer of a model is compiled by itself."""
    for _ in range(3):
        options = mla_compile.options(epilogue_fusion=False)
        torch.compile(deepseek_absorbed, options=options)(inputs())
    assert mla_compile.counters == {"rewritten": 1}


@pytest.mark.parametrize(
    "compile_options",
    [
        {"mode": "default"},
        {"mode": "max-autotune-no-cudagraphs"},
        {"options": {"epilogue_fusion": False}},
        {"dynamic": False},
    ],
    ids=str,
)
def test_the_backend_takes_what_inductor_takes(compile_options: dict[str, Any]) -> None:
    x = inputs()
    result = torch.compile(deepseek_absorbed, backend="mla", **compile_options)(x)
    assert mla_compile.counters["rewritten"] == 1
    torch.testing.assert_close(result, deepseek_absorbed(x))


def test_the_backend_refuses_an_unknown_option() -> None:
    with pytest.raises(Exception, match="no_such_option"):
        torch.compile(deepseek_absorbed, backend="mla", options={"no_such_option": 1})(inputs())


def test_options_carry_the_pass_and_those_of_the_user() -> None:
    other = Counting()
    chosen = mla_compile.options(epilogue_fusion=False, joint_custom_pre_pass=other)
    torch.compile(deepseek_absorbed, options=chosen)(inputs())
    assert chosen["epilogue_fusion"] is False
    assert (mla_compile.counters["rewritten"], other.graphs) == (1, 1)


def test_enable_serves_code_that_compiles_by_itself_and_disable_ends_it() -> None:
    other = Counting()
    with config.patch(joint_custom_pre_pass=other):
        mla_compile.enable()
        mla_compile.enable()
        torch.compile(deepseek_absorbed)(inputs())
        assert (mla_compile.counters["rewritten"], other.graphs) == (1, 1)
        mla_compile.disable()
        assert config.joint_custom_pre_pass is other


def test_enable_is_a_context() -> None:
    with mla_compile.enable():
        assert isinstance(config.joint_custom_pre_pass, MLAPass)
    assert config.joint_custom_pre_pass is None


def test_the_cache_key_covers_the_pass_and_the_passes_before_it() -> None:
    assert MLAPass().uuid() == MLAPass().uuid() == copy.deepcopy(MLAPass()).uuid()
    assert MLAPass([Counting("a")]).uuid() != MLAPass([Counting("b")]).uuid() != MLAPass().uuid()
    assert MLAPass([lambda graph: None]).uuid() is None


def broken(graph: Graph) -> NoReturn:
    raise RuntimeError("planted")


@pytest.mark.parametrize("part", ["Rewriter", "recognise"])
def test_a_bug_leaves_the_graph_as_it_was(
    part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inductor, part, broken)
    x = inputs()
    with caplog.at_level(logging.ERROR, inductor.__name__):
        result: Tensor = torch.compile(deepseek_absorbed, backend="mla")(x)
    torch.testing.assert_close(result, deepseek_absorbed(x))
    assert mla_compile.counters == {"failed": 1}
    assert "planted" in caplog.text


def test_a_bug_is_raised_in_strict_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "recognise", broken)
    with pytest.raises(RuntimeError, match="planted"):
        MLAPass(strict=True)(Graph())


def test_the_log_tells_what_was_done(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, inductor.__name__):
        torch.compile(deepseek_absorbed, backend="mla")(inputs())
    assert "rewritten" in caplog.text
    assert "absorbed.py:" in caplog.text
