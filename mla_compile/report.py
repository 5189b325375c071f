"""What the pass makes of a model: `mla_compile.explain(model, *inputs)`."""

from __future__ import annotations

import re
import runpy
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch._dynamo import output_graph
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from torch._inductor import config
from torch.fx import Graph, Node

from mla_compile.backend import composed
from mla_compile.kernels.config import KEY_MASK
from mla_compile.page import Section, html
from mla_compile.passes.graph import aten, strip
from mla_compile.passes.inductor import MLAPass, Verdict
from mla_compile.passes.site import CacheTerm, Miss, MLASite, Reason, source_line
from mla_compile.passes.softmax import division, find_softmaxes, parts_of_scores, weighing
from mla_compile.picture import Op, between, snapshot, svg
from mla_compile.saving import saving


@dataclass(frozen=True)
class Rewritten:
    """One attention that became the op."""

    where: str  # file:line of the softmax in the user's code
    module: str  # its path in the model, '' outside of one
    form: str
    cache: str
    mask: str
    scale: str  # the softmax scale, without factors already in the queries
    op: str
    kernel: str  # of this machine's GPU, and why; '' on a CPU
    dims: dict[str, Any]  # by the names of DESIGN.md's symbol table; values may be symbolic
    saves: dict[str, str]
    before: str = field(repr=False)  # inline SVG
    after: str = field(repr=False)

    def rows(self) -> dict[str, str]:
        rows = {
            "module": self.module,
            "form": self.form,
            "cache": self.cache,
            "mask": self.mask,
            "scale": self.scale,
            "sizes": ", ".join(f"{name}={size}" for name, size in self.dims.items()),
            "became": self.op,
            "kernel": self.kernel,
            **self.saves,
        }
        return {k: v for k, v in rows.items() if v}


@dataclass(frozen=True)
class Refused:
    """One attention that was left as it was."""

    where: str
    module: str
    reason: str
    detail: str
    remedy: str
    node: str  # that gave the reason, and its source line
    graph_break: str = ""  # at which the attention's graph begins or ends

    def rows(self) -> dict[str, str]:
        rows = {
            "module": self.module,
            "left": f"{self.reason}: {self.detail}",
            "node": self.node,
            "remedy": self.remedy,
            "break": self.graph_break,
        }
        return {k: v for k, v in rows.items() if v}


