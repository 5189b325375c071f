"""Hugging Face's DeepSeek-V3, unchanged: eager and sdpa attention, static and dynamic cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, StaticCache

import mla_compile
from tests.compiling import NAIVE, OP, Compiled
from tests.test_recognise import error

LAYERS = 2


def model(attention: str, dtype: torch.dtype = torch.float32) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=LAYERS,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.2,
        attn_implementation=attention,
    )
    return DeepseekV3ForCausalLM(config).eval().to(dtype)


def static_cache(lm: DeepseekV3ForCausalLM) -> StaticCache:
    return StaticCache(config=lm.config, max_cache_len=32)


def dynamic_cache(lm: DeepseekV3ForCausalLM) -> DynamicCache:
    return DynamicCache(config=lm.config)


PROMPT = torch.arange(20).view(2, 10) * 3 % 64


@torch.no_grad()
def decode(
    step: Callable[..., Any], lm: DeepseekV3ForCausalLM, cache: Any, **inputs: Any
) -> Tensor:
    """Logits of one token after a prompt that the model itself has put into the cache."""
    lm(PROMPT, past_key_values=cache, use_cache=True)
    logits: Tensor = step(PROMPT[:, :1], past_key_values=cache, use_cache=True, **inputs).logits
    return logits


@pytest.mark.parametrize("dynamic", [None, True], ids=["dynamic-none", "dynamic-true"])
@pytest.mark.parametrize("new_cache", [static_cache, dynamic_cache])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_layer_becomes_the_op(
    attention: str, new_cache: Callable[[Any], Any], dynamic: bool | None
) -> None:
    lm = model(attention)
    exact = decode(double := copy.deepcopy(lm).double(), double, new_cache(lm))
    plain = decode(lm, lm, new_cache(lm))
    compiled = Compiled(lm, dynamic=dynamic)
    result = decode(compiled, lm, new_cache(lm))
    assert compiled.misses == []
    assert compiled.count(OP) == LAYERS
    assert compiled.count(*NAIVE - {torch.ops.aten.exp.default}) == 0  # silu has an exp as well
    assert error(result, exact) <= 2 * error(plain, exact)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_padded_batch_brings_its_mask(attention: str) -> None:
    lm = model(attention)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, :4] = 0
    positions = mask.cumsum(1)[:, -1:] - 1
    extra = {"attention_mask": mask, "position_ids": positions}
    plain = decode(lm, lm, dynamic_cache(lm), **extra)
    compiled = Compiled(lm)
    result = decode(compiled, lm, dynamic_cache(lm), **extra)
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
    compiled = Compiled(lm)
    decode(compiled, lm, static_cache(lm), output_attentions=True)
    assert {m.reason.name for m in compiled.misses} == {"ESCAPE"}


@torch.no_grad()
def test_generate_with_a_static_cache_takes_the_pass_by_enable() -> None:
    lm = model("sdpa")
    ids = PROMPT.clone()
    ids[1, :4] = 0
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    arguments = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    expected = lm.generate(ids, **arguments, cache_implementation="static")
    torch._dynamo.reset()
    mla_compile.counters.clear()
    lm.forward = torch.compile(lm.forward, dynamic=False)  # generate does this by itself on a GPU
    with mla_compile.enable(), torch._inductor.config.patch(force_disable_caches=True):
        result = lm.generate(ids, **arguments, cache_implementation="static")
    assert torch.equal(result, expected)
    assert mla_compile.counters["rewritten"] == LAYERS


@torch.no_grad()
def test_explain_reports_every_attention() -> None:
    lm = model("sdpa")
    cache = static_cache(lm)
    lm(PROMPT, past_key_values=cache, use_cache=True)
    report = mla_compile.explain(lm, PROMPT[:, :1], past_key_values=cache, use_cache=True)
    assert len(report.sites) == LAYERS
    assert report.misses == []
    text = str(report)
    for words in (
        "2 attention(s) rewritten, 0 left alone",
        "sdpa_attention.py:",
        "expanded from the latent, two caches",
        "kv_c in float32[2, 1, 32, 32]",
        "length",
        "mla_compile::mla_decode",
    ):
        assert words in text
