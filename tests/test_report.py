"""explain: what is said of an attention, on the console and on a page, and of a script."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import mla_compile
from mla_compile.kernels.config import KEY_MASK
from mla_compile.picture import HEIGHT, WIDTH, Op, layered, svg
from mla_compile.report import Report, rare, reporting
from mla_compile.saving import absorbed, as_written, rewritten, saving
from tests.compiling import OP, Compiled

B, N, SKV, LKV, R, P = 2, 4, 50, 32, 8, 16
ROOT = Path(__file__).parent.parent
SHAPES = [(B, N, 1, P), (B, N, 1, R), (B, SKV, LKV), (B, SKV, R), (LKV, N * 2 * P)]


def attention(q_nope: Tensor, q_pe: Tensor, kv_c: Tensor, k_pe: Tensor, kv_b: Tensor) -> Tensor:
    k, v = (kv_c @ kv_b).unflatten(-1, (N, 2 * P)).transpose(1, 2).split(P, -1)
    scores = q_nope @ k.mT + q_pe @ k_pe[:, None].mT
    out: Tensor = (scores * 0.25).softmax(-1) @ v
    return out


def inputs() -> list[Tensor]:
    return [torch.randn(shape) for shape in SHAPES]


@pytest.fixture(scope="module")
def report() -> Report:
    x = inputs()
    for cache in x[2:4]:
        torch._dynamo.mark_dynamic(cache, 1)
    return mla_compile.explain(attention, *x)


def test_a_site_is_described_in_the_users_terms(report: Report) -> None:
    (site,) = report.sites
    rows = site.rows()
    tokens = site.dims["Skv"]
    line = attention.__code__.co_firstlineno + 3
    assert site.where == f"{__file__}:{line}"
    assert rows["form"] == "expanded from the latent, two caches"
    assert rows["cache"] == f"kv_c in float32[2, {tokens}, 32], k_pe in float32[2, {tokens}, 8]"
    assert (rows["mask"], rows["scale"]) == ("none", "0.25")
    assert rows["sizes"] == f"B=2, Sq=1, Skv={tokens}, N=4, Lkv=32, R=8, P=16, V=16"
    assert rows["became"] == "mla_compile::mla_decode with W_UK and W_UV absorbed"
    assert rows["FLOPs"] == f"17024*{tokens} -> 1152*{tokens} + 16384 (11.5x less)"
    assert rows["memory"] == f"720*{tokens} -> 80*{tokens} (9x less) elements"


def test_its_page_has_a_picture_of_before_and_after(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "report.html")
    page = tmp_path.joinpath("report.html").read_text()
    assert "http" not in page and "<script" not in page
    tree = ET.fromstring(page.removeprefix("<!doctype html>").replace('<meta charset="utf-8">', ""))
    before, after = (
        [text.text for text in picture.iter("text") if "class" not in text.attrib]
        for picture in tree.iter("svg")
    )
    assert {"kv_c", "k_pe", "query", "W_UK, W_UV"} <= set(before) & set(after)
    assert {"exp", "div"} <= set(before) and "mla_decode" not in before
    assert "mla_decode" in after and "exp" not in after


def test_nothing_is_drawn_over_a_box() -> None:
    """A diamond with a long side: each box has its own place, and the long edge passes by."""
    chain = [("a", ""), ("b", "a"), ("c", "b"), ("d", "c a")]
    ops = [Op(n, n, "", tuple(given.split()), False, False) for n, given in chain]
    layers, routes = layered(list("abcd"), [("a", "b"), ("a", "d"), ("b", "c"), ("c", "d")])
    assert [min(layer, key=len) for layer in layers] == ["a", "b", "c", "d"]
    assert max(map(len, routes)) == 4  # a, two bends, d
    drawn = ET.fromstring(svg(ops, {}))
    places = [(float(r.get("x", "")), float(r.get("y", ""))) for r in drawn.iter("rect")]
    apart = [
        abs(x - u) >= WIDTH or abs(y - v) >= HEIGHT
        for i, (x, y) in enumerate(places)
        for u, v in places[:i]
    ]
    assert len(places) == 4 and all(apart)


class Layers(torch.nn.Module):
    """Two layers of the same source line."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Layer(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, -1) @ x


