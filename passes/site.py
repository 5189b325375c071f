"""What an attention is: terms in normal form, then an `MLASite`, to be rewritten, or a `Miss`."""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

from torch.fx import Node

from mla_compile.passes.indexing import Label, Leaf
from mla_compile.passes.sizes import Size, numel


class Reason(enum.Enum):
    """Why an attention was left alone.  The value is what the user can do about it."""

    NO_LATENT = (
        "MLA needs keys and values that share one latent cache; "
        "a cache of per-head keys cannot be absorbed"
    )
    VALUE = "use the latent part of the keys as the values, from the same cache, rows and positions"
    SCORE = "write the score as (q_nope·kv_c + q_pe·k_pe)·scale, then a mask, then softmax"
    SCALE = "use one finite positive softmax scale for the whole call"
    MASK = "use one boolean mask, one additive mask, or both with a fill of -inf or finfo.min"
    ESCAPE = (
        "do not return or reuse scores, probabilities or expanded keys and values "
        "(output_attentions=False)"
    )
    SOFTMAX = (
        "normalise over all cached tokens, with nothing added to or cut from the probabilities"
    )
    CAUSAL = "pass the causal mask explicitly, or decode one token at a time"
    TRAINING = "decode under torch.no_grad() or torch.inference_mode(): the op has no backward"
    DROPOUT = "run in eval mode"
    PREFILL = "nothing to do: with this many queries expanding the cache is the cheaper way"
    LAYOUT = "keep batch, head and feature dimensions of queries, cache and weights separate"
    DYNAMIC = (
        "keep factors and the numbers of heads and features static, bound that of queries where "
        "the cache is expanded: torch._dynamo.mark_dynamic(x, dim, min=2, max=8)"
    )
    DTYPE = (
        "keep the caches in one of bfloat16, float16 and float32, and compute and use the output "
        "in that type (cast the model instead of autocast)"
    )
    SINKS = "the op has no sinks: an extra column under the softmax cannot be kept"
    BETWEEN = (
        "put nothing but W_UK and W_UV between the latent and the keys and values (merge adapters "
        "into them); rotate rope dimensions apart"
    )
    QUANTISED = (
        "keep kv_b_proj in a floating type, or dequantise it before it is multiplied, so that it "
        "can be absorbed into query and output"
    )
    FLEX = 'use eager or sdpa attention (attn_implementation="sdpa") instead of flex_attention'
    NO_QUERY = "nothing to do: this softmax is of no queries times keys, hence no attention"


