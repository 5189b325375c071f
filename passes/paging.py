"""Is the cache gathered by pages?  Then pool and table go to the op, and nothing is gathered."""

from __future__ import annotations

from mla_compile.passes.graph import equal, shape
from mla_compile.passes.indexing import (
    Entry,
    Label,
    Leaf,
    Refine,
    Segment,
    labels_of,
    refined,
    substitute,
    whole,
)
from mla_compile.passes.site import Mask, Paging, ScoreTerm
from mla_compile.passes.views import relabel

Group = tuple[Label, ...]


def find_paging(
    latent: ScoreTerm, rope: ScoreTerm | None, batch: Group, time: Group, masks: tuple[Mask, ...]
) -> Paging | None:
    """How the caches are paged; None if they are not, or not both by the same table."""
    keys = [term.key for term in (latent, rope) if term]
    if len(time) == 1 and not masks:
        keys, time = whole_pages(keys, time[0])
    tables = [table_of(key, batch, time) for key in keys]
    if None in tables:
        return None
    (table, pages, page), (other, _, other_page) = tables[0], tables[-1]
    if table.key({}) != other.key({}) or not equal(page.size, other_page.size):
        return None
    kv_c, k_pe = (in_pool(key, page) for key in (keys[0], keys[-1]))
    return Paging(kv_c, k_pe if rope else None, table, page, pages, time[len(pages) :])


def table_of(key: Leaf, batch: Group, time: Group) -> tuple[Leaf, Group, Label] | None:
    """The table that a cache is gathered by; the labels of a sequence's pages and the pool's."""
    if len(key.tables) != 1 or len(key.index[key.tables[0][0]]) != 1:
        return None
    dim, table = key.tables[0]
    pages = tuple(x for x in time if x in table.labels)
    inside = labels_of(key.index[:dim] + key.index[dim + 1 :])
    if not pages or pages != time[: len(pages)] or not table.labels <= {*batch, *pages}:
        return None
    if inside & {*batch, *pages}:
        return None
    return table, pages, Label("page", shape(key.node)[dim])


def in_pool(key: Leaf, page: Label) -> Leaf:
    """The key of a page, wherever a table says it is."""
    dim = key.tables[0][0]
    return Leaf(key.node, (*key.index[:dim], whole(page), *key.index[dim + 1 :]))


def whole_pages(keys: list[Leaf], token: Label) -> tuple[list[Leaf], Group]:
    """Keys that read a slice of the tokens, as keys of all tokens; the op is told the length."""
    cut = [d for key in keys for entry in key.index for d in entry if d.label is token]
    base = cut[0].base if cut else token.size
    if not all(equal(d.offset, 0) and equal(d.base, base) for d in cut) or equal(base, token.size):
        return keys, (token,)

    def with_tokens(key: Leaf, tokens: Entry) -> Leaf:
        return descend(Leaf(key.node, substitute(key.index, token, lambda d: tokens)))

    tokens = whole(Label(token.name, base))
    try:
        while True:
            try:
                return [with_tokens(key, tokens) for key in keys], tuple(d.label for d in tokens)
            except Refine as refine:
                if refine.label not in labels_of((tokens,)):
                    raise
                outer = Label(f"{refine.label}o", refine.label.size // refine.inner)
                inner = Label(f"{refine.label}i", refine.inner)
                (tokens,) = refined((tokens,), refine, outer, inner)
    except (Refine, Segment):
        return keys, (token,)


def descend(leaf: Leaf) -> Leaf:
    while read := relabel(leaf.node, leaf.index):
        leaf = Leaf(*read)
    return leaf
