"""Every MLA model of transformers: each MLA layer is rewritten, or refused for a listed reason.

pytest runs one case of each model, with --all-cases another that differs in everything.
`python -m tests.test_models` runs all, or those of the models given, and prints the table.
"""

from __future__ import annotations

import copy
import sys
import time
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import transformers
from transformers import CompileConfig

import mla_compile
from bench.common import say, table
from mla_compile.passes.site import Reason
from tests.compiling import OP, Compiled, error
from tests.models import CACHES, MODELS, PROMPT, Case, build, decode, missing


@dataclass(frozen=True)
class Outcome:
    """What became of the attentions of one model, and how far its result is from float64's."""

    rewritten: int
    ops: int
    misses: Counter[Reason]
    error: float
    plain: float


def run(name: str, case: Case) -> Outcome:
    lm = build(name, case.attention, case.dtype)
    double = copy.deepcopy(lm).double()
    new_cache = CACHES[case.cache]
    exact = decode(double, double, new_cache(lm), case.Sq)
    plain = decode(lm, lm, new_cache(lm), case.Sq)
    compiled = Compiled(lm, fullgraph=False)  # some route experts by numbers
    with torch._dynamo.config.patch(MODELS[name].dynamo):
        result = decode(compiled, lm, new_cache(lm), case.Sq)
    return Outcome(
        len(compiled.sites),
        compiled.count(OP),
        Counter(miss.reason for miss in compiled.misses),
        error(result, exact),
        error(plain, exact),
    )


def faults(name: str, outcome: Outcome) -> list[str]:
    """What is not as the table of models has it."""
    model = MODELS[name]
    checks = {
        f"not {model.rewritten} rewritten": outcome.rewritten == outcome.ops == model.rewritten,
        "other misses": model.expects(outcome.misses),
        "more than twice plain PyTorch's error": outcome.error <= 2 * outcome.plain,
        "plain PyTorch's error is too large to compare with": outcome.plain < 0.1,
    }
    return [what for what, holds in checks.items() if not holds]


def two_cases() -> list[tuple[str, Case]]:
    """Two that differ in every value, and other two for the next model, so that all values meet."""
    chosen = []
    for i, (name, model) in enumerate(MODELS.items()):
        k = i % (len(model.cases) // 2)
        chosen += [(name, model.cases[k]), (name, model.cases[-1 - k])]
    return chosen


BY_TURNS = [
    pytest.param(*case, marks=[pytest.mark.extra] if i % 2 != i // 2 % 2 else [])
    for i, case in enumerate(two_cases())
]


@pytest.mark.parametrize("name, case", BY_TURNS, ids=str)
def test_every_mla_layer_is_rewritten_or_refused_as_listed(name: str, case: Case) -> None:
    if why := missing(name):
        pytest.skip(why)
    outcome = run(name, case)
    assert faults(name, outcome) == [], outcome


# The template of most, one with an indexer, and a hybrid with linear attention.
@pytest.mark.parametrize(
    "name, attention",
    [
        ("deepseek_v3", "sdpa"),
        pytest.param("deepseek_v32", "sdpa", marks=pytest.mark.extra),
        pytest.param("deepseek_v32", "eager", marks=pytest.mark.extra),
        pytest.param("kimi_linear", "sdpa", marks=pytest.mark.extra),
    ],
)
@torch.no_grad()
def test_generate_with_a_static_cache_takes_the_pass_by_enable(name: str, attention: str) -> None:
    if why := missing(name):
        pytest.skip(why)
    lm = build(name, attention)
    ids = PROMPT.clone()
    ids[1, :4] = lm.config.pad_token_id
    arguments = {
        "attention_mask": ids != lm.config.pad_token_id,
        "max_new_tokens": 4,
        "do_sample": False,
        "cache_implementation": "static",
    }
    expected = lm.generate(ids, **arguments, disable_compile=True)
    torch._dynamo.reset()
    mla_compile.counters.clear()
    on_cpu = CompileConfig(mode="default", dynamic=False)
    on_cpu._compile_all_devices = True  # generate compiles by itself, but on a CPU only when told
    with mla_compile.enable(), torch._inductor.config.patch(force_disable_caches=True):
        result = lm.generate(ids, **arguments, compile_config=on_cpu)
    assert torch.equal(result, expected)
    model = MODELS[name]
    assert mla_compile.counters == Counter(rewritten=model.rewritten, missed=model.missed)


def main(names: list[str]) -> int:
    """Print a row for each case of each model; the exit status says whether all are as expected."""
    rows = []
    for name in names or MODELS:
        if why := missing(name):
            say(f"{name} skipped: {why}")
            continue
        for case in MODELS[name].cases:
            start = time.perf_counter()
            outcome = run(name, case)
            left = [f"{n} {reason.name}" for reason, n in outcome.misses.items()]
            row = {"model": name, **vars(case)}
            row |= {"rewritten": f"{outcome.rewritten} of {MODELS[name].layers}"}
            row |= {"left": ", ".join(left) or None, "error": f"{outcome.error:.1e}"}
            row |= {"plain": f"{outcome.plain:.1e}", "seconds": time.perf_counter() - start}
            row |= {"fault": "; ".join(faults(name, outcome)) or None}
            rows.append(row)
            say(f"{name} {case}: error {row['error']}, {row['fault'] or 'as expected'}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    print(table(rows, list(rows[0])))
    return int(any(row["fault"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
