"""Decode steps of DeepSeek-V3's attention: eager, torch.compile, torch.compile with backend="mla".

    python -m bench.model                      # the GPU: the full layer, batch 1 to 64, 1 K to 32 K
    python -m bench.model --steps 16x4096      # batch 16 with 4096 cached tokens alone
    python -m bench.model --device cpu         # few heads, short cache, the same path

Three parts are timed: Hugging Face's attention alone (queries and latent cache in, heads out:
expansion, softmax, values), its whole attention module (projections, rope, cache write, attention,
o_proj), and the same module in the absorbed form of DeepSeek's own inference code. Each result is
compared with float64 first, as in bench.decode; ours must also be one rewritten site.
"""

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from bench.common import (
    arguments,
    compared,
    failures,
    judge,
    max_error,
    parse,
    progress,
    provenance,
    say,
    table,
    untimed,
    verdict,
    write,
)
from bench.layers import EXPANDING, PARTS, Inputs, expanded_bytes, make_inputs
from mla_compile.backend import mla
from mla_compile.report import reporting

PLAIN = "torch.compile"
# What the README shows first: a run that is cut short has it.
STEPS = [(16, 4096), (4, 4096), (1, 4096), (64, 4096), (1, 32768), (16, 1024)]


def one_by_one(attention: DeepseekV3Attention, x: Inputs, part: str, dtype: torch.dtype) -> Tensor:
    """A sequence at a time, for memory's sake."""
    singles = (PARTS[part](attention, x.sequence(b, dtype)) for b in range(len(x.hidden)))
    return torch.cat([module(*args) for module, args in singles])


def run_part(
    attention: DeepseekV3Attention, x: Inputs, part: str, fits: bool, graph: bool, timed: bool
) -> list[dict[str, Any]]:
    exact = copy.deepcopy(attention).double()
    reference = one_by_one(exact, x, part, torch.float64)
    plain = max_error(one_by_one(attention, x, part, x.hidden.dtype), reference)
    del exact
    module, args = PARTS[part](attention, x)
    torch.compiler.reset()
    forms: dict[str, Callable[..., Tensor]] = {
        "eager": module,
        PLAIN: torch.compile(module),
        "mla": torch.compile(module, backend=mla),
    }
    with reporting() as report:
        forms["mla"](*args)
    rows: list[dict[str, Any]] = []
    for name, form in forms.items():
        if name == "mla" and len(report.sites) != 1:
            result = untimed("wrong") | {"error": float("nan")}
        elif name != "mla" and not fits:
            result = untimed("does not fit")
        else:
            call = lambda form=form: form(*args)  # noqa: E731
            result = judge(call, reference, plain, graph=graph, timed=timed)
        rows.append({"part": part, "provider": name} | result)
        shape = f"batch {len(x.hidden)} context {x.kv_c.shape[2]}"
        say(f"{shape}  {part} {name}: {verdict(result, plain)}")
    return compared(rows, PLAIN)


def step(text: str) -> tuple[int, int]:
    B, times, Skv = text.partition("x")
    if not (times and B.isdigit() and Skv.isdigit()):
        raise argparse.ArgumentTypeError(f"expected BATCHxCONTEXT such as 16x4096, got {text}")
    return int(B), int(Skv)


@torch.no_grad()
def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=step, nargs="+", metavar="BATCHxCONTEXT")
    parser.add_argument("--parts", choices=PARTS, nargs="+", default=list(PARTS))
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    args, device = parse(parser)
    gpu = device.type == "cuda"
    steps = args.steps or (STEPS if gpu else [(2, 256)])
    heads, hidden, q_rank = (128, 7168, 1536) if gpu else (4, 256, 64)

    torch.manual_seed(0)
    config = DeepseekV3Config(
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=q_rank,
        num_hidden_layers=1,
        max_position_embeddings=max(Skv for _, Skv in steps),
    )
    config._attn_implementation = args.attention
    attention = DeepseekV3Attention(config, layer_idx=0).to(device, torch.bfloat16).eval()
    origin = provenance(device, args.commit)
    memory = torch.cuda.mem_get_info(device)[0] if gpu else 2**32
    rows: list[dict[str, Any]] = []
    for B, Skv in progress(steps):
        x = make_inputs(config, B, Skv, device)
        facts = {"batch": B, "context": Skv, "heads": heads, "hidden": hidden}
        facts["form"] = args.attention
        for part in args.parts:
            fits = part not in EXPANDING or expanded_bytes(config, B, Skv) < memory
            found = run_part(attention, x, part, fits, args.graph, not args.check)
            rows += [row | facts | origin for row in found]
            path = write(args.out, "model", rows)
    print(table(rows, [column for column in rows[0] if column not in origin]))
    say(f"{len(rows)} rows in {path}")
    return failures(rows)


if __name__ == "__main__":
    raise SystemExit(main())
