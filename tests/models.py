"""Every MLA model of transformers 5.24: attention as published, all else tiny."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from mla_compile.passes.site import Reason

TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # scores of this size make a peaked softmax, which errors show in
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    # Both say that no layer has experts, whose grouped matmul does not know fp64.
    "first_k_dense_replace": 2,
    "mlp_layer_types": ["dense", "dense"],
}
SPARSE = {"index_topk": 8, "index_n_heads": 2}  # 8 of at least 11 cached tokens
SELECT_ALL = {"index_topk": 32}  # in bf16, where rounding makes an indexer select others
# With an indexer, 5.17 caches the keys and values of every head where 5.23 caches the latent.
OLD = Version(transformers.__version__) < Version("5.23")
EXPANDED = {Reason.NO_LATENT, Reason.VALUE} if OLD else set()
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}


@dataclass(frozen=True)
class Case:
    """One way to run a model."""

    attention: str
    cache: str
    Sq: int
    dtype: torch.dtype

    def __str__(self) -> str:
        queries = "one-query" if self.Sq == 1 else f"{self.Sq}-queries"
        return f"{self.attention}-{self.cache}-{queries}-{str(self.dtype).removeprefix('torch.')}"


CASES = [
    Case(*values)
    for values in itertools.product(
        ("eager", "sdpa"), ("static", "dynamic"), (1, 3), (torch.float32, torch.bfloat16)
    )
]


@dataclass(frozen=True)
class Model:
    """A model class, what its configuration needs beside TINY, and what the pass makes of it."""

    cls: str
    config: dict[str, Any] = field(default_factory=dict)
    layers: int = 2  # with MLA
    refused: Set[Reason] = frozenset()  # all of them, for one of these
    others: int = 0  # softmaxes that are no attention
    attentions: tuple[str, ...] = ("eager", "sdpa")
    dynamo: dict[str, Any] = field(default_factory=dict)  # settings it needs to become one graph

    @property
    def rewritten(self) -> int:
        return 0 if self.refused else self.layers

    @property
    def missed(self) -> int:
        return self.layers - self.rewritten

    def expects(self, misses: Counter[Reason]) -> bool:
        attentions = misses - Counter({Reason.NO_QUERY: self.others})
        return attentions.total() == self.missed and attentions.keys() <= self.refused

    @property
    def cases(self) -> list[Case]:
        return [case for case in CASES if case.attention in self.attentions]


MODELS = {
    "axk1": Model("AXK1ForCausalLM"),
    "axk2": Model("AXK2ForCausalLM", SPARSE, refused=EXPANDED),
    "bailing_hybrid": Model("BailingHybridForCausalLM", HYBRID, layers=1),
    "deepseek_v2": Model("DeepseekV2ForCausalLM"),
    "deepseek_v3": Model("DeepseekV3ForCausalLM"),
    "deepseek_v32": Model("DeepseekV32ForCausalLM", SPARSE, refused=EXPANDED),
    # A layer with an indexer, a layer with a sliding window; each has its own dims and cache.
    "dots3_note": Model(
        "Dots3NoteForCausalLM",
        SPARSE
        | {
            "layer_types": ["indexed_attention", "sliding_attention"],
            "sliding_window": 8,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 24,
        },
    ),
    "glm4_moe_lite": Model("Glm4MoeLiteForCausalLM"),
    # Four hyper-connections mix residual streams by a softmax, the indexer pools keys by another.
    # The indexer drops pools by a boolean index, a graph break between cache and attention else.
    "glm5_next": Model(
        "Glm5NextTextModel",
        SPARSE
        | {
            "layer_types": ["full_attention"] * 2,
            "indexer_types": ["full", "shared"],
            "index_kpool": 2,
        },
        refused=EXPANDED,
        others=5,
        dynamo={"capture_dynamic_output_shape_ops": True},
    ),
    "glm_moe_dsa": Model("GlmMoeDsaForCausalLM", SPARSE, refused=EXPANDED),
    # A sink logit beside the scores; the model has no sdpa.
    "hy_v4": Model("HYV4ForCausalLM", SPARSE, refused={Reason.SINKS}, attentions=("eager",)),
    "hy_v4_vl": Model("HYV4VLTextModel", SPARSE, refused={Reason.SINKS}, attentions=("eager",)),
    "kimi_linear": Model("KimiLinearForCausalLM", HYBRID | {"linear_num_heads": 2}, layers=1),
    # Always has experts, in a loop that breaks the graph at each: here one, and one that is empty.
    "longcat_flash": Model(
        "LongcatFlashForCausalLM",
        {
            "num_layers": 1,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 32,
            "n_routed_experts": 1,
            "zero_expert_num": 1,
            "moe_topk": 2,
        },
    ),
    "minicpm3": Model("MiniCPM3ForCausalLM"),
    "mistral4": Model("Mistral4ForCausalLM"),
    # One layer with rope, one without, one that reads the first one's cache.
    "mistral_large4": Model(
        "MistralLarge4TextModel",
        SPARSE
        | {
            "num_hidden_layers": 3,
            "mlp_layer_types": ["dense"] * 3,
            "no_rope_layers": [1, 0, 1],
            "kv_source_layers": [0, 1, 0],
            "indexer_types": ["full", "full", "shared"],
        },
        layers=3,
    ),
    "youtu": Model("YoutuForCausalLM"),
}


CACHES: dict[str, Callable[[PreTrainedModel], Cache]] = {
    # 37: no other size of a model is a multiple of it.
    "static": lambda lm: StaticCache(config=lm.config, max_cache_len=37),
    "dynamic": lambda lm: DynamicCache(config=lm.config),
}

PROMPT = torch.arange(20).view(2, 10) * 3 % 63 + 1  # no 0: it is the padding


def missing(name: str) -> str | None:
    """Why this model cannot be built here, if it cannot."""
    cls = MODELS[name].cls
    if hasattr(transformers, cls):
        return None
    return f"transformers {transformers.__version__} has no {cls}"


def build(name: str, attention: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    cls = getattr(transformers, MODELS[name].cls)
    values = TINY | MODELS[name].config
    if "index_topk" in values and dtype is torch.bfloat16:
        values |= SELECT_ALL
    torch.manual_seed(0)
    config = cls.config_class(**values, attn_implementation=attention)
    lm: PreTrainedModel = cls(config).eval().to(dtype)
    return lm


@torch.no_grad()
def decode(
    step: Callable[..., Any], lm: PreTrainedModel, cache: Cache, Sq: int = 1, **inputs: Any
) -> Tensor:
    """What `step` makes of Sq tokens after a prompt that the model itself put into the cache."""
    prompt = PROMPT.to(lm.device)
    lm(prompt, past_key_values=cache, use_cache=True)
    result: Tensor = step(prompt[:, :Sq], past_key_values=cache, use_cache=True, **inputs)[0]
    return result
