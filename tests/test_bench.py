"""The benchmarks check before they time, and run on a CPU."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import decode, layers, model, peers
from bench.case import LENGTHS, LKV, SPREAD, Case, R, Shape, batched, looped, make_case, visible
from bench.common import max_error, progress, within
from mla_compile import mla_decode, mla_decode_fwd


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def run(module: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *arguments: str) -> int:
    common = ["bench", "--device", "cpu", "--commit", "0123abc", "--out", str(out)]
    monkeypatch.setattr("sys.argv", [*common, *arguments])
    code: int = module.main()
    return code


def small(lengths: str = "even", **changes: Any) -> Case:
    torch.manual_seed(0)  # some are made while tests are collected, whichever came before
    shape = replace(Shape(B=3, Skv=70, page_size=16, N=4, lengths=lengths), **changes)
    return make_case(shape, torch.randn(1024, LKV + R))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Toy tensors gain nothing from more, and on a busy machine they wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_how_far_it_is_is_a_bar_on_a_terminal_else_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(progress("ab")) == ["a", "b"]
    lines, bar = capsys.readouterr()
    assert "1 of 2" in lines and "2 of 2" in lines and not bar
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(progress("ab")) == ["a", "b"]
    lines, bar = capsys.readouterr()
    assert "2/2" in bar and not lines


def test_decode_times_every_provider(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "decode.csv"
    assert run(decode, monkeypatch, out, "--batches", "2", "--contexts", "70", "--pages", "64") == 0
    timed = rows(out)
    assert [r["provider"] for r in timed if float(r["ms"]) > 0] == [
        "naive eager bf16",
        "naive fp32 loop",
        "naive torch.compile",
        "mla_compile",
    ]
    assert {(r["commit"], r["device"][:3], r["cache"]) for r in timed} == {
        ("0123abc", "cpu", "warm")
    }


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bench") / "sweep.csv"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert run(decode, monkeypatch, out, "--sweep") == 0
    return out


def test_the_sweep_times_the_op_and_eager_at_every_shape(swept: Path) -> None:
    shapes = decode.sweep(4, 64, 16)
    timed = [(r["batch"], r["lengths"], r["provider"]) for r in rows(swept) if float(r["ms"]) > 0]
    assert timed == [
        (str(s.B), s.lengths, name) for s in shapes for name in ("naive eager", "mla_compile")
    ]


def test_the_default_sweep_holds_what_the_project_promises() -> None:
    shapes = decode.sweep(128, 4096, 128)
    assert {s.B for s in shapes} >= {2**i for i in range(9)}
    assert {s.N for s in shapes} == {16, 32, 64, 128}
    assert {s.page_size for s in shapes} == {1, 16, 64, 256}
    assert {s.Sq for s in shapes} == {1, 2, 3, 4}
    assert Shape(128, 8192, N=16) in shapes and Shape(64, 8192) in shapes
    log_uniform = Shape(64, 32768, lengths="log-uniform")
    assert log_uniform in shapes and Shape(64, 32768, lengths="log-uniform" + SPREAD) in shapes
    assert min(log_uniform.lens) >= 128 and max(log_uniform.lens) <= 32768
    assert sorted(Shape(128, 32768, lengths="one long").lens) == [512] * 127 + [32768]
    assert all(sum(-(-n // s.page_size) * s.page_size for n in s.lens) < 2_097_152 for s in shapes)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_spread_lengths_have_as_many_tokens_and_differ_by_one_at_most(lengths: str) -> None:
    ragged, spread = Shape(7, 1000, lengths=lengths), Shape(7, 1000, lengths=lengths + SPREAD)
    assert sum(ragged.lens) == sum(spread.lens)
    assert max(spread.lens) - min(spread.lens) <= 1


@pytest.mark.parametrize("case", [small(), small("log-uniform"), small(Sq=3), small("one long")])
def test_naive_forms_agree(case: Case) -> None:
    q = case.q.view(case.shape.B, case.shape.Sq, case.shape.N, LKV + R)
    rest = (case.kv_buffer, case.block_table, visible(case), case.sm_scale, max(case.shape.lens))
    reference = looped(case, torch.float64)
    plain = max_error(looped(case, torch.float32), reference)
    assert within(max_error(batched(q, *rest), reference), plain)


def test_work_is_counted_key_by_key() -> None:
    seen = [length - 2 + i for length in (9, 9) for i in range(3)]  # 3 queries, bottom-right
    assert Shape(2, 9, N=5, Sq=3).flops == 2 * 5 * sum(seen) * (512 + 64 + 512)
    assert Shape(2, 9, N=5, Sq=3).bytes == 2 * (18 * 576 + 6 * 5 * 576 + 6 * 5 * 512)


def test_no_page_belongs_to_two_sequences() -> None:
    assert small(Skv=300).kv_indices.unique().numel() == 3 * 19
    with pytest.raises(ValueError, match="expected at most 64 pages, got 65"):
        small(B=65, Skv=16)


def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "decode.csv"
    monkeypatch.setitem(decode.TUTORIAL, "mla_compile", lambda case: lambda: case.o.fill_(0))
    assert run(decode, monkeypatch, out, "--batches", "1", "--contexts", "64") == 1
    wrong = [(r["status"], r["ms"]) for r in rows(out) if r["provider"] == "mla_compile"]
    assert wrong == [("wrong", "")]


def test_figures_are_drawn_from_csvs_alone(
    swept: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plot = pytest.importorskip("bench.plot", reason="needs matplotlib", exc_type=ImportError)
    figure = tmp_path / "figure.svg"
    results = Path(decode.__file__).parent / "results"
    csvs = [str(results / f"{bench}-h200.csv") for bench in ("decode", "model")]
    monkeypatch.setattr("sys.argv", ["plot", *csvs, str(swept), "--out", str(figure)])
    plot.main()
    drawn = figure.read_text()
    for title in ("the op, batch 128, page 1", "roofline", "64 tokens, page 64, 16 heads"):
        assert title in drawn


def test_check_times_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "sweep.csv"
    assert run(decode, monkeypatch, out, "--sweep", "--check") == 0
    assert {(r["status"], r["ms"]) for r in rows(out)} == {("ok", "")}


@pytest.mark.parametrize(
    ("N", "pick", "rest"), [(128, "sm90", "portable"), (16, "portable", "sm90")]
)
def test_the_kernels_that_are_not_picked_are_timed_under_a_pin(
    N: int, pick: str, rest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(Shape(1, 70, N=N), torch.randn(1024, LKV + R).bfloat16())
    monkeypatch.setattr("mla_compile.kernels.decode._device", lambda device: ("sm90", 132))
    monkeypatch.setenv("MLA_COMPILE_KERNEL", rest)  # a user's own pin is out of it
    assert decode.others(case) == [rest]
    with decode.pinned(None):
        assert decode.picked(case)[0].kernel == pick
    with decode.pinned(rest):
        assert decode.picked(case)[0].kernel == rest


def test_a_pick_slower_than_another_kernel_shows() -> None:
    shape = decode.facts(Shape(1, 512), "") | {"kernel": "sm90 64×64: the table"}
    times = {"mla_compile": (1.0, 0.9, 1.1), "portable pinned": (0.7, 0.6, 0.8)}
    found = decode.picks(
        [
            shape | {"provider": name, "ms": ms, "ms p20": p20, "ms p80": p80}
            for name, (ms, p20, p80) in times.items()
        ]
    )
    assert [(row["its / picked"], row[""]) for row in found] == [(0.7, "SLOWER")]


def test_a_peer_is_called_like_aiter_and_a_refusal_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*args: Any, **named: Any) -> None:
        raise RuntimeError("only on my GPU")

    module = ModuleType("peer_of_a_user")
    vars(module).update(same=mla_decode_fwd, refuse=refuse)
    monkeypatch.setitem(sys.modules, "peer_of_a_user", module)
    out = tmp_path / "sweep.csv"
    asked = ("--peer", "peer_of_a_user:same", "--peer", "peer_of_a_user:refuse")
    assert run(decode, monkeypatch, out, "--sweep", "--check", *asked) == 0
    status = {r["provider"]: r["status"] for r in rows(out) if r["provider"].startswith("peer")}
    assert status == {
        "peer_of_a_user:same": "ok",
        "peer_of_a_user:refuse": "refused: only on my GPU",
    }


def test_a_peer_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "vllm" or None)
    found, missing = peers.find("aiter,vllm", [])
    assert list(found) == ["vllm"] and missing == ["aiter"]
    with pytest.raises(
        ValueError, match="expected aiter, flashinfer, flash_mla, vllm, got tilelang"
    ):
        peers.find("tilelang", [])
    with pytest.raises(ValueError, match="expected module:function, got aiter"):
        peers.find("", ["aiter"])


class FlashInfer:
    """FlashInfer's wrapper, as its documentation has it."""

    def __init__(self, float_workspace_buffer: Tensor, backend: str = "auto") -> None: ...

    def plan(self, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, kv_len_arr: Tensor, num_heads: int, head_dim_ckv: int, head_dim_kpe: int, page_size: int, causal: bool, sm_scale: float, q_data_type: torch.dtype, kv_data_type: torch.dtype) -> None:  # fmt: skip  # noqa: E501
        last = kv_len_arr - (kv_indptr.diff() - 1) * page_size
        self.scale, Sq = sm_scale, int(qo_indptr[1])
        names = ("qo_indptr", "kv_indptr", "kv_indices", "kv_last_page_lens", "max_seqlen_q")
        self.options = dict(zip(names, (qo_indptr, kv_indptr, kv_indices, last, Sq), strict=True))

    def run(self, q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, out: Tensor) -> Tensor:
        return out.copy_(mla_decode(q_nope, q_pe, kv_c, k_pe, self.scale, **self.options)[0])