@dataclass
class Report:
    """`sites` were rewritten, `misses` were not; str() is a table of all."""

    sites: list[Rewritten] = field(default_factory=list)
    misses: list[Refused] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # source lines of other softmaxes
    breaks: list[str] = field(default_factory=list)  # graph breaks: source line and reason
    graphs: int = 0  # that were compiled
    skipped: int = 0  # functions that Dynamo left to Python
    unseen: bool = False  # something was compiled, but without the pass

    def title(self) -> str:
        python = f", {self.skipped} function(s) left to Python by Dynamo" if self.skipped else ""
        if self.graphs:
            counts = f"{len(self.sites)} attention(s) rewritten, {len(self.misses)} left alone"
            return f"{counts}, {self.graphs} graph(s), {len(self.breaks)} graph break(s){python}"
        if self.unseen:
            how = "another thread, backend or joint_custom_pre_pass, or a mode without these passes"
            return f"what was compiled was compiled without the pass: {how}{python}"
        if self.skipped:
            how = "take graph breaks out of loops, `with` and `try`"
            return f"nothing was compiled{python}: {how}; TORCH_LOGS=graph_breaks names them"
        how = "wrap the model in torch.compile, or pass it to explain(), with Dynamo switched on"
        return f"nothing was compiled in this process: {how}"

    def sections(self) -> Iterable[Section]:
        attentions: list[Rewritten | Refused] = [*self.sites, *self.misses]
        for i, found in enumerate(attentions, start=1):
            pictures = {}
            if isinstance(found, Rewritten):
                pictures = {"before": found.before, "after": found.after}
            yield Section(f"[{i}] {found.where}", found.rows(), pictures)
        for text in self.breaks:
            where, _, reason = text.partition(": ")
            yield Section(f"graph break at {where}", {"reason": reason})
        for where, count in Counter(self.others).items():
            why = f"{count} softmax(es) of something else than queries times keys"
            yield Section(f"no attention at {where}", {"reason": why})

    def __str__(self) -> str:
        lines = [self.title()]
        for section in self.sections():
            lines += [f"  {section.title}", *(f"      {k:<7}{v}" for k, v in section.rows.items())]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write a self-contained HTML page with a picture of each site before and after."""
        Path(path).write_text(html(self.title(), self.sections()), encoding="utf-8")


class Recorder(MLAPass):
    """The pass, telling a report what it sees and says.

    It has no uuid, for a graph from a cache never meets the pass, and is not copied with the
    configuration that holds it, for a copy would report to nobody.
    """

    def __init__(self, report: Report, previous: Sequence[Callable[[Graph], None]] = ()):
        super().__init__(previous)
        self.report = report
        self.seen = list(graph_breaks())
        self.tracing: TracingContext | None = None  # of the function at hand
        self.ops: dict[str, Op] = {}  # of the graph at hand, before the pass
        self.known: set[str] = set()  # its nodes, those of rewritten attentions included
        self.ended = self.resumed = ""  # the breaks that it ends at and begins after

    def uuid(self) -> None:
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Recorder:
        return self

    def __call__(self, graph: Graph) -> None:
        tracing = TracingContext.try_get()
        if tracing is None or tracing is not self.tracing:  # not a branch of the last one
            self.begin()
        self.tracing = tracing
        self.ops = snapshot(graph.nodes)
        self.known = set(self.ops)
        if self.ended:
            self.report.misses += cut_attentions(graph, self.ended)
        super().__call__(graph)

    def begin(self) -> None:
        """Another function: between which graph breaks?"""
        self.report.graphs += 1
        seen, self.seen = set(map(id, self.seen)), list(graph_breaks())
        new = [described(x) for x in self.seen if id(x) not in seen]
        before, line = self.report.breaks[-1:] or new[:1], resumed_line()
        self.report.breaks += new
        at = [x for x in self.report.breaks if x.partition(": ")[0].endswith(f":{line}")]
        self.resumed = ["", *before, *at][-1] if line else ""
        self.ended = new[-1] if new and new[-1] != self.resumed else ""

    def note(self, verdict: Verdict) -> None:
        super().note(verdict)
        if isinstance(verdict, Miss):
            if verdict.reason is Reason.NO_QUERY:
                self.report.others.append(verdict.where)
            else:
                self.report.misses.append(refused(verdict, self.resumed, self.ended))
            return
        nodes = snapshot(verdict.root.graph.nodes)
        new = [op for name, op in nodes.items() if name not in self.known]
        self.known |= set(nodes)
        self.report.sites.append(rewritten(verdict, self.ops, nodes, new))


def graph_breaks() -> list[Any]:
    """All since torch._dynamo.reset(), which a script may call: Dynamo's own record."""
    reasons: list[Any] = vars(output_graph)["graph_break_reasons"]
    return reasons


def dynamo_counts() -> Counter[str]:
    """Functions that Dynamo looked at (`total`) and compiled (`ok`), and their `unique_graphs`."""
    return Counter(counters["frames"]) + Counter(counters["stats"])


def resumed_line() -> str:
    """The line of the graph break that the graph at hand begins after, or nothing."""
    tracing = TracingContext.try_get()
    names = " ".join(code.co_name for code in (tracing and tracing.traced_code) or [])
    return "".join(re.findall(r"torch_dynamo_resume_in_\S*_at_(\d+)", names)[-1:])


def described(reason: Any) -> str:
    frame = reason.user_stack[-1] if reason.user_stack else None
    where = f"{frame.filename}:{frame.lineno}" if frame else "?"
    return f"{where}: {reason.reason.strip().splitlines()[0]}"


def cut_attentions(graph: Graph, graph_break: str) -> list[Refused]:
    """Softmaxes whose probabilities leave the graph before they weigh anything.

    Of batched products: those of a matrix product may be a router's, or be sampled from.
    """
    results = {strip(n) for n in graph.output_node().all_input_nodes}
    results |= {strip(parts[0]) for n in results if (parts := division(n))}
    batched = {aten.bmm.default, aten.baddbmm.default}
    return [
        Refused(
            where=source_line(softmax.node),
            module=module_path(softmax.node),
            reason="GRAPH_BREAK",
            detail="the probabilities leave the graph before they meet the values",
            remedy="take the graph break out of the attention",
            node=described_node(softmax.node),
            graph_break=graph_break,
        )
        for softmax in find_softmaxes(graph)
        if not weighing(softmax) and strip(softmax.node) in results
        if any(node.target in batched for node in parts_of_scores(softmax))
    ]


def refused(miss: Miss, resumed: str, ended: str) -> Refused:
    found = Refused(
        where=miss.where,
        module=module_path(miss.attention),
        reason=miss.reason.name,
        detail=miss.detail,
        remedy=miss.remedy,
        node=described_node(miss.node),
        graph_break=ended or resumed,
    )
    if not resumed or miss.node.op != "placeholder":
        return found
    return replace(
        found,
        reason="GRAPH_BREAK",
        detail=f"{miss.detail}; what it is made of is before the graph break",
        remedy="take the graph break out from between cache and attention",
        graph_break=resumed,
    )


