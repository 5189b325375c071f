"""Every spelling of MLA becomes one call of the op with the same result; nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, Node

from mla_compile.passes import rewrite
from mla_compile.passes.graph import FUSED_ATTENTION
from mla_compile.passes.inductor import MLAPass
from mla_compile.passes.site import MLASite, Reason
from tests.compiling import NAIVE, OP, Compiled, error
from tests.negatives import NEGATIVES
from tests.spellings import (
    CALLS,
    POSITIVES,
    SCALE,
    Inputs,
    absorbed_scores,
    expand,
    inputs,
    paged,
)
from tests.spellings.absorbed import (
    absorbed_causal_positions,
    absorbed_causal_triangle,
    absorbed_without_rope,
    deepseek_absorbed,
)
from tests.spellings.expanded import (
    biased,
    expanded_after_a_cache_append,
    expanded_rope_repeated,
    expanded_sdpa,
    expanded_sdpa_length_mask,
)

# Decode and two tokens at once, the three types, static and dynamic sizes.
CASES = [
    pytest.param(1, torch.float32, False, id="one-query-fp32-static"),
    pytest.param(1, torch.bfloat16, True, id="one-query-bf16-dynamic"),
    pytest.param(2, torch.bfloat16, False, id="two-queries-bf16-static"),
    pytest.param(2, torch.float16, True, id="two-queries-fp16-dynamic"),
]
# One case of each spelling, by turns; the others with --all-cases.
ALTERNATELY = [
    pytest.param(
        spelling,
        *case.values,
        id=f"{spelling.__name__}-{case.id}",
        marks=extra * [pytest.mark.extra],
    )
    for i, spelling in enumerate(POSITIVES)
    for j, case in enumerate(CASES)
    for extra in [j != i % 4]
]
PAGED = [f for f in POSITIVES if f.__module__.endswith("paged")]
GATHERS = {torch.ops.aten.index.Tensor, torch.ops.aten.index_select.default}


# Python loops over the sequences: their number is a constant of the graph.
STATIC = {paged.requests_by_slot_with_lse}


def both(result: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """The output, and the lse if there is one."""
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("spelling, Sq, dtype, dynamic", ALTERNATELY)
@torch.no_grad()
def test_mla_becomes_the_op(
    spelling: Callable[[Inputs], Tensor | tuple[Tensor, Tensor]],
    Sq: int,
    dtype: torch.dtype,
    dynamic: bool,
) -> None:
    dynamic = dynamic and spelling not in STATIC
    exact = spelling(inputs(Sq=Sq).to(torch.float64))
    x = inputs(Sq=Sq).to(dtype)
    plain = spelling(x)
    compiled = Compiled(spelling)
    result = compiled(x.with_dynamic_sizes() if dynamic else x)
    assert compiled.misses == []
    assert compiled.count(OP) == CALLS.get(spelling, 1)
    assert compiled.count(*NAIVE) == 0
    for got, usual, ideal in zip(both(result), both(plain), both(exact), strict=True):
        assert got.shape == usual.shape
        assert got.dtype == usual.dtype
        assert error(got, ideal) <= 2 * error(usual, ideal)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("spelling", POSITIVES, ids=lambda f: f.__name__)
@torch.no_grad()
def test_mla_becomes_the_op_on_a_gpu(
    spelling: Callable[[Inputs], Tensor | tuple[Tensor, Tensor]], dtype: torch.dtype
) -> None:
    wide, x = (inputs(Sq=2).to(t, "cuda") for t in (torch.float64, dtype))
    compiled = Compiled(spelling)
    exact, plain, result = spelling(wide), spelling(x), compiled(x)
    assert compiled.misses == []
    assert compiled.count(OP) == CALLS.get(spelling, 1)
    for got, usual, ideal in zip(both(result), both(plain), both(exact), strict=True):
        assert error(got, ideal) <= 2 * error(usual, ideal)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("spelling", PAGED, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_pool_of_pages_is_not_gathered(
    spelling: Callable[[Inputs], Tensor | tuple[Tensor, Tensor]], dynamic: bool
) -> None:
    compiled = Compiled(spelling)
    compiled(inputs().with_dynamic_sizes() if dynamic and spelling not in STATIC else inputs())
    gathers = [n for graph in compiled.graphs for n in graph.nodes if n.target in GATHERS]
    assert [n for n in gathers if n.meta["val"].is_floating_point()] == []


@pytest.mark.parametrize(
    "spelling, reason", NEGATIVES, ids=lambda x: getattr(x, "__name__", getattr(x, "name", ""))
)
@torch.no_grad()
def test_not_mla_is_left_alone(spelling: Callable[[Inputs], object], reason: Reason) -> None:
    x = inputs(Sq=48 if spelling.__name__ == "prefill" else 1)
    compiled = Compiled(spelling)
    compiled(x)
    assert [miss.reason for miss in compiled.misses] == [reason]
    assert compiled.count(OP) == 0


@torch.no_grad()
def test_expanded_keys_are_kept_for_an_attention_that_needs_them() -> None:
    def two(x: Inputs) -> Tensor:
        q, k, v = expand(x)
        p = ((q @ k.mT) * SCALE).softmax(-1)
        other = ((q.flip(1) @ k.mT) * SCALE).softmax(-1)
        return p @ v + other @ v.sin()

    compiled = Compiled(two)
    compiled(inputs())
    assert {miss.reason for miss in compiled.misses} == {Reason.ESCAPE, Reason.BETWEEN}
    assert compiled.count(OP) == 0


@torch.no_grad()
def test_two_attentions_share_their_expanded_keys() -> None:
    def two(x: Inputs) -> Tensor:
        q, k, v = expand(x)
        return sum(((r @ k.mT) * SCALE).softmax(-1) @ v for r in (q, q.sin()))

    compiled = Compiled(two)
    x = inputs()
    torch.testing.assert_close(compiled(x), two(x))
    assert compiled.misses == []
    assert compiled.count(OP) == 2


@torch.no_grad()
def test_a_size_asked_of_the_probabilities_is_asked_of_an_input() -> None:
    """As where the graph's symbols are no inputs of their own: under torch.export, for one."""
    x = inputs()

    class Decode(torch.nn.Module):
        def forward(self, kv_c: Tensor, k_pe: Tensor) -> Tensor:
            return deepseek_absorbed(replace(x, kv_c=kv_c, k_pe=k_pe))

    tokens = {1: torch.export.Dim("Skv", min=8, max=1024)}
    exported = torch.export.export(Decode(), (x.kv_c, x.k_pe), dynamic_shapes=(tokens, tokens))
    graph = exported.run_decompositions(select_decomp_table()).graph
    probabilities = next(n for n in graph.nodes if n.target is torch.ops.aten.div.Tensor)
    with graph.inserting_after(probabilities):
        size = graph.call_function(torch.ops.aten.sym_size.int, (probabilities, 3))
    size.meta["val"] = probabilities.meta["val"].shape[3]
    output = graph.output_node()
    output.args = ([*output.args[0], size],)
    MLAPass(strict=True)(graph)
    assert [n.target for n in graph.nodes].count(OP) == 1
    assert not NAIVE & {n.target for n in graph.nodes}


