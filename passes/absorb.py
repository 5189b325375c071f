"""Does it pay to move W_UK to the query and W_UV to the output?

Counted in multiply-adds per head of one sequence.  Expanded, every cached token is multiplied by
W_UK [Lkv, P] and W_UV [Lkv, V] and attended to over P + R and V; absorbed, every query is, and
cached tokens are attended to over Lkv + R and Lkv.
"""

from __future__ import annotations

from mla_compile.passes.graph import true
from mla_compile.passes.site import Miss, MLASite, Reason, Refusal


def weigh(site: MLASite) -> MLASite | Miss:
    """The site, or a Miss where expanding the cache is the cheaper way."""
    if not site.expanded or absorption_pays(site):
        return site
    detail = f"{site.dims['Sq']} queries over {site.dims['Skv']} cached tokens"
    return Refusal(Reason.PREFILL, detail).miss(site.root)


def absorption_pays(site: MLASite) -> bool:
    """Absorbing is known to be cheaper: at this cache length or, if symbolic, at any long one."""
    d = site.dims
    Sq, Skv, Lkv, P, V = (d[name] for name in ("Sq", "Skv", "Lkv", "P", "V"))
    saved_per_token = Lkv * (P + V) - Sq * (Lkv + Lkv - P - V)
    if not isinstance(Skv, int):
        return true(saved_per_token > 0)
    return true(Skv * saved_per_token > Sq * Lkv * (P + V))
