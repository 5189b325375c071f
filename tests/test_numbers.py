"""Right where numbers are extreme, integers or narrow, and beside what else a graph computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import config

from mla_compile.passes.site import Reason
from tests.compiling import OP, Compiled, error
from tests.negatives import attend
from tests.spellings import SCALE, Inputs, absorbed_scores, expand, inputs
from tests.spellings.common import up, wide
from tests.spellings.paged import pages_without_a_mask

Decode = Callable[[Inputs], Tensor]


def attention(x: Inputs) -> Tensor:
    return attend(absorbed_scores(x).softmax(-1), x)


def rewritten(decode: Decode, x: Inputs, exact: Inputs | None = None) -> None:
    """To one op, with at most twice plain PyTorch's error against float64."""
    compiled, plain = Compiled(decode), decode(x)
    result, truth = compiled(x), decode(exact or x.to(torch.float64))
    assert compiled.count(OP) == 1
    assert error(result, truth) <= 2 * error(plain, truth)


OTHERS: list[Callable[[Inputs], Tensor]] = [
    lambda x: (x.kv_c @ x.kv_c[0, :8].mT).softmax(-1),
    lambda x: (x.kv_c[0] @ x.kv_c[0, :8].mT).log_softmax(-1),
    lambda x: (1 - x.kv_c).exp().sum(-1),
    lambda x: x.kv_c.exp().sum(dim=None, keepdim=True),
    lambda x: (x.kv_c.softmax(-1)[:, None] * 2.0 * x.kv_c[:, None]).sum(dim=None, keepdim=True),
    lambda x: x.kv_c.mean().softmax(0),
]


@pytest.mark.parametrize(
    "other",
    OTHERS,
    ids=["a router", "a loss", "1 - x", "a sum of all", "a product summed up", "a scalar"],
)
@torch.no_grad()
def test_an_attention_is_seen_beside(other: Callable[[Inputs], Tensor]) -> None:
    compiled, x = Compiled(lambda x: (attention(x), other(x))), inputs()
    torch.testing.assert_close(compiled(x), (attention(x), other(x)))
    assert compiled.count(OP) == 1


def one_layer(x: Inputs) -> Tensor:
    layers = torch.stack([x.kv_c + 1, x.kv_c])
    return attention(replace(x, kv_c=layers.index_select(0, torch.tensor([1]))[0]))


def one_page(x: Inputs) -> Tensor:
    pool = torch.stack([x.kv_c[0] + 1, x.kv_c[0]])
    return attention(replace(x, kv_c=pool[torch.tensor([[1]])].flatten(1, 2)))


def one_row_of_a_mask(x: Inputs) -> Tensor:
    past = torch.ones(48, 48, dtype=torch.bool).tril().index_select(0, x.lens[:1] - 1)
    return attend(absorbed_scores(x).masked_fill(~past, -inf).softmax(-1), x)


@pytest.mark.parametrize("decode", [one_layer, one_page, one_row_of_a_mask])
@torch.no_grad()
def test_an_index_may_have_one_element(decode: Decode) -> None:
    rewritten(decode, inputs(B=1))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@torch.no_grad()
def test_the_largest_integer_is_a_length_without_an_end(dtype: torch.dtype) -> None:
    def up_to_the_last(x: Inputs) -> Tensor:
        seen = torch.arange(x.kv_c.shape[1]) <= x.lens[:, None]
        return attend(absorbed_scores(x).masked_fill(~seen[:, None, None], -inf).softmax(-1), x)

    def one_later(x: Inputs) -> Tensor:
        seen = torch.arange(x.kv_c.shape[1], dtype=dtype) - 1 < x.lens[:, None]
        return attend(absorbed_scores(x).masked_fill(~seen[:, None, None], -inf).softmax(-1), x)

    x = replace(inputs(), lens=torch.full((3,), torch.iinfo(dtype).max, dtype=dtype))
    rewritten(up_to_the_last, x)
    rewritten(one_later, x)


