"""Is the cache gathered by pages?  Then pool and table go to the op, and nothing is gathered."""

from __future__ import annotations

from mla_compile.passes.graph import shape
from mla_compile.passes.indexing import (
    Group,
    Index,
    Label,
    Leaf,
    Split,
    labels_of,
    relabel,
    splitting,
    substitute,
    whole,
)
from mla_compile.passes.site import MLASite, Paging
from mla_compile.passes.sizes import equal


def find_paging(site: MLASite) -> Paging | None:
    """How the caches are paged; None if they are not, or not both by the same table."""
    keys, time = [term.key for term in site.terms], site.time
    if len(time) == 1 and not site.masks:
        keys, time = whole_pages(keys, *time) or (keys, time)
    tables = [table_of(key, site.batch, time) for key in keys]
    if None in tables:
        return None
    (table, pages, page), (other, _, other_page) = tables[0], tables[-1]
    if table != other or not equal(page.size, other_page.size):
        return None
    in_pool = tuple(
        Leaf(key.node, (*key.index[:dim], whole(page), *key.index[dim + 1 :]))
        for key in keys
        for dim, _ in key.tables
    )
    return Paging(in_pool, table, page, pages, time[len(pages) :])


def table_of(key: Leaf, batch: Group, time: Group) -> tuple[Leaf, Group, Label] | None:
    """The table that a cache is gathered by; the labels of a sequence's pages and the pool's."""
    if len(key.tables) != 1 or len(key.index[key.tables[0][0]]) != 1:
        return None
    dim, table = key.tables[0]
    pages = tuple(x for x in time if x in table.labels)
    inside, of_table = labels_of(key.index[:dim] + key.index[dim + 1 :]), {*batch, *pages}
    apart = table.labels <= of_table and not inside & of_table
    if not (pages and pages == time[: len(pages)] and apart):
        return None
    return table, pages, Label("page", shape(key.node)[dim])


def whole_pages(keys: list[Leaf], token: Label) -> tuple[list[Leaf], Group] | None:
    """Keys that read a slice of the tokens, as keys of all tokens; the op is told the length."""
    digits = [d for key in keys for entry in key.index for d in entry if d.label is token]
    if not digits or equal(digits[0].base, token.size):
        return None
    if not all(equal(d.offset, 0) and equal(d.base, digits[0].base) for d in digits):
        return None

    def read(tokens: Index) -> list[tuple[list[Leaf], Group]]:
        whole_keys = (Leaf(x.node, substitute(x.index, token, tokens[0])) for x in keys)
        return [([descend(key) for key in whole_keys], tuple(d.label for d in tokens[0]))]

    try:
        found, *others = splitting((whole(Label(token.name, digits[0].base)),), read)
    except Split:
        return None
    return None if others else found


def descend(leaf: Leaf) -> Leaf:
    while read := relabel(leaf.node, leaf.index):
        leaf = Leaf(*read)
    return leaf
