"""What the pass makes of a model: `mla_compile.explain(model, *inputs)`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._inductor import config

from mla_compile.passes.inductor import MLAPass, Verdict
from mla_compile.passes.site import Miss, MLASite, ScoreTerm


@dataclass(frozen=True)
class Rewritten:
    """One attention that became the op."""

    where: str  # file:line of the softmax in the user's code
    form: str
    cache: str
    mask: str
    scale: float  # the softmax scale, without factors already in the queries
    op: str
    dims: dict[str, Any]  # by the names of DESIGN.md's symbol table; values may be symbolic


@dataclass(frozen=True)
class Refused:
    """One attention that was left as it was."""

    where: str
    reason: str
    detail: str
    remedy: str


@dataclass
class Report:
    """`sites` were rewritten, `misses` were not; str() is a table of both."""

    sites: list[Rewritten] = field(default_factory=list)
    misses: list[Refused] = field(default_factory=list)

    def record(self, verdict: Verdict) -> None:
        if isinstance(verdict, Miss):
            self.misses.append(
                Refused(verdict.where, verdict.reason.name, verdict.detail, verdict.remedy)
            )
        else:
            self.sites.append(rewritten(verdict))

    def __str__(self) -> str:
        lines = [f"{len(self.sites)} attention(s) rewritten, {len(self.misses)} left alone"]
        for i, s in enumerate(self.sites, start=1):
            sizes = ", ".join(f"{name}={size}" for name, size in s.dims.items())
            rows = {
                "form": s.form,
                "cache": s.cache,
                "mask": s.mask,
                "scale": f"{s.scale:.6g}",
                "sizes": sizes,
                "became": s.op,
            }
            lines += [f"  [{i}] {s.where}", *(f"      {k:<7}{v}" for k, v in rows.items())]
        for i, m in enumerate(self.misses, start=len(self.sites) + 1):
            rows = {"left": f"{m.reason}: {m.detail}", "remedy": m.remedy}
            lines += [f"  [{i}] {m.where}", *(f"      {k:<7}{v}" for k, v in rows.items())]
        return "\n".join(lines)


def rewritten(site: MLASite) -> Rewritten:
    def cache(name: str, term: ScoreTerm) -> str:
        value = term.key.node.meta["val"]
        return f"{name} in {str(value.dtype).removeprefix('torch.')}{list(value.shape)}"

    caches = [cache("kv_c", site.latent), *([cache("k_pe", site.rope)] if site.rope else [])]
    op = "mla_compile::mla_decode" + (" with W_UK and W_UV absorbed" if site.expanded else "")
    return Rewritten(
        site.where, site.family, ", ".join(caches), site.mask, site.latent.scale, op, site.dims
    )


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Compile `fn` with the pass, run it once without grad, and report on every attention in it.

    The run is real: a cache among the arguments is written to.  What Dynamo had compiled is forgotten
    and Inductor's caches are off meanwhile, because a graph from a cache never meets the pass.
    """
    report = Report()
    hook = MLAPass(record=report.record)
    torch._dynamo.reset()
    with config.patch(joint_custom_pre_pass=hook, force_disable_caches=True), torch.no_grad():
        torch.compile(fn)(*args, **kwargs)
    torch._dynamo.reset()
    return report
