"""Hugging Face's DeepSeek-V3, unchanged: eager and sdpa attention, static and dynamic cache."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

import mla_compile
from tests.compiling import NAIVE, OP, Compiled, error
from tests.models import CACHES, MODELS, PROMPT, build, decode

LAYERS = MODELS["deepseek_v3"].layers
model = partial(build, "deepseek_v3")


@pytest.mark.parametrize(
    "dynamic",
    [None, pytest.param(True, marks=pytest.mark.extra)],
    ids=["dynamic-none", "dynamic-true"],
)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_layer_becomes_the_op(attention: str, cache: str, dynamic: bool | None) -> None:
    lm, new_cache = model(attention), CACHES[cache]
    exact = decode(double := copy.deepcopy(lm).double(), double, new_cache(lm))
    plain = decode(lm, lm, new_cache(lm))
    compiled = Compiled(lm, dynamic=dynamic)
    result = decode(compiled, lm, new_cache(lm))
    assert compiled.misses == []
    assert compiled.count(OP) == LAYERS
    assert compiled.count(*NAIVE - {torch.ops.aten.exp.default}) == 0  # silu has an exp as well
    assert error(result, exact) <= 2 * error(plain, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_layer_becomes_the_op_on_a_gpu(
    attention: str, cache: str, dtype: torch.dtype
) -> None:
    """On a GPU sdpa is a fused call."""
    lm, new_cache = model(attention, dtype).cuda(), CACHES[cache]
    exact = decode(double := copy.deepcopy(lm).double(), double, new_cache(lm))
    plain = decode(lm, lm, new_cache(lm))
    compiled = Compiled(lm)
    result = decode(compiled, lm, new_cache(lm))
    assert compiled.misses == []
    assert compiled.count(OP) == LAYERS
    assert error(result, exact) <= 2 * error(plain, exact)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_padded_batch_brings_its_mask(attention: str) -> None:
    lm = model(attention)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, :4] = 0
    positions = mask.cumsum(1)[:, -1:] - 1
    extra = {"attention_mask": mask, "position_ids": positions}
    plain = decode(lm, lm, CACHES["dynamic"](lm), **extra)
    compiled = Compiled(lm)
    result = decode(compiled, lm, CACHES["dynamic"](lm), **extra)
    assert compiled.misses == []
    torch.testing.assert_close(result, plain)


def test_a_prompt_is_left_to_the_expanded_form() -> None:
    lm = model("sdpa")
    compiled = Compiled(lm)
    with torch.no_grad():
        compiled(PROMPT.repeat(1, 4), use_cache=False)
    assert len(compiled.misses) == LAYERS
    assert compiled.count(OP) == 0


def test_attentions_that_are_returned_are_left_alone() -> None:
    lm = model("eager")
    compiled = Compiled(lm, fullgraph=False)
    decode(compiled, lm, CACHES["static"](lm), output_attentions=True)
    assert {m.reason.name for m in compiled.misses} == {"ESCAPE"}


@torch.no_grad()
def test_explain_reports_every_attention() -> None:
    lm = model("sdpa")
    cache = CACHES["static"](lm)
    lm(PROMPT, past_key_values=cache, use_cache=True)
    report = mla_compile.explain(lm, PROMPT[:, :1], past_key_values=cache, use_cache=True)
    assert len(report.sites) == LAYERS
    assert report.misses == []
    text = str(report)
    for words in (
        "2 attention(s) rewritten, 0 left alone",
        "sdpa_attention.py:",
        "expanded from the latent, two caches",
        "kv_c in float32[2, 1, 37, 512]",
        "length",
        "mla_compile::mla_decode",
    ):
        assert words in text