@torch.no_grad()
def test_integers_are_scaled_before_they_are_multiplied() -> None:
    def quantised(x: Inputs) -> Tensor:
        """Queries and weights of int8, each times its scale."""
        q, w = ((t * 0.02).to(x.kv_c.dtype) for t in (x.q_nope, x.w))
        return attention(replace(x, q_nope=q, w=w))

    def hidden_by_products_of_booleans(x: Inputs) -> Tensor:
        k = (x.kv_c[:, :, None, None] * (x.W_UK > 0)).sum(-1)
        s = ((x.q_nope > 0)[:, :, :, None] * k.transpose(1, 2)[:, None]).sum(-1)
        return attend((s * SCALE).softmax(-1), x)

    def bytes_less_than_256(x: Inputs) -> Tensor:
        """Minus a byte is a byte."""
        w = (-(x.W_UK.abs() * 10).to(torch.uint8) * 1e-3).to(x.kv_c.dtype)
        k = torch.einsum("btc,hpc->bhtp", x.kv_c, w)
        return attend(torch.einsum("bshp,bhtp->bsht", x.q_nope, k).softmax(-1), x)

    x = inputs()
    rewritten(bytes_less_than_256, x)
    q, w = ((t * 40).clamp(-127, 127).to(torch.int8) for t in (x.q_nope, x.w * 6))
    integers = replace(x, q_nope=q, w=w)
    rewritten(quantised, integers)
    rewritten(hidden_by_products_of_booleans, x)


NARROW: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda s, bias: s + bias + bias.flip(-1),
    lambda s, bias: (s + bias) * 0.1,
]