def test_attentions_of_one_source_line_are_told_apart_by_their_module() -> None:
    misses = mla_compile.explain(Layers(), torch.randn(3, 3)).misses
    assert [miss.module for miss in misses] == ["layers.0", "layers.1"]
    assert len({miss.where for miss in misses}) == 1


def test_views_and_constants_are_not_drawn() -> None:
    ops = [
        Op("x", "x", "", (), False, False),
        Op("view", "view", "", ("x",), True, False),
        Op("full", "full", "", (), False, True),
        Op("mul", "mul", "", ("view", "full"), False, False),
    ]
    drawn = ET.fromstring(svg(ops, {}))
    assert [t.text for t in drawn.iter("text") if "class" not in t.attrib] == ["x", "mul"]
    assert len(list(drawn.iter("path"))) == 1


def broken(q: Tensor, kv: Tensor) -> Tensor:
    p = (q @ kv.mT).softmax(-1)
    torch._dynamo.graph_break()
    out: Tensor = p @ kv
    return out


def test_a_graph_break_inside_an_attention_is_named() -> None:
    found = mla_compile.explain(broken, torch.randn(2, 3, 8), torch.randn(2, 5, 8))
    (miss,) = found.misses
    assert (miss.reason, found.graphs, len(found.breaks)) == ("GRAPH_BREAK", 2, 1)
    assert f"{__file__}:{broken.__code__.co_firstlineno + 2}: " in miss.graph_break
    assert "graph break" in miss.remedy


def expand(latent: Tensor, kv_b: Tensor) -> Tensor:
    kv: Tensor = (latent @ kv_b).unflatten(-1, (N, P)).transpose(1, 2)
    return kv


def hidden_from_the_start(q: Tensor, latent: Tensor, kv_b: Tensor) -> Tensor:
    kv = torch.compiler.disable(expand)(latent, kv_b)
    out: Tensor = (q @ kv.mT).softmax(-1) @ kv
    return out


def hidden(q: Tensor, latent: Tensor, kv_b: Tensor) -> Tensor:
    kv = (latent @ kv_b).unflatten(-1, (N, P)).transpose(1, 2)
    torch._dynamo.graph_break()
    out: Tensor = (q @ kv.mT).softmax(-1) @ kv
    return out


def cut_at_the_scores(q: Tensor, latent: Tensor, kv_b: Tensor) -> Tensor:
    kv = (latent @ kv_b).unflatten(-1, (N, P)).transpose(1, 2)
    scores = q @ kv.mT
    torch._dynamo.graph_break()
    out: Tensor = scores.softmax(-1) @ kv
    return out


@pytest.mark.parametrize(
    "cut, line", [(hidden, 2), (cut_at_the_scores, 3), (hidden_from_the_start, 1)]
)
def test_a_graph_break_between_cache_and_attention_is_named(
    cut: Callable[..., Tensor], line: int
) -> None:
    x = torch.randn(B, N, 1, P), torch.randn(B, SKV, LKV), torch.randn(LKV, N * P)
    (miss,) = mla_compile.explain(cut, *x).misses
    assert miss.reason == "GRAPH_BREAK"
    assert miss.graph_break.startswith(f"{__file__}:{cut.__code__.co_firstlineno + line}: ")
    assert "graph break" in miss.remedy


def cut_before_the_scores_are_read(scores: Tensor, kv: Tensor) -> Tensor:
    torch._dynamo.graph_break()
    out: Tensor = scores.softmax(-1) @ kv
    return out


def test_the_graph_break_of_another_function_is_not_named() -> None:
    torch._dynamo.reset()
    with reporting() as found, torch.no_grad():
        torch.compile(broken)(torch.randn(2, 3, 8), torch.randn(2, 5, 8))
        torch.compile(cut_before_the_scores_are_read)(torch.randn(2, 3, 5), torch.randn(2, 5, 8))
    line = cut_before_the_scores_are_read.__code__.co_firstlineno + 1
    assert found.misses[-1].graph_break.startswith(f"{__file__}:{line}: ")