def by_table(
    q: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float, Sq: int
) -> Tensor:
    kv_c, k_pe = cache.squeeze(2).split([LKV, R], -1)
    options: dict[str, Any] = {"block_table": block_table, "seq_lens": seq_lens, "max_seqlen_q": Sq}
    return mla_decode(q[..., :LKV], q[..., LKV:], kv_c, k_pe, scale, **options)[0]


def flash_mla_with_kvcache(q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, head_dim_v: int, tile_scheduler_metadata: str, num_splits: None, softmax_scale: float, causal: bool) -> tuple[Tensor, None]:  # fmt: skip  # noqa: E501
    out = by_table(q.flatten(0, 1), k_cache, block_table, cache_seqlens, softmax_scale, q.shape[1])
    return out.view(*q.shape[:3], head_dim_v), None


def decode_attention_fwd(q: Tensor, k_buffer: Tensor, v_buffer: Tensor, o: Tensor, lse: Tensor, req_to_token: Tensor, b_seq_len: Tensor, attn_logits: Tensor, num_kv_splits: int, sm_scale: float, page_size: int = 1) -> None:  # fmt: skip  # noqa: E501
    assert num_kv_splits == attn_logits.shape[2] and page_size == k_buffer.shape[1]
    o.copy_(by_table(q, k_buffer, req_to_token, b_seq_len, sm_scale, 1))


