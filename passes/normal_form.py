"""The normal form: attention as a sum of products of indexed leaves, the same for every spelling.

`Evaluator.evaluate(node, index)` reads one element of a tensor expression, top-down: views rewrite
the index (see indexing), contractions become sums over a fresh label, and what is not understood is
a leaf, which is always a correct description.  A softmax is one factor that holds its score in the
same form.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable
from dataclasses import replace
from math import inf

import torch
from torch.fx import Node

from mla_compile.passes.graph import (
    CONTRACTIONS,
    DIVISIONS,
    FLOATS,
    SCALINGS,
    argument,
    aten,
    cast_of,
    constant,
    dtype,
    in_type,
    is_scalar_tensor,
    is_sum,
    is_tensor,
    rounds,
    shape,
    strip,
    summed,
    unchanged,
)
from mla_compile.passes.indexing import (
    Entry,
    Index,
    Label,
    Leaf,
    Split,
    broadcast,
    labels_of,
    relabel,
    rows_of,
    settle,
    split_at,
    splitting,
    whole,
)
from mla_compile.passes.site import Capped, Mask, Reason, Refusal, Scalar, Softmax, Term
from mla_compile.passes.sizes import Size, equal
from mla_compile.passes.softmax import Attention, division, sees_nothing, unread, unzeroed
from mla_compile.reference import ABSORBING

# What torch makes of False in a boolean mask before cuDNN's fused call (the others get -inf).
CUDNN, FUSED_FILL = aten._scaled_dot_product_cudnn_attention.default, -65504.0


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
        self.time: frozenset[Label] = frozenset()
        self.features: set[Label] = set()
        self.expanded = {*attention.path}
        self.addend = self.addends = 0  # which of the scores' is read, 0 for all that they are

    def evaluate(self, node: Node, index: Index, context: Context = Context.OPERAND) -> list[Term]:
        """Of what is not understood, a leaf; but the weights are followed all the way."""
        index, of_weights = broadcast(node, index), node in self.attention.path
        node = node if of_weights else self.attention.twins.get(node, node)
        if terms := self._read(node, index, context):
            return terms
        if of_weights:
            raise unread(node)
        return [Term((Leaf(node, index),))]

    def _read(self, node: Node, index: Index, context: Context) -> list[Term] | None:
        attention, of_weights = self.attention, node in self.attention.path
        if node is attention.node and attention.scores is not None:
            return [Term((self._softmax(index),))]
        if of_weights and attention.totals and (parts := division(node)):
            return self._divided(*parts, index)
        if of_weights and (kept := unzeroed(node)):
            return self._zeroed(node, kept, index)
        if read := self._relabel(node, index):
            return self.evaluate(*read, context)
        if dtype(node) not in FLOATS:
            return None
        if source := cast_of(node):
            return self._cast(node, source, index, context)
        if scaled := scaling(node):
            source, factor = scaled
            return [t.times(factor) for t in self.evaluate(source, index, context)]
        if context is not Context.SCORE and self._stops(node, index):
            return None
        if node.target is operator.getitem and node.args[0] is attention.node:
            return self._fused(node.args[0], index)
        if node.target in CONTRACTIONS:
            return self._contraction(node, index)
        if is_sum(node):
            return self._reduction(node, index)
        product = node.target is aten.mul.Tensor and all(map(is_tensor, node.args))
        if product and context is Context.PRODUCT:
            return self._product(*((x, index) for x in node.args))
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and all(map(is_tensor, node.args)):
            return self._added(node, index, context)
        if context is Context.SCORE:
            if node.target is aten.where.self:
                return self._masked(node, index)
            if node.target is aten.tanh.default:
                return [Term((Capped(tuple(self.evaluate(node.args[0], index, context))),))]
        return None

    def _stops(self, node: Node, index: Index) -> bool:
        if node in self.attention.path:
            return False
        labels = labels_of(index)
        rows = labels if self.eliminate is None else labels & self.eliminate
        return not (labels & self.time and rows)

    def _relabel(self, node: Node, index: Index) -> tuple[Node, Index] | None:
        """What the view reads.  Where that differs by parts of a label, it may be a leaf itself."""
        try:
            return relabel(node, index)
        except Split as split:
            stops, of_feature = self._stops(node, index), split.label in self.features
            timeless = not labels_of(index) & self.time
            nested = len(split.ways) == 1  # into an outer and an inner label
            if (stops and (timeless or of_feature)) if nested else (stops or not of_feature):
                return None
            raise

    def _cast(self, node: Node, source: Node, index: Index, context: Context) -> list[Term] | None:
        """What is cast, if nothing is lost by that or the attention computes in another type."""
        score = context is Context.SCORE
        if rounds(node) and not score and self._stops(node, index):
            return None
        terms = self.evaluate(source, index, context)
        if not (rounds(node) and score):
            return terms
        return None if is_bias(terms) else [rounded(t, dtype(node)) for t in terms]

    def _sum(self, sizes: list[Size], body: Callable[..., list[Term]], time: bool) -> list[Term]:
        """Σ over a fresh label for each size of body(*entries), again where one has to be split."""

        def over(index: Index) -> list[Term]:
            labels = labels_of(index)
            if time:
                self.time = labels
            else:
                self.features |= labels
            return [replace(t, summed=t.summed | labels) for t in body(*index)]

        labels = (Label("t" if time else "k", n) for n in sizes)
        return splitting(tuple(() if equal(x.size, 1) else whole(x) for x in labels), over)

    def _product(self, *factors: tuple[Node, Index]) -> list[Term]:
        left, right = (self.evaluate(*factor) for factor in factors)
        return [x.times(y) for x in left for y in right]

    def _contraction(self, node: Node, index: Index) -> list[Term]:
        self.expanded.add(node)
        *added, a, b = node.args
        *batch, row, column = index
        alpha, beta = number(node, "alpha"), number(node, "beta")
        terms = self._sum(
            [shape(a)[-1]],
            lambda k: self._product((a, (*batch, row, k)), (b, (*batch, k, column))),
            time=node in self.attention.path,
        )
        bias = [term for x in added if beta for term in self.evaluate(x, index)]
        factors = [(t, alpha) for t in terms] + [(t, beta) for t in bias]
        return [replace(t, scale=t.scale * factor) for t, factor in factors]

    def _reduction(self, node: Node, index: Index) -> list[Term]:
        self.expanded.add(node)
        source: Node = node.args[0]
        sizes = shape(source)
        dims = sorted(d % len(sizes) for d in summed(node) or range(len(sizes)))
        if not argument(node, "keepdim", False):
            for d in dims:
                index = (*index[:d], (), *index[d:])

        def read(*entries: Entry) -> list[Term]:
            at = dict(enumerate(index)) | dict(zip(dims, entries, strict=True))
            return self.evaluate(source, tuple(at.values()), Context.PRODUCT)

        return self._sum([sizes[d] for d in dims], read, time=node in self.attention.path)

    def _added(self, node: Node, index: Index, context: Context) -> list[Term] | None:
        """Parts of the scores; or a row of keys or values, and a bias that all tokens have."""
        sign = -1.0 if node.target is aten.sub.Tensor else 1.0
        factors = Term(()), Term((), scale=sign * number(node, "alpha"))
        parts = list(zip(node.args, factors, strict=True))
        if context is Context.SCORE:
            parts = [(x, factor) for x, factor in parts if constant(x) != 0] or parts
            return [t.times(factor) for x, factor in parts for t in self._addend(x, index)]
        if all(labels_of(broadcast(x, index)) & self.time for x in node.args):
            return None
        self.expanded.add(node)
        return [t.times(f) for x, f in parts for t in self.evaluate(x, index, context)]

    def _addend(self, node: Node, index: Index) -> list[Term]:
        """A part of the scores that others are added to."""
        self.addends += 1
        self.addend = self.addends
        return self.evaluate(node, index, Context.SCORE)

    def _masked(self, node: Node, index: Index) -> list[Term] | None:
        """where(condition, scores, fill), or the additive mask where(condition, 0, fill).

        In a part of the scores, only a fill that absorbs the others hides a token.
        """
        condition, *branches = node.args
        for keep, (kept, other) in ((True, branches), (False, branches[::-1])):
            if (fill := constant(other)) is None:
                continue
            fill = in_type(fill, dtype(node))
            if fill == FUSED_FILL and self.attention.node.target is CUDNN:
                fill = -inf
            absorbs = fill <= ABSORBING
            mask = Term((Mask(settle(condition, index), keep, fill, addend=self.addend),))
            if constant(kept) is None and (absorbs or not self.addend):
                terms = self.evaluate(kept, index, Context.SCORE)
                return None if self.addend and is_bias(terms) else [*terms, mask]
            if constant(kept) == 0 and absorbs and self.addend:
                return [mask]
        return None

    def _softmax(self, index: Index) -> Softmax:
        axis, scores = self.attention.axis, self.attention.scores
        digits = index[axis]
        if not all(d.full for d in digits) or labels_of((digits,)) != self.time:
            added = strip(scores).target in (aten.cat.default, aten.constant_pad_nd.default)
            reason = Reason.SINKS if added else Reason.SOFTMAX
            detail = "the probabilities are cut or reordered before they meet the values"
            raise Refusal(reason, detail)
        self.addend = 0
        score = self.evaluate(scores, index, Context.SCORE)
        return self._rows(score, index[:axis] + index[axis + 1 :], digits)

    def _zeroed(self, node: Node, source: Node, index: Index) -> list[Term] | None:
        """Probabilities of which whole rows are set to zero; those that see nothing are anyway."""
        terms, of = self.evaluate(source, index), self.attention
        mask = Mask(settle(node.args[0], index), source is node.args[1], 0.0)
        empty = not mask.keep and sees_nothing(mask.leaf.node, of.scores)
        if empty and {softmax.rows for softmax in softmaxes(terms)} == {rows_of(mask.leaf)}:
            return terms
        if mask.leaf.labels & self.time:
            detail = f"probabilities of some tokens are set to zero by {mask.leaf}"
            raise Refusal(Reason.SOFTMAX, detail, node)
        return [t.times(Term((mask,))) for t in terms] if softmaxes(terms) else None

    def _divided(self, weighed: Node, by: Node, inverse: bool, index: Index) -> list[Term] | None:
        """Weighed values over the sum of the weights, which has to be that of the same row."""
        terms = self.evaluate(weighed, index)
        leaf = settle(by, index)
        while unchanged(leaf.node) or (inverse and leaf.node.target is aten.reciprocal.default):
            inverse &= unchanged(leaf.node)
            leaf = settle(leaf.node.args[0], leaf.index)
        totals = self.attention.totals
        for softmax in softmaxes(terms):
            if inverse or leaf.node not in totals or rows_of(leaf) != softmax.rows:
                sinks = leaf.node.target is aten.add.Tensor and {*leaf.node.args} & {*totals}
                reason = Reason.SINKS if sinks else Reason.SOFTMAX
                detail = f"the weighed values are divided by {leaf}, not the sum of their weights"
                raise Refusal(reason, detail, self.attention.root)
        return [replace(t, divided=t.divided + 1) for t in terms] if softmaxes(terms) else None

    def _rows(self, score: list[Term], rows: Index, time: Entry) -> Softmax:
        digits = [d for entry in rows for d in entry]
        if not all(d.full for d in digits):
            raise Refusal(Reason.SOFTMAX, "only some rows of the probabilities are used")
        return Softmax(tuple(score), tuple(d.label for d in digits), tuple(d.label for d in time))

    def _fused(self, call: Node, index: Index) -> list[Term]:
        """aten's fused attention calls: q [B, H, Sq, E], k, v and an optional mask."""
        query, key, value = call.args[:3]
        if argument(call, "is_causal", False):
            detail = "the fused attention call applies its own (top-left) causal mask"
            raise Refusal(Reason.CAUSAL, detail)
        if argument(call, "dropout_p", 0.0) != 0.0:
            raise Refusal(Reason.DROPOUT, "the fused attention call drops probabilities")
        heads, of_keys, width = shape(query)[1], shape(key)[1], shape(query)[3]
        scale = float(argument(call, "scale", width**-0.5))
        mask = argument(call, "attn_mask", argument(call, "attn_bias"))
        *rows, column = index
        batch, head, _ = rows
        of_k, of_v = (split_at(head, heads // shape(x)[1]) for x in (key, value))
        if of_k is None or of_v is None:
            detail = f"{of_keys} key heads for {heads} query heads in a fused attention call"
            raise Refusal(Reason.NO_LATENT, detail)

        def attend(t: Entry) -> list[Term]:
            score = self._sum(
                [width],
                lambda k: self._product((query, (*rows, k)), (key, (batch, of_k[0], t, k))),
                time=False,
            )
            score = [replace(x, scale=x.scale * scale) for x in score]
            if mask is not None and dtype(mask) is torch.bool:
                score.append(Term((Mask(settle(mask, (*rows, t)), True, -inf),)))
            elif mask is not None:
                score += self._addend(mask, (*rows, t))
            softmax = Term((self._rows(score, tuple(rows), t),))
            return [softmax.times(v) for v in self.evaluate(value, (batch, of_v[0], t, column))]

        return self._sum([shape(key)[2]], attend, time=True)


def softmaxes(terms: list[Term]) -> list[Softmax]:
    return [f for t in terms for f in t.factors if isinstance(f, Softmax)]


def is_bias(terms: list[Term]) -> bool:
    """An additive mask, without scores and not of boolean masks alone."""
    scores = any(t.summed or isinstance(t.factors[0], Capped) for t in terms)
    return not scores and any(isinstance(f, Leaf) for t in terms for f in t.factors)


def rounded(term: Term, type_: torch.dtype) -> Term:
    """The term, if it is a boolean mask with the fill that is left of its own."""
    (mask, *others) = term.factors
    if others or not isinstance(mask, Mask):
        return term
    fill = in_type(mask.fill * term.scale, type_)
    return replace(term, factors=(replace(mask, fill=fill),), scale=1.0)


def number(node: Node, name: str) -> float:
    """An argument that is 1 unless it is given."""
    value = argument(node, name, 1)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        raise Refusal(Reason.DYNAMIC, f"{name} of {node.name} is {value}", node)
    return float(value)


def scaling(node: Node) -> tuple[Node, Term] | None:
    """node = tensor times or over a number or one element, or -tensor.  Integers wrap around."""
    if node.target is aten.neg.default:
        return node.args[0], Term((), scale=-1.0)
    if node.target not in SCALINGS:
        return None
    inverse = node.target in DIVISIONS
    for tensor, factor in (node.args, node.args[::-1])[: 1 if inverse else 2]:
        if not is_tensor(tensor) or is_scalar_tensor(tensor) or dtype(tensor) not in FLOATS:
            continue
        if number := constant(factor):
            return tensor, Term((), scale=1 / number if inverse else number)
        if is_scalar_tensor(factor) and constant(factor) is None:
            return tensor, Term((), scalars=(Scalar(factor, inverse),))
    return None