def appended(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    q = q.sin()
    torch._dynamo.graph_break()
    k, v = (torch.cat([cache, q], 2) for cache in (keys, values))
    out: Tensor = (q @ k.mT).softmax(-1) @ v
    return out


def test_a_graph_break_is_named_whatever_branches_there_are() -> None:
    """Each branch is a graph that meets the pass before the one that it is a branch of."""

    def branching(q: Tensor, kv: Tensor) -> Tensor:
        q = torch.cond(q.sum() > 0, lambda q: q * 2, lambda q: q * 3, (q,))
        p = (q @ kv.mT).softmax(-1)
        torch._dynamo.graph_break()
        return p @ kv

    found = mla_compile.explain(branching, torch.randn(2, 3, 8), torch.randn(2, 5, 8))
    assert [miss.reason for miss in found.misses] == ["GRAPH_BREAK"]
    assert (found.graphs, len(found.breaks)) == (2, 1)


def test_a_reset_forgets_no_graph_break() -> None:
    torch._dynamo.reset()
    with reporting() as found, torch.no_grad():
        for _ in range(2):
            torch.compile(broken)(torch.randn(2, 3, 8), torch.randn(2, 5, 8))
            torch._dynamo.reset()
    assert [miss.reason for miss in found.misses] == ["GRAPH_BREAK"] * 2
    assert len(found.breaks) == 2


def test_a_report_may_begin_behind_a_graph_break() -> None:
    factors = [2.0]

    def scaled(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x * factors[0]

    torch._dynamo.reset()
    torch.compile(scaled)(torch.ones(3))
    factors[0] = 3.0
    with reporting() as found:
        assert torch.compile(scaled)(torch.ones(3)).tolist() == [3.0] * 3
    assert (found.graphs, found.breaks) == (1, [])


def test_nothing_that_explain_compiled_is_left_after_an_error() -> None:
    def fail(out: Tensor) -> None:
        raise KeyError

    def step(*args: Tensor) -> None:
        torch.compiler.disable(fail)(attention(*args))

    with pytest.raises(KeyError):
        mla_compile.explain(step, *inputs())
    assert torch._dynamo.eval_frame._debug_get_cache_entry_list(step.__code__) == []


def test_what_is_sampled_from_is_no_attention() -> None:
    def sample(x: Tensor, head: Tensor) -> Tensor:
        p = (x @ head).softmax(-1)
        torch._dynamo.graph_break()
        return p.cumsum(-1)

    assert mla_compile.explain(sample, torch.randn(2, 3, 8), torch.randn(8, 9)).misses == []


def test_what_dynamo_leaves_to_python_is_told() -> None:
    def layers(q: Tensor, kv: Tensor) -> Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
            q = (q @ kv.mT).softmax(-1) @ kv
        return q

    found = mla_compile.explain(layers, torch.randn(2, 3, 8), torch.randn(2, 5, 8))
    assert (found.graphs, found.skipped) == (0, 1)
    assert "left to Python" in found.title() and "graph breaks out of loops" in found.title()


def test_what_another_thread_compiles_is_told() -> None:
    def compiling() -> None:
        torch._dynamo.reset()
        torch.compile(attention)(*inputs())

    with reporting() as found:
        thread = Thread(target=compiling)
        thread.start()
        thread.join()
    assert "another thread" in found.title() if found.unseen else len(found.sites) == 1


def test_a_report_goes_on_after_disable() -> None:
    torch._dynamo.reset()
    with reporting() as found, torch.no_grad():
        mla_compile.disable()
        mla_compile.enable()
        torch.compile(attention)(*inputs())
    assert len(found.sites) == 1


def test_an_attention_after_a_graph_break_keeps_its_own_reason() -> None:
    shapes = (B, N, 1, P), (B, N, SKV, P), (B, N, SKV, P)
    (miss,) = mla_compile.explain(appended, *map(torch.randn, shapes)).misses
    assert miss.reason == "NO_LATENT"


def mixed(x: Tensor, w: Tensor) -> Tensor:
    """Streams mixed by a matrix that is a part of a projection, as hyper-connections do."""
    mix = (x.flatten(1) @ w)[:, :9].view(-1, 3, 3).softmax(-1) + 1e-6
    return mix.mT @ x


def test_softmaxes_that_are_no_attention_are_listed_apart() -> None:
    found = mla_compile.explain(mixed, torch.randn(2, 3, 4), torch.randn(12, 12))
    line = f"{__file__}:{mixed.__code__.co_firstlineno + 2}"
    assert (found.sites, found.misses, found.others) == ([], [], [line])
    assert "0 left alone" in str(found) and f"no attention at {line}" in str(found)


class Seeing(CustomGraphPass):
    """A user's own pass: does it see the op?"""

    ops = -1

    def __call__(self, graph: Graph) -> None:
        self.ops = sum(n.target is OP for n in graph.nodes)

    def uuid(self) -> None:
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Seeing:
        return self


def test_the_users_own_pass_runs_as_in_the_real_compilation() -> None:
    by_config, by_options = Seeing(), Seeing()
    with config.patch(joint_custom_pre_pass=by_config):
        assert len(mla_compile.explain(attention, *inputs()).sites) == 1
    assert by_config.ops == 1
    with reporting() as found, torch.no_grad():
        options: dict[str, Any] = {"joint_custom_pre_pass": by_options}
        torch.compile(attention, backend="mla", options=options)(*inputs())
    assert (by_options.ops, len(found.sites)) == (1, 1)


def test_explain_does_not_warn_of_caches(recwarn: pytest.WarningsRecorder) -> None:
    assert mla_compile.explain(lambda x: x @ x, torch.randn(3, 3)).graphs == 1
    assert [str(w.message) for w in recwarn if "cache" in str(w.message)] == []


SCRIPT = """
import sys
import torch
from tests.test_report import attention, inputs

torch.set_grad_enabled(False)
compiled = torch.compile(attention, fullgraph=True)
for _ in range(int(sys.argv[1])):
    compiled(*inputs())
sys.exit(3)
"""


def explained(
    tmp_path: Path, *arguments: str, save: str = "r.html"
) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "mla_compile", "explain", "--save", str(tmp_path / save)]
    return subprocess.run(
        [*command, str(script), *arguments], cwd=ROOT, capture_output=True, text=True
    )


def test_a_script_is_run_and_reported_on(tmp_path: Path) -> None:
    result = explained(tmp_path, "2")
    assert result.returncode == 3, result.stderr
    assert "1 attention(s) rewritten, 0 left alone, 1 graph(s)" in result.stdout
    assert "mla_decode" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("save", ["nowhere/r.html", "."])
def test_there_must_be_a_file_for_the_report(tmp_path: Path, save: str) -> None:
    result = explained(tmp_path, "2", save=save)
    assert result.returncode == 2 and "name a file in a folder" in result.stderr


def test_a_script_that_compiles_nothing_is_told_so(tmp_path: Path) -> None:
    assert "nothing was compiled" in explained(tmp_path, "0").stdout


DEEPSEEK = {"B": 1, "Sq": 1, "Skv": 4096, "N": 128, "Lkv": 512, "R": 64, "P": 128, "V": 128}


def test_the_op_reads_the_cache_once_for_all_heads() -> None:
    assert absorbed(DEEPSEEK).elements == 4096 * 576
    assert as_written(DEEPSEEK, expanded=False).elements == 4096 * (576 + 512)
    assert as_written(DEEPSEEK, expanded=True).elements == 4096 * (576 + 2 * 128 * 320)


def test_absorbed_flops_are_those_of_the_benchmark() -> None:
    assert absorbed(DEEPSEEK).flops == 2 * 128 * 4096 * (576 + 512)
    assert rewritten(DEEPSEEK, expanded=False) == absorbed(DEEPSEEK)
    assert saving(DEEPSEEK, expanded=False)["FLOPs"] == "1.14e+09 as before"


@pytest.mark.parametrize(
    ("shape", "wanted"), [((2, 1, 1, 40), KEY_MASK), ((2, 3, 1, 40), "attn_mask")]
)
def test_a_mask_of_keys_is_told_from_a_mask_of_rows(shape: tuple[int, ...], wanted: str) -> None:
    """Only the former has a Gluon kernel."""

    def attention(q: Tensor, cache: Tensor, mask: Tensor) -> Tensor:
        scores = torch.einsum("bnd,bsd->bns", q, cache) * 0.1 + mask[:, :, 0]
        return torch.einsum("bns,bsl->bnl", scores.softmax(-1), cache[..., :16])

    compiled = Compiled(attention)
    compiled(torch.randn(2, 3, 24), torch.randn(2, 40, 24), torch.randn(shape))
    (site,) = compiled.sites
    assert rare(site) == wanted