STAND_INS: dict[str, dict[str, Any]] = {
    "aiter.mla": {"mla_decode_fwd": mla_decode_fwd},
    "flashinfer.mla": {"BatchMLAPagedAttentionWrapper": FlashInfer},
    "flash_mla": {
        "get_mla_metadata": lambda *args: ("schedule", None),
        "flash_mla_with_kvcache": flash_mla_with_kvcache,
    },
    "vllm.v1.attention.ops.triton_decode_attention": {"decode_attention_fwd": decode_attention_fwd},
}


@pytest.mark.parametrize("case", [small(), small("log-uniform"), small(Sq=2)])
@pytest.mark.parametrize("module", STAND_INS)
def test_a_known_peer_gets_the_same_problem(
    module: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against stand-ins with the peers' published signatures: none of them runs on a CPU."""
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**STAND_INS[module]))
    make = peers.KNOWN[module.partition(".")[0]]
    if make is peers.vllm and case.shape.Sq > 1:
        with pytest.raises(ValueError, match="expected one query a sequence, got 2"):
            make(case)
        return
    assert max_error(make(case)(), looped(case, torch.float64)) < 1e-5


def test_model_times_every_part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "model.csv"
    assert run(model, monkeypatch, out, "--steps", "2x64") == 0
    timed = [(r["part"], r["provider"]) for r in rows(out) if float(r["ms"]) > 0]
    forms = ("eager", "torch.compile", "mla")
    assert timed == [(part, form) for part in layers.PARTS for form in forms]


def test_the_absorbed_form_is_the_module() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

    config = DeepseekV3Config(
        hidden_size=64, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=32
    )
    config._attn_implementation = "sdpa"
    attention = DeepseekV3Attention(config, layer_idx=0).double().eval()
    x = layers.make_inputs(config, 2, 20, torch.device("cpu"))
    x = layers.Inputs(**{n: t.double() if t.is_floating_point() else t for n, t in vars(x).items()})
    with torch.no_grad():
        module, absorbed = (
            form(*args)
            for form, args in (layers.PARTS[part](attention, x) for part in ("module", "absorbed"))
        )
    # The absorbed form has its softmax in fp32.
    torch.testing.assert_close(absorbed, module, rtol=1e-6, atol=1e-6)