@torch.no_grad()
def test_an_additive_and_a_boolean_mask_are_one_in_every_type() -> None:
    def masked_twice(x: Inputs) -> Tensor:
        s = absorbed_scores(x) + x.bias.transpose(1, 2).to(x.kv_c.dtype)
        low = torch.finfo(s.dtype).min
        s = s.masked_fill(~x.visible[:, None, None], low).masked_fill(~x.keep.transpose(1, 2), low)
        return torch.einsum("bsht,btc->bshc", s.softmax(-1), x.kv_c)

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        compiled, x = Compiled(masked_twice), inputs().to(dtype)
        result, exact = compiled(x), masked_twice(inputs().to(torch.float64))
        assert compiled.misses == []
        assert error(result, exact) <= max(2 * error(masked_twice(x), exact), 1e-15)


def causal(fill: float, late: int = 0) -> Callable[[Inputs], Tensor]:
    """Query q sees the tokens up to Skv - Sq + q + late."""

    def decode(x: Inputs) -> Tensor:
        Sq, Skv = x.q_nope.shape[1], x.kv_c.shape[1]
        past = torch.arange(Skv) <= torch.arange(Sq)[:, None] + (Skv - Sq + late)
        s = absorbed_scores(x).masked_fill(~past[:, None], fill)
        return torch.einsum("bsht,btc->bshc", s.softmax(-1), x.kv_c)

    return decode


