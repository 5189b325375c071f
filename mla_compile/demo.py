"""A Hugging Face DeepSeek-V3 decodes the same tokens under torch.compile and backend="mla".

Random weights, real MLA dimensions, few layers, a small vocabulary and MLP. Both forms and the
float64 reference start from one static cache of random latents. All three are fed the tokens that
the reference picks greedily, so that logits and choices stay comparable at every step.
"""

import argparse
import copy
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, StaticCache
from transformers.cache_utils import StaticLayer

from mla_compile.report import reporting

START = time.perf_counter()
PASSES = 3  # over the same tokens: a median of so few steps would follow a busy machine


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START:5.0f} s] {text}", flush=True)


@contextmanager
def progress(text: str, every: float = 5.0) -> Iterator[None]:
    """Says what goes on, and that it still goes on."""
    say(text)
    done = threading.Event()

    def tick() -> None:
        while not done.wait(every):
            say(f"{text}, still")

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@dataclass(frozen=True)
class Run:
    """What one form made of the same decode steps."""

    logits: Tensor  # [tokens, B, vocabulary], float64 on the CPU
    seconds: list[float]  # of each step

    def ms(self, statistic: Callable[[list[float]], float]) -> float:
        return statistic(self.seconds) * 1e3

    @property
    def tokens(self) -> Tensor:
        return self.logits.argmax(-1)


