"""The normal form: attention as a sum of products of indexed leaves, the same for every spelling.

`Evaluator.evaluate(node, index)` reads one element of a tensor expression, top-down: views rewrite
the index (see indexing), contractions become sums over a fresh label, and what is not understood is
a leaf, which is always a correct description.  A softmax is one factor that holds its score in the
same form.
"""

from __future__ import annotations

import enum
import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch.fx import Node

from mla_compile.passes.graph import (
    CASTS,
    CONTRACTIONS,
    FLOATS,
    Size,
    argument,
    aten,
    constant,
    dtype,
    equal,
    is_scalar_tensor,
    shape,
    strip,
)
from mla_compile.passes.indexing import (
    Entry,
    Index,
    Label,
    Leaf,
    Refine,
    Segment,
    broadcast,
    labels_of,
    narrowed,
    refined,
    squeeze,
    whole,
)
from mla_compile.passes.site import Mask, Reason, Refusal, Scalar
from mla_compile.passes.softmax import Attention, is_division
from mla_compile.passes.views import relabel, settle

DIVISIONS = frozenset({aten.div.Tensor, aten.div.Scalar})
SCALINGS = DIVISIONS | {aten.mul.Tensor, aten.mul.Scalar}
# A fill this low replaces the score it is added to: no score has a bit left beside it.
ABSORBING = -1e30
# What torch makes of False in a boolean mask before a fused call (cudnn's; the others get -inf).
FUSED_FILL = -65504.0


@dataclass(frozen=True, eq=False)
class Softmax:
    """The factor softmax over `time` of the sum of `score`, at one row."""

    score: tuple[Term, ...]
    rows: tuple[Label, ...]
    time: tuple[Label, ...]

    @property
    def labels(self) -> frozenset[Label]:
        return frozenset(self.rows + self.time)


@dataclass(frozen=True, eq=False)
class Capped:
    """The factor tanh of the sum of `terms`: a soft cap."""

    terms: tuple[Term, ...]


Factor = Leaf | Softmax | Capped | Mask


@dataclass(frozen=True, eq=False)
class Term:
    """scale · Π scalars · Σ_summed Π factors"""

    factors: tuple[Factor, ...]
    summed: frozenset[Label] = frozenset()
    scale: float = 1.0
    scalars: tuple[Scalar, ...] = ()

    def times(self, other: Term) -> Term:
        return Term(
            self.factors + other.factors,
            self.summed | other.summed,
            self.scale * other.scale,
            self.scalars + other.scalars,
        )


class Context(enum.Enum):
    """How the value that is read will be used, hence what may be taken apart."""

    SCORE = "added up under the softmax: sums, masks and scalings distribute"
    OPERAND = "multiplied in a contraction"
    PRODUCT = "summed over: an elementwise product inside is a contraction"