def masks_of(spelling: Callable[[Inputs], Tensor], x: Inputs) -> tuple[str, bool]:
    """What the pass makes of the mask, and whether the op is given one; the result is right."""
    compiled = Compiled(spelling)
    torch.testing.assert_close(compiled(x), spelling(x))
    (site,) = compiled.sites
    (call,) = [n for graph in compiled.graphs for n in graph.nodes if n.target is OP]
    return site.mask, "attn_mask" in call.kwargs


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "spelling",
    [causal(float("-inf")), causal(torch.finfo(torch.float32).min), absorbed_causal_triangle],
    ids=["-inf", "finfo.min", "triangle"],
)
@torch.no_grad()
def test_a_causal_mask_is_not_read(spelling: Callable[[Inputs], Tensor], dynamic: bool) -> None:
    x = inputs(Sq=2)
    assert masks_of(spelling, x.with_dynamic_sizes() if dynamic else x) == ("causal", False)


@pytest.mark.parametrize(
    "spelling",
    [causal(float("-inf"), -1), causal(float("-inf"), 1), absorbed_causal_positions],
    ids=["one token less", "one token more", "from where the device says"],
)
@torch.no_grad()
def test_a_mask_that_is_nearly_causal_is_read(spelling: Callable[[Inputs], Tensor]) -> None:
    assert masks_of(spelling, inputs(Sq=3)) == ("bool", True)


@torch.no_grad()
def test_a_length_may_be_a_difference_of_tensors() -> None:
    def decode(x: Inputs) -> Tensor:
        seen = torch.arange(x.kv_c.shape[1]) - 1 < (x.lens - x.lens // 2)[:, None]
        s = absorbed_scores(x).masked_fill(~seen[:, None, None], float("-inf"))
        return torch.einsum("bsht,btc->bshc", s.softmax(-1), x.kv_c)

    assert masks_of(decode, inputs()) == ("length", False)


@torch.no_grad()
def test_a_mask_may_be_made_of_numbers() -> None:
    """Only what is boolean is negated by ~, and hides where it is False."""

    def decode(x: Inputs) -> Tensor:
        unseen = x.visible[:, None, None].to(x.kv_c.dtype).logical_not()
        s = absorbed_scores(x).masked_fill(unseen, float("-inf"))
        return torch.einsum("bsht,btc->bshc", s.softmax(-1), x.kv_c)

    assert masks_of(decode, inputs()) == ("bool", True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bool])
