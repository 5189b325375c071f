"""What the pass costs at compile time: ms a graph and an attention, and its share of a compilation.

    python -m bench.passes                     # 1 to 61 layers, then a compilation of 4

The graphs are decode steps of Hugging Face's DeepSeek-V3 with small dimensions, stopped where
Inductor hands them to the pass; the pass then runs on copies.  No code is generated for them.
All times are of the processor, not of the clock.  Inductor's is what this process spends from the
end of the pass on; the C++ compiler comes on top of it.
"""

import copy
import os
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, DynamicCache, StaticCache

from bench.common import arguments, provenance, say, table, write
from mla_compile.passes.inductor import MLAPass, Verdict
from mla_compile.passes.site import MLASite

FORMS = {"static sizes": False, "dynamic sizes": True}
REPEATS = 5
WHOLE = 4  # layers of the model that is compiled to the end


class Stop(Exception):
    """Enough seen of this compilation."""


class Keep(CustomGraphPass):
    """Keeps a copy of the graph and ends the compilation."""

    graph: Graph

    def __call__(self, graph: Graph) -> None:
        self.graph = copy.deepcopy(graph)
        raise Stop

    def uuid(self) -> None:
        return None


class Timed(MLAPass):
    """The pass, with a watch on the time it has the processor: other programs run beside it."""

    seconds = end = 0.0

    def __call__(self, graph: Graph) -> None:
        start = time.process_time()
        super().__call__(graph)
        self.end = time.process_time()
        self.seconds = self.end - start


def make_model(layers: int) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    shape = DeepseekV3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        first_k_dense_replace=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=24,
        kv_lora_rank=32,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        max_position_embeddings=128,
    )
    model = DeepseekV3ForCausalLM(shape)
    model.eval()
    return model


@torch.no_grad()
def compile_step(layers: int, dynamic: bool, hook: CustomGraphPass) -> None:
    """Compile a decode step after a prompt of ten tokens; the cache grows if sizes are dynamic."""
    torch._dynamo.reset()
    model = make_model(layers)
    cache: Any = StaticCache(config=model.config, max_cache_len=32)
    if dynamic:
        cache = DynamicCache(config=model.config)
    ids = torch.arange(20).view(2, 10)
    model(ids, past_key_values=cache, use_cache=True)
    with config.patch(joint_custom_pre_pass=hook, force_disable_caches=True):
        step: Callable[..., Any] = torch.compile(model, dynamic=dynamic)
        step(ids[:, :1], past_key_values=cache, use_cache=True)


def captured(layers: int, dynamic: bool) -> Graph:
    keep = Keep()
    with suppress(torch._dynamo.exc.BackendCompilerFailed):
        compile_step(layers, dynamic, keep)
    return keep.graph


def measure_pass(layers: int, form: str) -> dict[str, Any]:
    graph = captured(layers, FORMS[form])
    seconds = []
    for _ in range(REPEATS):
        verdicts: list[Verdict] = []
        timed = Timed(strict=True, record=verdicts.append)
        timed(copy.deepcopy(graph))
        seconds.append(timed.seconds)
    attentions = sum(isinstance(v, MLASite) for v in verdicts)
    ms = statistics.median(seconds) * 1e3
    say(f"{form}, {layers} layers: {ms:.1f} ms for {attentions} attentions")
    return {
        "form": form,
        "layers": layers,
        "nodes": len(graph.nodes),
        "attentions": attentions,
        "ms": ms,
        "ms first": seconds[0] * 1e3,
        "ms an attention": ms / attentions if attentions else None,
        "µs a node": ms * 1e3 / len(graph.nodes),
        "s Inductor": None,
        "% Inductor": None,
        "% with C++": None,
    }


def measure_compilation(form: str) -> dict[str, Any]:
    """The pass beside the rest of Inductor in one whole compilation, caches off."""
    verdicts: list[Verdict] = []
    timed = Timed(strict=True, record=verdicts.append)
    with config.patch(compile_threads=1):  # so that the C++ compiler is a child of this process
        children = compilers()
        compile_step(WHOLE, FORMS[form], timed)
        inductor = time.process_time() - timed.end
        cpp = compilers() - children
    say(f"{form}: {timed.seconds:.3f} s beside {inductor:.1f} s of Inductor, {cpp:.1f} s of C++")
    return {
        "form": f"{form}, whole compilation",
        "layers": WHOLE,
        "nodes": None,
        "attentions": sum(isinstance(v, MLASite) for v in verdicts),
        "ms": timed.seconds * 1e3,
        "ms first": timed.seconds * 1e3,
        "ms an attention": timed.seconds * 1e3 / WHOLE,
        "µs a node": None,
        "s Inductor": inductor,
        "% Inductor": 100 * timed.seconds / inductor,
        "% with C++": 100 * timed.seconds / (inductor + cpp),
    }


def compilers() -> float:
    """Processor time of the child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4, 16, 61])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--no-compilation", action="store_true", help="leave out the last part")
    args = parser.parse_args()
    origin = provenance(torch.device("cpu"), args.commit)
    rows = [measure_pass(n, form) | origin for form in args.forms for n in args.layers]
    if not args.no_compilation:
        rows += [measure_compilation(form) | origin for form in args.forms]
    print(table(rows, [c for c in rows[0] if c not in origin]))
    write(args.out, "passes", rows)
    return int(any(row["attentions"] != row["layers"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