class Evaluator:
    """Evaluates one attention.

    `eliminate` holds the row labels that the cache does not depend on.  A cache-side tensor that is
    free of them is a leaf: it is the cache, however it was computed.  None means that they are not
    known yet: read on to the end.
    """

    def __init__(self, attention: Attention, eliminate: frozenset[Label] | None):
        self.attention = attention
        self.eliminate = eliminate
        self.time: set[Label] = set()
        self.features: set[Label] = set()
        self.expanded: set[Node] = set()
        self._names = itertools.count()

    def evaluate(self, node: Node, index: Index, context: Context = Context.OPERAND) -> list[Term]:
        index = squeeze(node, index)
        if node is self.attention.softmax and self.attention.scores is not None:
            return [Term((self._softmax(index),))]
        if node.op != "call_function":
            return [Term((Leaf(node, index),))]
        labels = labels_of(index)
        timeless = not labels & self.time and node not in self.attention.path
        if self.attention.total and node in self.attention.path and is_division(node):
            return self._divided(node, index)
        if read := self._relabel(node, index, timeless):
            return self.evaluate(*read, context)
        if source := self._cast(node, labels, context):
            return self.evaluate(source, index, context)
        if scaled := self._scaled(node):
            source, number, scalars = scaled
            terms = self.evaluate(source, broadcast(source, index), context)
            return [replace(t, scale=t.scale * number, scalars=t.scalars + scalars) for t in terms]
        if context is not Context.SCORE and self._stops(node, labels):
            return [Term((Leaf(node, index),))]
        if node.target is operator.getitem and node.args[0] is self.attention.softmax:
            return self._fused(node.args[0], index)
        if node.target in CONTRACTIONS or node.target is aten.sum.dim_IntList:
            self.expanded.add(node)
            return (
                self._contraction(node, index)
                if node.target in CONTRACTIONS
                else self._reduction(node, index)
            )
        if node.target is aten.mul.Tensor and context is Context.PRODUCT:
            a, b = (self.evaluate(x, broadcast(x, index)) for x in node.args)
            return [x.times(y) for x in a for y in b]
        if context is Context.SCORE:
            if (
                node.target is aten.add.Tensor
                and isinstance(node.args[1], Node)
                and argument(node, "alpha", 1) == 1
            ):
                return [
                    t for x in node.args for t in self.evaluate(x, broadcast(x, index), context)
                ]
            if node.target is aten.where.self and (masked := self._masked(node, index)) is not None:
                return masked
            if node.target is aten.tanh.default:
                return [Term((Capped(tuple(self.evaluate(node.args[0], index, context))),))]
        return [Term((Leaf(node, index),))]

    def _stops(self, node: Node, labels: frozenset[Label]) -> bool:
        if node in self.attention.path:
            return False
        return not labels & self.time or (
            self.eliminate is not None and not labels & self.eliminate
        )

    def _relabel(self, node: Node, index: Index, timeless: bool) -> tuple[Node, Index] | None:
        whole_cache = self.eliminate is not None and self._stops(node, labels_of(index))
        try:
            return relabel(node, index)
        except Refine as refine:
            if timeless or (whole_cache and refine.label in self.features):
                return None
            raise
        except Segment as segment:
            if timeless or whole_cache or segment.label not in self.features:
                return None
            raise

    def _cast(self, node: Node, labels: frozenset[Label], context: Context) -> Node | None:
        if node.target not in CASTS or not isinstance(node.args[0], Node):
            return None
        source, wide = node.args[0], dtype(node)
        narrow = dtype(source)
        if narrow not in FLOATS or wide not in FLOATS:
            return None
        exact = wide.itemsize > narrow.itemsize or wide == narrow
        return (
            source if exact or context is Context.SCORE or not self._stops(node, labels) else None
        )

    def _scaled(self, node: Node) -> tuple[Node, float, tuple[Scalar, ...]] | None:
        """node = tensor times or over a number or a 0-d tensor, or -tensor."""
        if node.target is aten.neg.default:
            return node.args[0], -1.0, ()
        if node.target not in SCALINGS:
            return None
        inverse = node.target in DIVISIONS
        for tensor, factor in (node.args, node.args[::-1])[: 1 if inverse else 2]:
            if not isinstance(tensor, Node) or is_scalar_tensor(tensor):
                continue
            if number := constant(factor):
                return tensor, 1 / number if inverse else number, ()
            if is_scalar_tensor(factor) and constant(factor) is None:
                return tensor, 1.0, (Scalar(factor, inverse),)
        return None

    def _sum(self, size: Size, body: Callable[[Entry], list[Term]], time: bool) -> list[Term]:
        """Σ over a fresh label of body(entry); evaluated again when the label has to be split."""
        if equal(size, 1):
            return body(())

        def attempt(entry: Entry) -> list[Term]:
            labels = frozenset(d.label for d in entry if isinstance(d.label, Label))
            if time:
                self.time = set(labels)
            else:
                self.features |= labels
            try:
                return [replace(t, summed=t.summed | labels) for t in body(entry)]
            except Refine as refine:
                if refine.label not in labels:
                    raise
                return attempt(*refined((entry,), refine, *self.split(refine)))
            except Segment as segment:
                if segment.label not in labels:
                    raise
                begins = accumulate(segment.sizes, initial=0)
                pieces = [
                    narrowed((entry,), segment.label, self._fresh("k", n), begin)
                    for begin, n in zip(begins, segment.sizes, strict=False)
                ]
                return [t for piece in pieces for t in attempt(*piece)]

        return attempt(whole(self._fresh("t" if time else "k", size)))

    def _fresh(self, name: str, size: Size) -> Label:
        return Label(f"{name}{next(self._names)}", size)

    def split(self, refine: Refine) -> tuple[Label, Label]:
        name = refine.label.name[0]
        return self._fresh(name, refine.label.size // refine.inner), self._fresh(name, refine.inner)

    def _contraction(self, node: Node, index: Index) -> list[Term]:
        a, b = node.args[-2:]
        *batch, row, column = index

        def product(k: Entry) -> list[Term]:
            left = self.evaluate(a, (*batch, row, k))
            right = self.evaluate(b, (*batch, k, column))
            return [x.times(y) for x in left for y in right]

        terms = self._sum(shape(a)[-1], product, time=node is self.attention.contraction)
        if len(node.args) == 2:
            return terms
        bias: Node = node.args[0]
        alpha, beta = float(argument(node, "alpha", 1)), float(argument(node, "beta", 1))
        terms = [replace(t, scale=t.scale * alpha) for t in terms]
        if beta:
            added = self.evaluate(bias, broadcast(bias, index))
            terms += [replace(t, scale=t.scale * beta) for t in added]
        return terms

    def _reduction(self, node: Node, index: Index) -> list[Term]:
        source: Node = node.args[0]
        sizes = shape(source)
        dims = sorted(d % len(sizes) for d in node.args[1])
        entries = list(index)
        if not argument(node, "keepdim", False):
            for d in dims:
                entries.insert(d, ())

        def nest(position: int, entries: list[Entry]) -> list[Term]:
            if position == len(dims):
                return self.evaluate(source, tuple(entries), Context.PRODUCT)
            d = dims[position]
            inner = lambda k: nest(position + 1, [*entries[:d], k, *entries[d + 1 :]])  # noqa: E731
            return self._sum(sizes[d], inner, time=node is self.attention.contraction)

        return nest(0, entries)

    def _masked(self, node: Node, index: Index) -> list[Term] | None:
        """where(condition, scores, fill), or the additive mask where(condition, 0, fill)."""
        condition, *branches = node.args
        for keep, (kept, other) in ((True, branches), (False, branches[::-1])):
            fill = constant(other)
            if fill is None:
                continue
            mask = Term((Mask(settle(condition, broadcast(condition, index)), keep, fill),))
            if constant(kept) is None:
                terms = self.evaluate(kept, broadcast(kept, index), Context.SCORE)
                # A fill replaces a score; in an added mask it is only added, unless it absorbs.
                replaced = fill <= ABSORBING or any(t.summed for t in terms)
                return [*terms, mask] if replaced else None
            lowest = ABSORBING if self.attention.scores else FUSED_FILL
            if constant(kept) == 0 and fill <= lowest:
                return [mask]
        return None

    def _softmax(self, index: Index) -> Softmax:
        axis, scores = self.attention.axis, self.attention.scores
        digits = index[axis]
        if not all(d.full for d in digits) or {d.label for d in digits} != self.time:
            reason = Reason.SINKS if strip(scores).target is aten.cat.default else Reason.SOFTMAX
            detail = "the probabilities are cut or reordered before they meet the values"
            raise Refusal(reason, detail, self.attention.softmax)
        score = self.evaluate(scores, index, Context.SCORE)
        return self._rows(score, index[:axis] + index[axis + 1 :], digits)

    def _divided(self, node: Node, index: Index) -> list[Term]:
        """Weighed values over the sum of the weights, which has to be that of the same row."""
        weighed, total = node.args
        terms = self.evaluate(weighed, broadcast(weighed, index))
        leaf = settle(total, broadcast(total, index))
        while leaf.node.target in CASTS:
            leaf = settle(leaf.node.args[0], leaf.index)
        rows = [d.label for entry in leaf.index for d in entry if d.full]
        for softmax in (f for t in terms for f in t.factors if isinstance(f, Softmax)):
            if leaf.node is not self.attention.total or rows != [*softmax.rows]:
                more = self.attention.total in leaf.node.all_input_nodes
                reason = Reason.SINKS if more else Reason.SOFTMAX
                detail = f"the weighed values are divided by {leaf}, not the sum of their weights"
                raise Refusal(reason, detail, node)
        return terms

    def _rows(self, score: list[Term], rows: Index, digits: Entry) -> Softmax:
        row_digits = [d for entry in rows for d in entry]
        if not all(d.full for d in row_digits):
            detail = "only some rows of the probabilities are used"
            raise Refusal(Reason.SOFTMAX, detail, self.attention.softmax)
        labels = tuple(d.label for d in row_digits)
        return Softmax(tuple(score), labels, tuple(d.label for d in digits))

    def _fused(self, call: Node, index: Index) -> list[Term]:
        """aten's fused attention calls: q [B, H, Sq, E], k, v and an optional mask."""
        query, key, value = call.args[:3]
        names = [a.name for a in call.target._schema.arguments]
        if argument(call, "is_causal", False):
            detail = "the fused attention call applies its own (top-left) causal mask"
            raise Refusal(Reason.CAUSAL, detail, call)
        if argument(call, "dropout_p", 0.0) != 0.0:
            raise Refusal(Reason.DROPOUT, "the fused attention call drops probabilities", call)
        heads = shape(query)[1]
        if not all(equal(shape(x)[1], 1) or equal(shape(x)[1], heads) for x in (key, value)):
            detail = f"{shape(key)[1]} key heads for {heads} query heads in a fused attention call"
            raise Refusal(Reason.NO_LATENT, detail, call)
        width = shape(query)[-1]
        scale = argument(call, "scale")
        scale = float(width) ** -0.5 if scale is None else float(scale)
        masks = [argument(call, n) for n in ("attn_mask", "attn_bias") if n in names]
        mask = masks[0] if masks else None
        batch, head, row, column = index

        def attend(t: Entry) -> list[Term]:
            def dot(k: Entry) -> list[Term]:
                left = self.evaluate(query, (batch, head, row, k))
                right = self.evaluate(key, (batch, head, t, k))
                return [x.times(y) for x in left for y in right]

            score = [replace(x, scale=x.scale * scale) for x in self._sum(width, dot, time=False)]
            if mask is not None:
                score += self._fused_mask(mask, broadcast(mask, (batch, head, row, t)))
            softmax = Term((self._rows(score, (batch, head, row), t),))
            return [softmax.times(v) for v in self.evaluate(value, (batch, head, t, column))]

        return self._sum(shape(key)[2], attend, time=True)

    def _fused_mask(self, mask: Node, index: Index) -> list[Term]:
        if dtype(mask) is torch.bool:
            return [Term((Mask(settle(mask, index), True, float("-inf")),))]
        terms = self.evaluate(mask, index, Context.SCORE)
        return [replace(t, factors=tuple(map(boolean, t.factors))) for t in terms]


def boolean(factor: Factor) -> Factor:
    """A fill with which torch writes a boolean mask for a fused call, which hides the token.

    A lower one is the user's: where it hides all tokens of a row, their average is wanted.
    """
    if (
        isinstance(factor, Mask)
        and factor.fill is not None
        and ABSORBING < factor.fill <= FUSED_FILL
    ):
        return replace(factor, fill=float("-inf"))
    return factor