@torch.no_grad()
def test_what_is_added_becomes_a_float_that_the_op_takes(dtype: torch.dtype) -> None:
    """On a GPU at most fp32; what is boolean would hide tokens."""

    def decode(x: Inputs) -> Tensor:
        s = absorbed_scores(x) + (torch.arange(x.kv_c.shape[1]) // 8 % 3).to(dtype)
        return torch.einsum("bsht,btc->bshc", s.softmax(-1).to(x.kv_c.dtype), x.kv_c)

    compiled, x = Compiled(decode), inputs()
    torch.testing.assert_close(compiled(x), decode(x))
    (call,) = [n for graph in compiled.graphs for n in graph.nodes if n.target is OP]
    assert call.kwargs["attn_mask"].meta["val"].dtype is torch.float32


@pytest.mark.gpu
@torch.no_grad()
def test_a_length_and_a_table_may_be_on_the_host() -> None:
    def decode(x: Inputs, table: Tensor, length: Tensor) -> Tensor:
        fused = x.pool[table].view(len(table), -1, 40)
        x = replace(x, kv_c=fused[..., :32], k_pe=fused[..., 32:])
        unseen = torch.arange(x.kv_c.shape[1], device=x.kv_c.device) >= length
        s = absorbed_scores(x).masked_fill(unseen, float("-inf"))
        return torch.einsum("bsht,btc->bshc", s.softmax(-1), x.kv_c)

    wide, x = (inputs().to(t, "cuda") for t in (torch.float64, torch.float32))
    host, compiled = (x.table.cpu().long(), torch.tensor(20)), Compiled(decode)
    exact, plain, result = decode(wide, *host), decode(x, *host), compiled(x, *host)
    assert compiled.count(OP) == 1
    assert error(result, exact) <= 2 * error(plain, exact)


@torch.no_grad()
def test_a_constant_is_what_its_type_makes_of_it() -> None:
    def decode(x: Inputs) -> Tensor:
        scale = torch.full((), 2.7, dtype=torch.int64)
        return torch.einsum("bsht,btc->bshc", (absorbed_scores(x) * scale).softmax(-1), x.kv_c)

    assert masks_of(decode, inputs()) == ("none", False)


@torch.no_grad()
def test_a_cache_may_be_selected_from_the_end_by_a_symbol() -> None:
    def decode(x: Inputs, layer: int) -> Tensor:
        fused = torch.stack([x.fused * i for i in range(6)])[2:][layer - 5]
        return deepseek_absorbed(replace(x, kv_c=fused[..., :32], k_pe=fused[..., 32:]))

    x, compiled = inputs(), Compiled(decode)
    torch._dynamo.reset()
    fast = torch.compile(decode, backend=compiled.backend)
    for layer in (3, 4, 2):  # a symbol from the second on
        torch.testing.assert_close(fast(x, layer), decode(x, layer))
    assert compiled.count(OP) == len(compiled.graphs) == 2


@pytest.mark.parametrize("empty", [{"Sq": 0}, {"Skv": 0}], ids=["queries", "tokens"])
@torch.no_grad()
def test_an_attention_of_nothing_is_left_alone(empty: dict[str, int]) -> None:
    x, compiled = inputs(**empty), Compiled(deepseek_absorbed)
    torch.testing.assert_close(compiled(x), deepseek_absorbed(x))
    assert [miss.reason for miss in compiled.misses] == [Reason.PREFILL]


@torch.no_grad()
def test_queries_in_an_order_that_a_tensor_says_meet_one_fused_cache() -> None:
    def permuted(x: Inputs) -> Tensor:
        q = torch.cat([torch.einsum("bshd,hdc->bshc", x.q_nope, x.W_UK), x.q_pe], -1)
        order = torch.arange(q.shape[-1], device=q.device).flip(0)
        s = torch.einsum("bshd,btd->bsht", q[..., order], x.fused) * SCALE
        return torch.einsum("bsht,btc->bshc", s.softmax(-1), x.fused[..., :32])

    compiled, x = Compiled(permuted), inputs()
    torch.testing.assert_close(compiled(x), permuted(x))
    assert compiled.count(OP) == 1


@torch.no_grad()
def test_tokens_that_are_repeated_are_read_where_they_were_repeated_to() -> None:
    def decode(x: Inputs) -> Tensor:
        k_pe = x.k_pe[:, ::2].repeat(1, 2, 1)
        return expanded_rope_repeated(replace(x, k_pe=k_pe))

    compiled, x = Compiled(decode), inputs()
    torch.testing.assert_close(compiled(x), decode(x))
    assert compiled.count(OP) == 1


@torch.no_grad()
def test_a_cache_that_grows_in_the_step_may_be_all_that_is_dynamic() -> None:
    """2 * s + 2 rows of kv_b_proj are 2 sequences of s + 1 tokens."""
    compiled, x = Compiled(expanded_after_a_cache_append), inputs()
    for cache in (x.kv_c, x.k_pe):
        torch._dynamo.mark_dynamic(cache, 1)
    torch.testing.assert_close(compiled(x), expanded_after_a_cache_append(x))
    assert compiled.count(OP) == 1


def probabilities_of_twice_the_shift(x: Inputs) -> Tensor:
    s = absorbed_scores(x)
    return torch.sub(s, s.logsumexp(-1, keepdim=True), alpha=2).exp()


def probabilities_shifted_once_too_little(x: Inputs) -> Tensor:
    s = absorbed_scores(x)
    top = s.amax(-1, keepdim=True)
    return (s - (s - top).exp().sum(-1, keepdim=True).log()).exp()


def probabilities_without_other_rows(x: Inputs) -> Tensor:
    """As in ATen's safe softmax, but query t is left out where nobody sees token t."""
    s = absorbed_scores(x).masked_fill(torch.arange(x.kv_c.shape[1]) == 1, float("-inf"))
    hidden = s.transpose(1, 3) == float("-inf")
    unseen = hidden.logical_not().any(-1, keepdim=True).logical_not()
    return torch.where(unseen, 0.0, s.softmax(-1))


@pytest.mark.parametrize(
    "probabilities",
    [
        probabilities_of_twice_the_shift,
        probabilities_shifted_once_too_little,
        probabilities_without_other_rows,
    ],
)
@torch.no_grad()
def test_what_is_nearly_a_softmax_is_left_alone(
    probabilities: Callable[[Inputs], Tensor],
) -> None:
    def decode(x: Inputs) -> Tensor:
        return torch.einsum("bsht,btc->bshc", probabilities(x), x.kv_c)

    compiled, x = Compiled(decode), inputs(Sq=8, Skv=8)
    torch.testing.assert_close(compiled(x), decode(x))
    assert compiled.count(OP) == 0


@torch.no_grad()
def test_a_causal_mask_of_more_queries_than_tokens_is_read() -> None:
    """With a finite fill the first queries, which see nothing, average over all tokens."""
    x = inputs(Sq=5, Skv=4)
    assert masks_of(causal(torch.finfo(torch.float32).min), x) == ("bool", True)


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, -1e9, -65504.0, -1e5])
@torch.no_grad()
def test_a_fused_call_whose_finite_mask_hides_all_tokens_averages_over_them(low: float) -> None:
    """Or weighs them as if it hid none, where the mask leaves something of their scores."""

    def decode(x: Inputs) -> Tensor:
        q, k, v = (t[..., : x.P] for t in expand(x))  # as wide as the values: fused on a CPU too
        bias = q.new_zeros(3, 1, 1, k.shape[2]).masked_fill(~x.visible[:, None, None], low)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=SCALE)

    x = inputs()
    x.lens[0] = 0
    compiled = Compiled(decode)
    torch.testing.assert_close(compiled(x), decode(x))
    assert compiled.count(OP) == 1
    assert all(site.softmax.target in FUSED_ATTENTION for site in compiled.sites)