def described_node(node: Node) -> str:
    if node.op == "placeholder":
        return f"{node.name}, an input of the graph"
    return f"{node.name} ({node.target}), {source_line(node)}"


def module_path(node: Node) -> str:
    """As in model.named_modules()."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return re.sub(r"^[LG](\['\w+'\])+\.?", "", stack[-1][0]) if stack else ""


def rewritten(
    site: MLASite, before: dict[str, Op], after: dict[str, Op], new: list[Op]
) -> Rewritten:
    def cache(name: str, term: CacheTerm) -> str:
        value = term.key.node.meta["val"]
        return f"{name} in {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"

    caches = [cache("kv_c", site.latent), *([cache("k_pe", site.rope)] if site.rope else [])]
    names = roles(site)
    old = between(before, site.root.name, names)
    made = {x.name for x in new}
    read = {name for x in new for name in x.inputs} - made
    drawn = [x for name, x in after.items() if name in read | made]  # one may be made of another
    return Rewritten(
        where=site.where,
        module=module_path(site.root),
        form=site.family,
        cache=", ".join(caches),
        mask=site.mask,
        scale=f"{site.latent.scale:.6g}" + " × a number of run time" * len(site.latent.scalars),
        op="mla_compile::mla_decode" + (" with W_UK and W_UV absorbed" if site.expanded else ""),
        kernel=kernel(site),
        dims=site.dims,
        saves=saving(site.dims, site.expanded),
        before=svg(old, names),
        after=svg(drawn, names),
    )


def rare(site: MLASite) -> str:
    """What `decode` says of the call's mask."""
    rows = frozenset((*site.queries, *site.heads))
    of_rows = any(x.size != 1 for mask in site.masks for x in mask.leaf.labels & rows)
    if of_rows or (site.masks and (site.paging or site.causal)):
        return "attn_mask"
    return KEY_MASK if site.masks else ""


def kernel(site: MLASite) -> str:
    value = site.latent.key.node.meta["val"]
    if value.device.type != "cuda":
        return ""
    from mla_compile.kernels.decode import configure_for  # imports Triton

    dims = site.dims
    rows = dims["Sq"] * dims["N"]
    config, why = configure_for(
        value.device,
        rows=rows if isinstance(rows, int) else 64,
        Lkv=dims["Lkv"],
        R=dims["R"],
        q_bytes=value.element_size(),
        kv_bytes=value.element_size(),
        rare=rare(site),
    )
    return f"{config.kernel}, {config.block_m} rows × {config.block_n} keys: {why}"


def roles(site: MLASite) -> dict[str, str]:
    """What the nodes that an attention is made of are to it, by their names."""
    parts = [
        *(("W_UK" if site.latent.feature in q.labels else "query", q) for q in site.latent.factors),
        *(("query", leaf) for leaf in (site.rope.factors if site.rope else ())),
        *(("W_UV", leaf) for leaf in site.values.factors),
        *(("mask", mask.leaf) for mask in site.masks),
        *(("lengths", leaf) for leaf in (site.lengths.terms if site.lengths else ())),
        ("kv_c", site.latent.key),
        *([("k_pe", site.rope.key)] if site.rope else ()),
    ]
    found: dict[str, list[str]] = {}
    for role, leaf in parts:
        names = found.setdefault(leaf.node.name, [])
        names += [] if role in names else [role]
    return {name: ", ".join(names) for name, names in found.items()}


@contextmanager
def reporting() -> Iterator[Report]:
    """Put the pass into what is compiled meanwhile, and report on every attention in it.

    Passes of the user's own run after it.  No graph is taken from Inductor's caches, for such a
    graph never meets the pass.
    """
    report, before = Report(), dynamo_counts()
    others = composed(config.joint_custom_pre_pass).previous
    try:
        with config.patch(joint_custom_pre_pass=Recorder(report, others)):
            yield report
    finally:
        new = dynamo_counts() - before
        report.skipped = new["total"] - new["ok"]
        report.unseen = not report.graphs and new["unique_graphs"] > 0


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Compile `fn` with the pass, run it once without grad, and report on every attention in it.

    The run is real: a cache among the arguments is written to.  What Dynamo had compiled is
    forgotten, and so are the settings of a function that is compiled already.
    """
    torch._dynamo.reset()
    try:
        with reporting() as report, torch.no_grad():
            torch.compile(fn)(*args, **kwargs)
    finally:
        torch._dynamo.reset()
    return report


def run_script(path: str, arguments: Sequence[str]) -> None:
    """Run a script as `python path arguments` would."""
    argv, sys.argv = sys.argv, [path, *arguments]
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        sys.argv = argv
        sys.path.pop(0)
