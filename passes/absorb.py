"""Does it pay to move W_UK to the query and W_UV to the output?"""

from __future__ import annotations

from mla_compile.passes.graph import Size, true
from mla_compile.passes.site import MLASite


def saved_flops(Sq: Size, Skv: Size, Lkv: Size, R: Size, P: Size, V: Size) -> Size:
    """Multiply-adds per head of one sequence that absorption saves; negative where it costs.

    Expanded, every cached token is multiplied by W_UK [Lkv, P] and W_UV [Lkv, V] and attended to over P + R and V;
    absorbed, every query is, and cached tokens are attended to over Lkv + R and Lkv.
    """
    expanded = Skv * Lkv * (P + V) + Sq * Skv * (P + R + V)
    absorbed = Sq * Lkv * (P + V) + Sq * Skv * (Lkv + R + Lkv)
    return expanded - absorbed


def absorption_pays(site: MLASite) -> bool:
    """True if absorbing is cheaper at every size the graph can be run with; not known to be counts as no."""
    d = site.dims
    return true(saved_flops(d["Sq"], d["Skv"], d["Lkv"], d["R"], d["P"], d["V"]) > 0)