@torch.no_grad()
def test_a_row_that_sees_nothing_has_no_bias() -> None:
    """Nor has it in PyTorch, where sdpa zeroes the probabilities."""

    def decode(x: Inputs) -> Tensor:
        q, k, v = biased(x)
        mask = x.visible[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE)

    x = inputs()
    x.lens[0] = 0
    compiled = Compiled(decode)
    torch.testing.assert_close(compiled(x), decode(x))
    assert compiled.count(OP) == 1


@torch.no_grad()
def test_exponentials_that_no_sum_divides_are_no_attention() -> None:
    def unnormalised(x: Inputs) -> Tensor:
        s = absorbed_scores(x)
        return torch.einsum(
            "bsht,btc->bshc", (s - s.sin().logsumexp(-1, keepdim=True)).exp(), x.kv_c
        )

    compiled = Compiled(unnormalised)
    compiled(inputs())
    assert compiled.verdicts == []


def exponentials_over_a_sum_of_integers(x: Inputs) -> Tensor:
    e = absorbed_scores(x).float().exp()
    p = e / e.sum(-1, keepdim=True, dtype=torch.int64)
    return torch.einsum("bsht,btc->bshc", p, x.kv_c)


def values_summed_as_integers(x: Inputs) -> Tensor:
    p = absorbed_scores(x).softmax(-1)
    return (p[..., None] * x.kv_c[:, None, None]).sum(3, dtype=torch.int64).float()


