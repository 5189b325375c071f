"""MLA decode attention, as people write it.

Every function takes an `Inputs` and nothing else, and returns the output or (output, lse).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tests.spellings import absorbed, expanded, paged, softmaxes
from tests.spellings.common import SCALE, Inputs, absorbed_scores, expand, inputs

__all__ = ["CALLS", "POSITIVES", "SCALE", "Inputs", "absorbed_scores", "expand", "inputs"]

PREFIXES = {
    absorbed: ("absorbed_", "deepseek_"),
    expanded: ("expanded_",),
    softmaxes: ("softmax_", "divided_", "lse_"),
    paged: ("pages_", "tokens_", "requests_"),
}
POSITIVES: list[Callable[[Inputs], Tensor | tuple[Tensor, Tensor]]] = [
    f
    for module, prefixes in PREFIXES.items()
    for name, f in vars(module).items()
    if name.startswith(prefixes) and f.__module__ == module.__name__
]
# Calls of the op where it is not one: what Python loops over, the graph shows one by one.
CALLS = {
    absorbed.absorbed_heads_looped: 4,
    expanded.expanded_heads_looped: 4,
    absorbed.absorbed_sequences_looped: 3,
    paged.requests_by_table: 3,
    paged.requests_by_sdpa: 3,
    paged.requests_by_slot_with_lse: 3,
}