def make_model(args: argparse.Namespace, device: torch.device) -> DeepseekV3ForCausalLM:
    config = DeepseekV3Config(
        vocab_size=512,
        hidden_size=args.hidden,
        intermediate_size=args.hidden,
        num_hidden_layers=args.layers,
        first_k_dense_replace=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        q_lora_rank=256,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=args.context + args.tokens,
        initializer_range=0.06,  # wide enough that the softmax is far from uniform
    )
    config._attn_implementation = args.attention
    model: DeepseekV3ForCausalLM = DeepseekV3ForCausalLM(config).eval().requires_grad_(False)
    nn.Module.to(model, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    return model


def make_latents(
    model: DeepseekV3ForCausalLM, batch: int, context: int
) -> list[tuple[Tensor, Tensor]]:
    """Per layer kv_c and k_pe, each [B, 1, context, width]."""
    config = model.config

    def randn(width: int) -> Tensor:
        return torch.randn(batch, 1, context, width).to(model.device, model.dtype)

    return [
        (randn(config.kv_lora_rank), randn(config.qk_rope_head_dim))
        for _ in range(config.num_hidden_layers)
    ]


def make_cache(
    config: DeepseekV3Config, latents: list[tuple[Tensor, Tensor]], tokens: int
) -> StaticCache:
    cache = StaticCache(config, max_cache_len=latents[0][0].shape[2] + tokens)
    for layer, (kv_c, k_pe) in enumerate(latents):
        cache.update(kv_c, k_pe, layer)
    return cache


def rewind(cache: StaticCache, context: int) -> None:
    """Forgets the decoded tokens in place: compiled code holds on to the cache's addresses."""
    for layer in cache.layers:
        cast(StaticLayer, layer).cumulative_length.fill_(context)


def decode(model: nn.Module, cache: StaticCache, inputs: Tensor) -> Run:
    """One step per row of inputs [tokens, B]."""
    logits, seconds = [], []
    for token in inputs:
        start = time.perf_counter()
        step = model(input_ids=token[:, None], past_key_values=cache, use_cache=True).logits
        logits.append(step[:, -1].double().cpu())  # waits for the device
        seconds.append(time.perf_counter() - start)
    return Run(torch.stack(logits), seconds)


def reference(
    model: DeepseekV3ForCausalLM, latents: list[tuple[Tensor, Tensor]], first: Tensor, tokens: int
) -> tuple[Tensor, Tensor]:
    """Greedy decoding in float64, eagerly, one sequence at a time: inputs and logits per step."""
    exact = copy.deepcopy(model).double()
    exact.config._attn_implementation = "eager"
    inputs, logits = [], []
    for b, token in enumerate(first):
        own = [(kv_c[b : b + 1].double(), k_pe[b : b + 1].double()) for kv_c, k_pe in latents]
        cache = make_cache(exact.config, own, tokens)
        for _ in range(tokens):
            inputs.append(token)
            step = exact(input_ids=token.view(1, 1), past_key_values=cache, use_cache=True).logits
            logits.append(step[0, -1].cpu())
            token = step[0, -1].argmax()
    B = len(first)
    return (
        torch.stack(inputs).view(B, tokens).T.contiguous(),
        torch.stack(logits).view(B, tokens, -1).transpose(0, 1),
    )


def compile_and_decode(
    model: nn.Module, cache: StaticCache, inputs: Tensor, context: int, backend: str
) -> Run:
    """The first pass compiles and warms up, the others count."""
    torch.compiler.reset()
    compiled = cast(nn.Module, torch.compile(model, backend=backend))
    with progress(f"backend={backend!r}: compiling"):
        decode(compiled, cache, inputs)
    say(f"backend={backend!r}: decoding")
    seconds = []
    for _ in range(PASSES):
        rewind(cache, context)
        run = decode(compiled, cache, inputs)
        seconds += run.seconds
    rewind(cache, context)
    return Run(run.logits, seconds)


def beyond_rounding(plain: Run, ours: Run, exact: Tensor) -> int:
    """Tokens on which the forms differ though float64 holds them further apart than plain errs."""
    first, second = (exact.gather(-1, run.tokens[..., None]) for run in (plain, ours))
    gap = (first - second).abs()
    return int((gap > 2 * (plain.logits - exact).abs().max()).sum())


def report(plain: Run, ours: Run, exact: Tensor, rewritten: int, found: int) -> str:
    forms = (plain, ours)
    errors = (f"{(run.logits - exact).abs().max():.2e}" for run in forms)
    equal = (str(int((run.tokens == exact.argmax(-1)).sum())) for run in forms)
    rows = [
        ("", "torch.compile", 'backend="mla"', ""),
        ("attention sites rewritten", "", f"{rewritten} of {found}", ""),
        ("largest logit difference", *errors, "from float64"),
        ("tokens equal", *equal, f"of {plain.tokens.numel()}, to float64's"),
    ]
    # On a machine with other work the median says more about that work than about the model.
    for name, statistic in (("median", statistics.median), ("fastest", min)):
        a, b = (run.ms(statistic) for run in forms)
        rows.append((f"ms per token, {name}", f"{a:.2f}", f"{b:.2f}", f"speedup {a / b:.1f}x"))
    return "\n".join(f"{a:26}{b:>15}{c:>15}  {d}".rstrip() for a, b, c, d in rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if gpu else "cpu")
    parser.add_argument("--batch", type=int, default=16 if gpu else 1)
    parser.add_argument("--context", type=int, default=4096, help="cached tokens")
    parser.add_argument("--tokens", type=int, default=8, help="tokens to decode")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=128 if gpu else 16)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--seed", type=int, default=0)


@torch.no_grad()
def main(args: argparse.Namespace) -> int:
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    model = make_model(args, device)
    config = model.config
    say(
        f"DeepSeek-V3, random weights: {args.layers} layers, {args.heads} heads, latent 512 + 64, "
        f"batch {args.batch}, {args.context} cached tokens, {model.dtype}, {device}"
    )
    latents = make_latents(model, args.batch, args.context)
    first = torch.randint(config.vocab_size, (args.batch,), device=device)
    with progress("float64 reference"):
        inputs, exact = reference(model, latents, first, args.tokens)

    cache = make_cache(config, latents, args.tokens)
    plain = compile_and_decode(model, cache, inputs, args.context, "inductor")
    with reporting() as found:
        ours = compile_and_decode(model, cache, inputs, args.context, "mla")

    rewritten = len(found.sites)
    print(report(plain, ours, exact, rewritten, rewritten + len(found.misses)))
    for miss in found.misses:
        print(f"not rewritten: {miss.where}: {miss.detail}. {miss.remedy}")
    differ = beyond_rounding(plain, ours, exact)
    if differ:
        print(f"{differ} tokens differ by more than rounding")
    return int(differ > 0 or rewritten == 0)