@pytest.mark.parametrize("fn", [exponentials_over_a_sum_of_integers, values_summed_as_integers])
def test_a_sum_of_integers_is_no_sum(fn: Callable[[Inputs], Tensor]) -> None:
    x = inputs()
    compiled = Compiled(fn)
    torch.testing.assert_close(compiled(x), fn(x), rtol=1e-5, atol=1e-5)
    assert compiled.count(OP) == 0


def test_a_training_graph_is_left_alone() -> None:
    x = inputs()
    x.kv_c.requires_grad_()
    spelling = POSITIVES[0]
    compiled = Compiled(spelling)
    compiled(x).sum().backward()
    assert {miss.reason for miss in compiled.misses} == {Reason.TRAINING}
    assert compiled.count(OP) == 0


@torch.no_grad()
def test_symbolic_heads_and_features_are_left_alone() -> None:
    compiled = Compiled(POSITIVES[0], dynamic=True)
    compiled(inputs())
    assert [miss.reason for miss in compiled.misses] == [Reason.DYNAMIC]


@pytest.mark.parametrize("bounds, reasons", [({"min": 2, "max": 8}, []), ({}, [Reason.DYNAMIC])])
@torch.no_grad()
def test_a_cache_is_expanded_for_queries_without_a_bound(
    bounds: dict[str, int], reasons: list[Reason]
) -> None:
    x = inputs(Sq=3)
    for tensor in (x.q_nope, x.q_pe):
        torch._dynamo.mark_dynamic(tensor, 1, **bounds)
    compiled = Compiled(expanded_sdpa)
    compiled(x)
    assert [miss.reason for miss in compiled.misses] == reasons


@torch.no_grad()
def test_queries_of_any_number_may_be_absorbed() -> None:
    x = inputs(Sq=3)
    for tensor in (x.q_nope, x.q_pe):
        torch._dynamo.mark_dynamic(tensor, 1)
    compiled = Compiled(absorbed_without_rope)
    torch.testing.assert_close(compiled(x), absorbed_without_rope(inputs(Sq=3)))
    assert [site.dims["N"] for site in compiled.sites] == [4]


@torch.no_grad()
def test_sequences_and_queries_may_be_one_symbol() -> None:
    """Equal sizes are one symbol s, a view of s times s rows has s²//s of them."""

    class Decode(torch.nn.Module):
        def __init__(self, x: Inputs) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(x.w)
            self.q_proj = torch.nn.Linear(64, 96)

        def forward(self, hidden: Tensor, kv_c: Tensor) -> Tensor:
            B, Sq, _ = hidden.shape
            q_nope, q_pe = self.q_proj(hidden).view(B, Sq, 4, 24).split([16, 8], -1)
            own = replace(x, w=self.w, q_nope=q_nope, q_pe=q_pe, kv_c=kv_c)
            return causal(float("-inf"))(own)

    x = inputs(B=2)
    model, hidden = Decode(x), torch.randn(2, 2, 64)
    compiled = Compiled(model, dynamic=True)
    torch.testing.assert_close(compiled(hidden, x.kv_c), model(hidden, x.kv_c))
    assert compiled.misses == []
    assert compiled.count(OP) == 1


@torch.no_grad()
def test_a_router_is_no_attention() -> None:
    def route(x: Inputs) -> Tensor:
        weights, chosen = x.kv_c.softmax(-1).topk(4)
        return weights * chosen

    compiled = Compiled(route)
    compiled(inputs())
    assert compiled.verdicts == []


@torch.no_grad()
def test_a_miss_names_the_line_of_the_user() -> None:
    compiled = Compiled(NEGATIVES[2][0])
    compiled(inputs())
    assert "negatives.py:" in compiled.misses[0].where
    assert compiled.misses[0].remedy