def source_line(node: Node) -> str:
    """file:line of the innermost frame of the user's code that made `node`, or '?'."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'^ *File "(.*)", line (\d+)', trace, re.MULTILINE)
    return ":".join(frames[-1]) if frames else "?"


@dataclass(frozen=True)
class Miss:
    """An attention that was left as it was, and the node that is the reason."""

    reason: Reason
    detail: str
    node: Node
    attention: Node

    @property
    def where(self) -> str:
        return source_line(self.attention)

    @property
    def remedy(self) -> str:
        return self.reason.value

    def __str__(self) -> str:
        return f"left alone: {self.where}: {self.detail} ({self.reason.name}); {self.remedy}"


class Refusal(Exception):
    """Raised inside the recogniser; becomes a Miss."""

    def __init__(self, reason: Reason, detail: str, node: Node | None = None):
        super().__init__(detail)
        self.reason, self.detail, self.node = reason, detail, node

    def miss(self, attention: Node) -> Miss:
        return Miss(self.reason, self.detail, self.node or attention, attention)


@dataclass(frozen=True)
class Mask:
    """One mask on the scores.

    With a `fill` a boolean tensor: scores become `fill` where it is not `keep`, or only the
    `addend` of that number, a part of them.
    Without one `scale` times a tensor that is added to the scores.
    """

    leaf: Leaf
    keep: bool = True
    fill: float | None = None
    scale: float = 1.0
    addend: int = 0


@dataclass(frozen=True)
class Lengths:
    """Sequence b sees the tokens before Σ terms[b] + constant, terms being integer tensors."""

    terms: tuple[Leaf, ...]
    constant: Size
    fill: float


@dataclass(frozen=True)
class Paging:
    """The caches are gathered from pools of pages: kv_c[b, (p, slot)] = pool[table[b, p], slot].

    The table's pages may hold more tokens than the site reads.
    """

    keys: tuple[Leaf, ...]  # kv_c and, where there is rope, k_pe
    table: Leaf
    page: Label
    pages: tuple[Label, ...]
    slots: tuple[Label, ...]


@dataclass(frozen=True)
class Scalar:
    """A tensor of one element that multiplies a term, or divides it."""

    node: Node
    inverse: bool


@dataclass(frozen=True, eq=False)
class Softmax:
    """The factor softmax over `time` of the sum of `score`, at one row."""

    score: tuple[Term, ...]
    rows: tuple[Label, ...]
    time: tuple[Label, ...]


@dataclass(frozen=True, eq=False)
class Capped:
    """The factor tanh of the sum of `terms`: a soft cap."""

    terms: tuple[Term, ...]


Factor = Leaf | Softmax | Capped | Mask


@dataclass(frozen=True, eq=False)
class Term:
    """scale · Π scalars · Σ_summed Π factors, over the sum of the weights as often as `divided`."""

    factors: tuple[Factor, ...]
    summed: frozenset[Label] = frozenset()
    scale: float = 1.0
    scalars: tuple[Scalar, ...] = ()
    divided: int = 0

    def times(self, other: Term) -> Term:
        return Term(
            self.factors + other.factors,
            self.summed | other.summed,
            self.scale * other.scale,
            self.scalars + other.scalars,
            self.divided + other.divided,
        )


@dataclass(frozen=True)
class CacheTerm:
    """scale · Π scalars · Π factors · key, a row of the cache that has a feature.

    Of a score the factors are the query and, where the key is expanded, W_UK; of the values W_UV.
    """

    factors: tuple[Leaf, ...]
    key: Leaf
    feature: Label
    scale: float
    scalars: tuple[Scalar, ...]


def nodes_in(value: Any) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, tuple):
        for x in value:
            yield from nodes_in(x)
    elif is_dataclass(value):
        yield from nodes_in(tuple(vars(value).values()))


def span(labels: Iterable[Label]) -> Size:
    """How many values the labels run over together."""
    return numel(x.size for x in labels)


@dataclass(frozen=True)
class MLASite:
    """MLA attention in normal form.  The emitter needs nothing else of the graph.

    out[batch, queries, heads, *value_labels] = Σ_time softmax(latent + rope + masks) · values plus
    `biases`, or 0 where one of `zeroed` does not keep it; the scores under `logit_cap` if that is
    not 0.  `rows` are batch, queries and heads in the graph's order.
    """

    softmax: Node
    root: Node
    out: tuple[Label, ...]
    rows: tuple[Label, ...]
    batch: tuple[Label, ...]
    queries: tuple[Label, ...]
    heads: tuple[Label, ...]
    time: tuple[Label, ...]
    latent: CacheTerm
    rope: CacheTerm | None
    values: CacheTerm
    biases: tuple[Leaf, ...]
    zeroed: tuple[Mask, ...]  # of whole rows
    masks: tuple[Mask, ...]
    lengths: Lengths | None
    causal: bool  # query q sees the tokens up to Skv - Sq + q
    logit_cap: float
    paging: Paging | None
    lse: tuple[Node, ...]

    @property
    def where(self) -> str:
        return source_line(self.softmax)

    @property
    def expanded(self) -> bool:
        """K or V is expanded from the latent: W_UK moves to the query, W_UV to the output."""
        return len(self.latent.factors) > 1 or bool(self.values.factors)

    @property
    def inputs(self) -> set[Node]:
        """What the emitter reads."""
        return {*nodes_in(self)} - {self.softmax, self.root, *self.lse}

    @property
    def terms(self) -> list[CacheTerm]:
        """The contractions under the softmax."""
        return [self.latent, self.rope] if self.rope else [self.latent]

    @property
    def dims(self) -> dict[str, Size]:
        """Sizes by the names of DESIGN.md's symbol table."""
        Lkv, queries = self.latent.feature, self.latent.factors
        rows = frozenset(self.batch + self.queries + self.heads)
        projected = frozenset().union(*(q.labels for q in queries)) - rows - {Lkv}
        return {
            "B": span(self.batch),
            "Sq": span(self.queries),
            "Skv": span(self.time),
            "N": span(self.heads),
            "Lkv": Lkv.size,
            "R": self.rope.feature.size if self.rope else 0,
            "P": span(projected) if len(queries) > 1 else Lkv.size,
            "V": span(frozenset(self.out) - rows),
        }

    @property
    def family(self) -> str:
        cache = "two caches"
        if self.rope is None:
            cache = "no rope"
        elif self.rope.key.node is self.latent.key.node:
            cache = "one fused cache"
        paged = ", paged" if self.paging else ""
        return f"{'expanded from the latent' if self.expanded else 'absorbed'}, {cache}{paged}"

    @property
    def mask(self) -> str:
        kinds = ["length"] * bool(self.lengths) + ["causal"] * self.causal
        kinds += ["bool" if m.fill is not None else "additive" for m in self.masks]
        return " + ".join(kinds) or "none"

    def __str__(self) -> str:
        return f"rewritten: {self.where} ({self.family}), mask {self.mask}, {self.dims}"
