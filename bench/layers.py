"""DeepSeek-V3's attention at one decode step: Hugging Face's module, the part of it between the
projections, and the layer in the absorbed form of DeepSeek's own inference code."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb_interleave,
    eager_attention_forward,
)


class Alone(nn.Module):
    """What the module does between its projections, on the whole cache."""

    def __init__(self, attention: DeepseekV3Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, q: Tensor, kv_c: Tensor, k_pe: Tensor, mask: Tensor) -> Tensor:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.attention.config._attn_implementation, eager_attention_forward
        )
        k, v = self.attention.expand_kv(kv_c, k_pe)
        out: Tensor = attend(
            self.attention, q, k, v, mask, dropout=0.0, scaling=self.attention.scaling
        )[0]
        return out


class Module(nn.Module):
    """The attention module on a static cache that it keeps at one length."""

    def __init__(self, attention: DeepseekV3Attention, kv_c: Tensor, k_pe: Tensor) -> None:
        super().__init__()
        self.attention = attention
        self.cached = kv_c.shape[2] - 1
        self.cache = StaticCache(attention.config, max_cache_len=kv_c.shape[2])
        self.cache.update(kv_c[:, :, :-1], k_pe[:, :, :-1], 0)
        self.layer = cast(StaticLayer, self.cache.layers[0])

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        self.layer.cumulative_length.fill_(self.cached)
        out: Tensor = self.attention(hidden, (cos, sin), mask, past_key_values=self.cache)[0]
        return out


class Absorbed(nn.Module):
    """The module's weights with the up-projections moved to the query and the output."""

    def __init__(self, attention: DeepseekV3Attention, kv_c: Tensor, k_pe: Tensor) -> None:
        super().__init__()
        self.attention = attention
        self.kv_c = kv_c[:, 0].clone()  # [B, Skv, Lkv], as k_pe written at its last token
        self.k_pe = k_pe[:, 0].clone()

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a: Any = self.attention
        last = self.kv_c.shape[1] - 1
        q = a.q_b_proj(a.q_a_layernorm(a.q_a_proj(hidden))).unflatten(-1, (-1, a.qk_head_dim))
        q_nope, q_pe = q.split([a.qk_nope_head_dim, a.qk_rope_head_dim], -1)
        kv_c, k_pe = a.kv_a_proj_with_mqa(hidden).split([a.kv_lora_rank, a.qk_rope_head_dim], -1)
        q_pe, k_pe = apply_rotary_pos_emb_interleave(
            q_pe, k_pe.unsqueeze(2), cos, sin, unsqueeze_dim=2
        )
        self.kv_c[:, last:] = a.kv_a_layernorm(kv_c)
        self.k_pe[:, last:] = k_pe.squeeze(2)

        weight = a.kv_b_proj.weight.view(a.num_heads, -1, a.kv_lora_rank)
        W_UK, W_UV = weight.split([a.qk_nope_head_dim, a.v_head_dim], 1)
        q_nope = torch.einsum("bshd,hdc->bshc", q_nope, W_UK)
        scores = torch.einsum("bshc,btc->bsht", q_nope, self.kv_c)
        scores = (scores + torch.einsum("bshr,btr->bsht", q_pe, self.k_pe)) * a.scaling
        p = scores.softmax(-1, dtype=torch.float32).type_as(hidden)
        out = torch.einsum("bsht,btc->bshc", p, self.kv_c)
        out = torch.einsum("bshc,hdc->bshd", out, W_UV)
        projected: Tensor = a.o_proj(out.flatten(2))
        return projected


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # [B, 1, hidden]
    cos: Tensor  # [B, 1, R]
    sin: Tensor  # [B, 1, R]
    q: Tensor  # [B, N, 1, P + R]
    kv_c: Tensor  # [B, 1, Skv, Lkv]
    k_pe: Tensor  # [B, 1, Skv, R]
    mask: Tensor  # [B, 1, 1, Skv], an input as under generate(); every cached token is visible

    def sequence(self, b: int, dtype: torch.dtype) -> "Inputs":
        one = {name: tensor[b : b + 1] for name, tensor in vars(self).items()}
        return Inputs(**{n: t.to(dtype) if t.is_floating_point() else t for n, t in one.items()})


def make_inputs(config: DeepseekV3Config, B: int, Skv: int, device: torch.device) -> Inputs:
    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    hidden = randn(B, 1, config.hidden_size)
    position = torch.full((B, 1), Skv - 1, device=device)
    cos, sin = DeepseekV3RotaryEmbedding(config).to(device)(hidden, position)
    shape = (B, 1, 1, Skv)
    if config._attn_implementation == "eager":
        mask = torch.zeros(shape, dtype=torch.bfloat16, device=device)
    else:
        mask = torch.ones(shape, dtype=torch.bool, device=device)
    return Inputs(
        hidden=hidden,
        cos=cos,
        sin=sin,
        q=randn(B, config.num_attention_heads, 1, config.qk_head_dim),
        kv_c=randn(B, 1, Skv, config.kv_lora_rank),
        k_pe=randn(B, 1, Skv, config.qk_rope_head_dim),
        mask=mask,
    )


Part = Callable[[DeepseekV3Attention, Inputs], tuple[nn.Module, tuple[Any, ...]]]
PARTS: dict[str, Part] = {
    "attention": lambda a, x: (Alone(a), (x.q, x.kv_c, x.k_pe, x.mask)),
    "module": lambda a, x: (Module(a, x.kv_c, x.k_pe), (x.hidden, x.cos, x.sin, x.mask)),
    "absorbed": lambda a, x: (Absorbed(a, x.kv_c, x.k_pe), (x.hidden, x.cos, x.sin)),
}
EXPANDING = {"attention", "module"}  # keys and values of every head at each step


def expanded_bytes(config: Any, B: int, Skv: int) -> int:
    """Of keys and values of every head in bf16, of what they are copied from, and as much again."""
    expanded: int = config.qk_nope_head_dim + config.v_head_dim
    copied: int = expanded + config.qk_rope_head_dim
    return 2 * 2 * B * Skv * int(config.num_attention_heads) * (expanded + copied)