def counted(monkeypatch: pytest.MonkeyPatch) -> list[MLASite]:
    """The attentions whose replacement is traced from here on."""
    sites: list[MLASite] = []
    trace = rewrite.traced

    def counting(site: MLASite, inputs: list[Node]) -> Graph:
        sites.append(site)
        return trace(site, inputs)

    monkeypatch.setattr(rewrite, "traced", counting)
    return sites


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@torch.no_grad()
def test_attentions_of_one_kind_are_traced_once(
    dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def layers(x: Inputs) -> list[Tensor]:
        caches = [(x.kv_c + i, x.k_pe - i) for i in range(4)]
        return [expanded_sdpa_length_mask(replace(x, kv_c=c, k_pe=r)) for c, r in caches]

    x = inputs()
    traced, compiled = counted(monkeypatch), Compiled(layers)
    results = compiled(x.with_dynamic_sizes() if dynamic else x)
    assert (len(traced), compiled.count(OP)) == (1, 4)
    torch.testing.assert_close(results, layers(x))


# Each has one thing other than `inputs()` has it.
OTHERS = {
    "batch": inputs(B=2),
    "length": inputs(Skv=32),
    "heads": inputs(N=2),
    "queries": inputs(Sq=2),
    "type": inputs().to(torch.float64),
    "order in memory": replace(
        inputs(), kv_c=inputs().kv_c.transpose(0, 1).contiguous().transpose(0, 1)
    ),
}


@pytest.mark.parametrize(
    "dynamic", [False, pytest.param(True, marks=pytest.mark.extra)], ids=["static", "dynamic"]
)
@pytest.mark.parametrize("other", OTHERS)
@torch.no_grad()
def test_attentions_of_two_kinds_are_traced_each(
    other: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def layers(*layers: Inputs) -> list[Tensor]:
        return [deepseek_absorbed(x) for x in layers]

    xs = [inputs(), OTHERS[other], inputs()]
    traced, compiled = counted(monkeypatch), Compiled(layers)
    results = compiled(*(x.with_dynamic_sizes() for x in xs) if dynamic else xs)
    # A dimension that is marked as dynamic has a symbol of its own in each input.
    assert (len(traced), compiled.count(OP)) == (3 if dynamic else 2, 3)
    torch.testing.assert_close(results, layers(*xs))


@torch.no_grad()
def test_the_only_sequence_may_be_picked() -> None:
    def decode(x: Inputs) -> Tensor:
        return torch.einsum("sht,tc->shc", absorbed_scores(x).softmax(-1)[0], x.kv_c[0])

    compiled, x = Compiled(decode), inputs(B=1)
    torch.testing.assert_close(compiled(x), decode(x))
    assert compiled.count(OP) == 1


@pytest.mark.parametrize("lse", [False, True], ids=["", "with-lse"])
@torch.no_grad()
def test_attentions_share_what_is_expanded(lse: bool) -> None:
    """Each asks the same keys with the output of the one before it."""

    def chain(x: Inputs) -> list[Tensor]:
        q, k, v = expand(x)
        results = []
        for _ in range(3):
            s = q @ k.mT * SCALE
            out = s.softmax(-1) @ v
            q = torch.cat([out, q[..., 16:]], -1)
            results += [out, s.logsumexp(-1)] if lse else [out]
        return results

    compiled, x = Compiled(chain), inputs()
    torch.testing.assert_close(compiled(x), chain(x))
    assert (compiled.count(OP), compiled.count(*NAIVE)) == (3, 0)


@torch.no_grad()
def test_another_scale_is_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def layers(x: Inputs) -> list[Tensor]:
        return [deepseek_absorbed(replace(x, q_nope=x.q_nope * i, q_pe=x.q_pe * i)) for i in (1, 2)]

    x = inputs()
    traced, compiled = counted(monkeypatch), Compiled(layers)
    torch.testing.assert_close(compiled(x), layers(x))
    assert (len(traced), compiled.count(OP)) == (2, 2)


@torch.no_grad()
def test_a_tensor_in_two_places_is_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of its own, or the one of the attention before it twice."""

    def layers(x: Inputs) -> list[Tensor]:
        s = absorbed_scores(x) + x.bias.transpose(1, 2)
        masked = [s + m.transpose(1, 2) for m in (x.bias, x.bias + 1)]
        return [torch.einsum("bsht,btc->bshc", m.softmax(-1), x.kv_c) for m in masked]

    x = replace(inputs(), bias=torch.randn(3, 1, 1, 48))
    traced, compiled = counted(monkeypatch), Compiled(layers)
    torch.testing.assert_close(compiled(x), layers(x))
    assert (len(traced), compiled.count(OP)) == (2, 2)