@pytest.mark.parametrize("masked", NARROW, ids=["two", "scaled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_biases_are_added_and_scaled_in_fp32(
    dtype: torch.dtype, masked: Callable[[Tensor, Tensor], Tensor]
) -> None:
    def decode(x: Inputs) -> Tensor:
        return attend(masked(wide(absorbed_scores(x)), x.bias).softmax(-1).to(x.kv_c.dtype), x)

    bias = torch.randn(3, 1, 1, 48) * 9 + torch.arange(48) * 0.25
    x = replace(inputs(), bias=bias).to(dtype)
    rewritten(decode, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@torch.no_grad()
def test_a_finite_mask_stays_finite(dtype: torch.dtype) -> None:
    """The first sequence sees nothing: an average of all."""

    def decode(x: Inputs) -> Tensor:
        return attend((absorbed_scores(x) + x.bias + x.bias).softmax(-1).to(x.kv_c.dtype), x)

    bias = torch.zeros(3, 1, 1, 48, dtype=dtype)
    bias[0] = torch.finfo(dtype).min / 2
    x = replace(inputs(), bias=bias)
    rewritten(decode, x, replace(x.to(torch.float64), bias=bias.double()))


@torch.no_grad()
def test_a_block_table_may_be_transposed() -> None:
    def decode(x: Inputs) -> Tensor:
        return pages_without_a_mask(replace(x, table=x.table.mT))

    x = inputs()
    rewritten(decode, replace(x, table=x.table.mT.contiguous()))


@torch.no_grad()
def test_a_cache_may_turn_out_to_be_empty() -> None:
    """Where its length is read from the device, nobody knows it when the graph is compiled."""

    def decode(x: Inputs, n: Tensor) -> Tensor:
        Skv = int(n.max())
        torch._check(Skv >= 0)
        torch._check(Skv <= x.kv_c.shape[1])
        return attention(replace(x, kv_c=x.kv_c[:, :Skv], k_pe=x.k_pe[:, :Skv]))

    for tokens in (9, 0):
        compiled, x, n = Compiled(decode), inputs(), torch.tensor([tokens, 0])
        with config.patch(capture_scalar_outputs=True):
            torch.testing.assert_close(compiled(x, n), decode(x, n))
        assert compiled.count(OP) == 1


@torch.no_grad()
def test_a_size_that_cannot_be_traced_is_refused() -> None:
    """A part of a float's, rounded."""

    def decode(x: Inputs) -> Tensor:
        Skv = int(x.kv_c.shape[1] * 0.5)
        return attention(replace(x, kv_c=x.kv_c[:, :Skv], k_pe=x.k_pe[:, :Skv]))

    compiled, x = Compiled(decode), inputs().with_dynamic_sizes()
    torch.testing.assert_close(compiled(x), decode(x))
    assert [miss.reason for miss in compiled.misses] == [Reason.DYNAMIC]


@torch.no_grad()
def test_queries_do_not_overflow_where_one_scale_is_small() -> None:
    def decode(x: Inputs) -> Tensor:
        latent = torch.einsum("bshd,hdc,btc->bsht", x.q_nope, x.W_UK, x.kv_c) * 1e-5
        s = latent + torch.einsum("bshr,btr->bsht", x.q_pe, x.k_pe)
        return attend(s.softmax(-1), x)

    rewritten(decode, inputs().to(torch.float16))


def output_cut_to_integers(x: Inputs) -> Tensor:
    s = wide(absorbed_scores(x))
    return (torch.einsum("bsht,btc->bshc", s.softmax(-1), wide(x.kv_c)) * 99).to(torch.int32)


def lse_in_float64(x: Inputs) -> tuple[Tensor, Tensor]:
    s = absorbed_scores(x)
    return attend(s.softmax(-1), x), s.logsumexp(-1)


def lse_of_wider_queries(x: Inputs) -> tuple[Tensor, Tensor]:
    q = torch.einsum("bshd,hdc->bshc", wide(x.q_nope).sin(), wide(x.W_UK))
    s = torch.einsum("bshc,btc->bsht", q, wide(x.kv_c))
    return attend(s.softmax(-1).to(x.kv_c.dtype), x), s.logsumexp(-1)


def keys_rounded_apart_from_the_values(x: Inputs) -> Tensor:
    q, k, _ = expand(replace(x, kv_c=x.kv_c.to(torch.bfloat16).to(x.kv_c.dtype)))
    return (q @ k.mT * SCALE).softmax(-1) @ expand(x)[2]


def narrowed(t: Tensor) -> Tensor:
    return t.bfloat16().to(t.dtype)


def scores_rounded(x: Inputs) -> Tensor:
    return attend(narrowed(absorbed_scores(x)).softmax(-1), x)


def lse_rounded(x: Inputs) -> Tensor:
    s = absorbed_scores(x)
    return attend((s - narrowed(s.logsumexp(-1, keepdim=True))).exp(), x)


def lse_of_rounded_scores(x: Inputs) -> tuple[Tensor, Tensor]:
    s = absorbed_scores(x)
    return attend(s.softmax(-1), x), narrowed(s).logsumexp(-1)


def probabilities_rounded(x: Inputs) -> Tensor:
    return attend(narrowed(absorbed_scores(x).softmax(-1)), x)


def weights_summed_up_rounded(x: Inputs) -> Tensor:
    e = absorbed_scores(x).exp()
    return attend(e, x) / narrowed(e).sum(-1, keepdim=True)


def sum_of_the_weights_rounded(x: Inputs) -> Tensor:
    e = absorbed_scores(x).exp()
    return attend(e, x) / narrowed(e.sum(-1, keepdim=True))


def expanded_values_rounded(x: Inputs) -> Tensor:
    q, k, v = expand(x)
    return (q @ k.mT * SCALE).softmax(-1) @ narrowed(v)


def repeated_keys_rounded(x: Inputs) -> Tensor:
    q = torch.einsum("bshd,hdc->bhsc", x.q_nope, x.W_UK)
    k = x.kv_c[:, None].expand(-1, x.N, -1, -1)
    return (q @ narrowed(k).mT * SCALE).softmax(-1) @ k


@pytest.mark.parametrize(
    "decode, dtype",
    [
        (output_cut_to_integers, torch.bfloat16),
        (scores_rounded, torch.float32),
        (lse_rounded, torch.float32),
        (lse_of_rounded_scores, torch.float32),
        (probabilities_rounded, torch.float32),
        (probabilities_rounded, torch.float16),
        (weights_summed_up_rounded, torch.float32),
        (sum_of_the_weights_rounded, torch.float32),
        (expanded_values_rounded, torch.float32),
        (repeated_keys_rounded, torch.float32),
        (lse_in_float64, torch.float64),
        (lse_of_wider_queries, torch.bfloat16),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
@torch.no_grad()
def test_what_the_op_cannot_give_exactly_is_left_alone(decode: Decode, dtype: torch.dtype) -> None:
    compiled, x = Compiled(decode), inputs().to(dtype)
    torch.testing.assert_close(compiled(x), decode(x))
    assert [miss.reason for miss in compiled.misses] == [Reason.DTYPE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_bias_is_as_wide_as_it_is_written(dtype: torch.dtype) -> None:
    """Slopes times distances, as ALiBi has them: in bf16 they are off by up to 1."""

    def decode(x: Inputs) -> Tensor:
        bias = (torch.arange(600.0) * torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None]).bfloat16()
        s = wide(absorbed_scores(x)) + bias
        return torch.einsum("bsht,btc->bshc", s.softmax(-1), wide(x.kv_c)).to(x.kv_c.dtype)

    rewritten(decode, inputs(Skv=600).to(dtype))


LOWEST = torch.finfo(torch.float32).min


def mask_rounded(x: Inputs, keep: Tensor) -> Tensor:
    q, k, v = expand(x)
    mask = torch.where(keep, 0.0, LOWEST).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=SCALE)


def masked_scores_rounded(x: Inputs, keep: Tensor) -> Tensor:
    q, k, v = expand(x)
    s = torch.where(keep, wide(q) @ wide(k).mT * SCALE, LOWEST).to(q.dtype)
    out: Tensor = torch.ops.aten._safe_softmax(s, -1) @ v
    return out


def filled_by_a_wider_number(x: Inputs, keep: Tensor) -> Tensor:
    q, k, v = expand(x)
    s = torch.where(keep, q @ k.mT * SCALE, torch.tensor(LOWEST))
    out: Tensor = torch.ops.aten._safe_softmax(s, -1) @ v
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("decode", [mask_rounded, masked_scores_rounded, filled_by_a_wider_number])
@torch.no_grad()
def test_a_fill_is_what_its_type_makes_of_it(
    decode: Callable[[Inputs, Tensor], Tensor], dtype: torch.dtype
) -> None:
    """Below all floats of the scores' type: it is -inf, and a row that sees nothing gives 0."""
    compiled, x = Compiled(decode), inputs().to(dtype)
    keep = x.keep.clone()
    keep[1] = False
    result, plain = compiled(x, keep), decode(x, keep)
    truth = decode(x.to(torch.float64), keep)  # where the fill is finite
    truth[1] = 0
    assert compiled.count(OP) == 1
    assert not plain[1].any() and not result[1].any()
    assert error(result, truth) <= 2 * error(plain, truth)


@torch.no_grad()
def test_keys_of_a_rounded_cache_are_not_of_the_cache() -> None:
    compiled, x = Compiled(keys_rounded_apart_from_the_values), inputs()
    torch.testing.assert_close(compiled(x), keys_rounded_apart_from_the_values(x))
    assert [miss.reason for miss in compiled.misses] == [Reason.VALUE]


@torch.no_grad()
def test_values_may_be_scaled_by_the_lse_of_their_own_attention() -> None:
    def decode(x: Inputs) -> tuple[Tensor, Tensor]:
        s = absorbed_scores(x)
        lse = s.logsumexp(-1)
        return attend(s.softmax(-1), x, x.kv_c * lse.mean()), lse

    compiled, x = Compiled(decode), inputs()
    torch.testing.assert_close(compiled(x), decode(x))
    assert compiled.count(OP) == len(compiled.report.sites) == 1


@torch.no_grad()
def test_values_with_their_own_lse_for_a_bias_are_left_alone() -> None:
    def decode(x: Inputs) -> tuple[Tensor, Tensor]:
        s = absorbed_scores(x)
        lse = s.logsumexp(-1)
        values = x.kv_c[:, None, None] + lse[..., None, None]
        return (s.softmax(-1)[..., None] * values).sum(-2), lse

    compiled, x = Compiled(decode), inputs()
    torch.testing.assert_close(compiled(x), decode(x))
    assert [miss.reason for miss in compiled.misses] == [Reason.ESCAPE]


@torch.no_grad()
def test_a_first_token_has_nothing_to_attend_to() -> None:
    compiled, x = Compiled(lambda x: up(attention(x), x)), inputs()
    compiled(replace(x, kv_c=x.kv_c[:, :1], k_pe=x.k_pe[:, :1]))
    assert [miss.detail for miss in compiled.misses] == ["there is only one cached token"]


@pytest.mark.parametrize("fill", [-inf, torch.finfo(torch.float32).min, -1e30])
@torch.no_grad()
def test_garbage_stays_hidden_beside_a_bias(fill: float) -> None:
    """The last token is not there yet for the first query, whose score of it is no number."""

    def decode(x: Inputs) -> Tensor:
        hidden = torch.ones(2, 48, dtype=torch.bool).triu(47)[:, None]
        s = absorbed_scores(x) + torch.arange(48) / 8
        return attend(s.masked_fill(hidden, fill).softmax(-1), x)[:, :1]

    for garbage in (torch.nan, inf, 3e38):
        x = inputs(Sq=2)
        x.k_pe[:, -1] = garbage
        rewritten(decode, x)


@torch.no_grad()
def test_an_output_keeps_its_order_in_memory_whatever_sizes_turn_out_to_be() -> None:
    def decode(q: Tensor, kv_c: Tensor, keep: Tensor) -> Tensor:
        torch._check(q.shape[1] == keep.shape[1])
        s = torch.einsum("bshc,btc->bsht", q, kv_c).masked_fill(~keep, -inf)
        return torch.einsum("bsht,btc->bshc", s.softmax(-1), kv_c).view(-1, 128)

    keep = torch.ones(3, 5, 1, 24, dtype=torch.bool).tril(-1)
    keep[..., 0] = True
    args = torch.randn(3, 5, 4, 32), torch.randn(3, 24, 32), keep
    for t in (args[0], keep):
        torch._dynamo.decorators.mark_unbacked(t, 1)
    compiled = Compiled(decode)
    torch.testing.assert_close(compiled(*args), decode(*args))
    assert compiled.count(OP) == 1


def bias_of_tokens_under_a_shift_of_higher_rank(x: Inputs) -> Tensor:
    """Of the difference the second dimension is the tokens, of the biased scores the heads."""
    bias = (torch.arange(48)[:, None] - torch.arange(48))[:, None] / 8  # [Skv, 1, Sq]
    s = absorbed_scores(x)[0].permute(2, 1, 0) - bias
    p = (s - torch.full((1, 1, 1, 1), 0.5).sin()).softmax(1)
    return torch.einsum("xthq,tc->xhqc", p, x.kv_c[0])


def shift_of_higher_rank(x: Inputs) -> Tensor:
    s = absorbed_scores(x)[0, :, 0]
    return (s - s.sum(-1, keepdim=True)[None]).softmax(-1) @ x.kv_c[0]


def maximum_of_higher_rank(x: Inputs) -> tuple[Tensor, Tensor]:
    """Its lse is over the queries, the softmax over the tokens."""
    s = absorbed_scores(x)[0, :, 0]
    top = s.max().view(1, 1, 1)
    lse = (s - top).exp().sum(1, keepdim=True).log() + top
    return s.softmax(1) @ x.kv_c[0], lse


@pytest.mark.parametrize(
    "decode",
    [bias_of_tokens_under_a_shift_of_higher_rank, shift_of_higher_rank, maximum_of_higher_rank],
    ids=lambda f: f.__name__,
)
@torch.no_grad()
def test_a_shift_counts_dimensions_as_the_scores_do(decode: Decode) -> None:
    compiled, x = Compiled(decode), inputs(B=1, Sq=48)
    torch.testing.assert_close(compiled(x), decode(x))


def by_alpha(x: Inputs, number: float) -> Tensor:
    k_pe = torch.bmm(x.q_pe[:, 0], x.k_pe.mT)
    q = x.q_nope[:, 0] @ x.w[:16]
    return (torch.baddbmm(k_pe, q, x.kv_c.mT, alpha=number) * SCALE).softmax(-1) @ x.kv_c


def by_step(x: Inputs, number: float) -> Tensor:
    hidden = torch.arange(0, 48 * number, number) >= 80
    return attend(absorbed_scores(x).masked_fill(hidden, -inf).softmax(-1), x)


@pytest.mark.parametrize("decode, rewritten", [(by_alpha, 0), (by_step, 1)])
@torch.no_grad()
def test_a_number_of_run_time_is_not_asked_for(
    decode: Callable[[Inputs, float], Tensor], rewritten: int
) -> None:
    def run(x: Inputs, n: Tensor) -> Tensor:
        number = n.item()
        torch._check(number > 0)
        torch._check(number < 5)
        return decode(x, number)

    compiled, x = Compiled(run), inputs()
    with config.patch(capture_scalar_outputs=True):
        result = compiled(x, torch.tensor(3))
    torch.testing.assert_close(result, decode(x, 3))
    assert (compiled.count(OP), len(compiled.misses)) == (rewritten, 1 - rewritten)
