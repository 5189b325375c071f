"""One decode step of Hugging Face's DeepSeek-V3 attention: eager, torch.compile, backend="mla".

    python -m bench.model                  # the GPU: the full layer, 4096 cached tokens
    python -m bench.model --device cpu     # few heads, short cache, the same path

Two parts are timed: the attention module (projections, rope, cache write, attention, o_proj) and
the attention alone (queries and latent cache in, heads out: expansion, softmax, values). Each
result is compared with float64 first, as in bench.decode.
"""

import copy
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
    eager_attention_forward,
)

from bench.common import (
    arguments,
    captured,
    max_error,
    measure,
    provenance,
    say,
    table,
    within,
    write,
)
from mla_compile.report import reporting

PLAIN = "torch.compile"


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


def parts(
    attention: DeepseekV3Attention, x: Inputs
) -> dict[str, tuple[nn.Module, tuple[Any, ...]]]:
    return {
        "module": (Module(attention, x.kv_c, x.k_pe), (x.hidden, x.cos, x.sin, x.mask)),
        "attention": (Alone(attention), (x.q, x.kv_c, x.k_pe, x.mask)),
    }


def run_batch(
    attention: DeepseekV3Attention, x: Inputs, graph: bool, facts: dict[str, Any]
) -> list[dict[str, Any]]:
    device, B = x.hidden.device, x.hidden.shape[0]
    exact = copy.deepcopy(attention).double()
    rows: list[dict[str, Any]] = []
    for part, (module, args) in parts(attention, x).items():
        singles = (parts(exact, x.sequence(b, torch.float64))[part] for b in range(B))
        reference = torch.cat([single(*one) for single, one in singles])
        plain = max_error(module(*args), reference)
        torch.compiler.reset()
        forms: dict[str, Callable[..., Tensor]] = {
            "eager": module,
            PLAIN: torch.compile(module),
            "mla": torch.compile(module, backend="mla"),
        }
        with reporting() as report:
            forms["mla"](*args)
        rewritten = len(report.sites)
        for name, form in forms.items():
            error = max_error(form(*args), reference)
            valid = within(error, plain) and (name != "mla" or rewritten == 1)
            times = None
            if valid:
                call = lambda form=form, args=args: form(*args)  # noqa: E731
                times = measure(captured(call) if graph else call, device)
            row = {"part": part, "provider": name, "batch": B, **facts}
            row |= {"launch": "graph" if graph else "eager", "ms": times and times.p50}
            row |= {"ms p20": times and times.p20, "ms p80": times and times.p80, "error": error}
            rows.append(row)
            result = (
                f"{times.p50:.4f} ms" if times else f"INVALID, not timed: {rewritten} rewritten"
            )
            say(f"batch {B} {part} {name}: {result}, error {error:.2e}, plain bf16 {plain:.2e}")
    for row in rows:
        base = next(r for r in rows if r["part"] == row["part"] and r["provider"] == PLAIN)
        known = base["ms"] is not None and row["ms"] is not None
        row[f"vs {PLAIN}"] = base["ms"] / row["ms"] if known else None
    return rows


@torch.no_grad()
def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--context", type=int)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    args = parser.parse_args()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    if args.graph and not gpu:
        parser.error("--graph needs a GPU")
    batches = args.batches or ([16, 4, 1] if gpu else [2])
    context = args.context or (4096 if gpu else 256)
    heads, hidden, q_rank = (128, 7168, 1536) if gpu else (4, 256, 64)

    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=q_rank,
        num_hidden_layers=1,
        max_position_embeddings=context,
    )
    config._attn_implementation = args.attention
    attention = DeepseekV3Attention(config, layer_idx=0).to(device, torch.bfloat16).eval()
    origin = provenance(device, args.commit)
    facts = {"context": context, "heads": heads, "hidden": hidden, "form": args.attention}
    rows = [
        row | origin
        for B in batches
        for row in run_batch(attention, make_inputs(config, B, context, device), args.graph, facts)
    ]
    print(table(rows, [column for column in rows[0] if column not in origin]))
    write(args.out, "model", rows)
    return int(any(row["ms"] is None for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
