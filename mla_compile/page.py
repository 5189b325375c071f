"""A self-contained HTML page: no scripts, no fonts, nothing fetched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
section { border-top: 1px solid #ccc; margin-top: 2rem; }
th { text-align: left; padding-right: 1.5rem; vertical-align: top; font-weight: 600; }
figure { margin: 1rem 0; overflow-x: auto; }
figcaption { color: #555; }
svg rect { fill: #f4f5f7; stroke: #8b9098; }
svg .input rect { fill: #e3edfb; stroke: #5b87c5; }
svg .ours rect { fill: #fbe3df; stroke: #d1452b; stroke-width: 2; }
svg path { fill: none; stroke: #8b9098; }
svg text { font: 12px system-ui, sans-serif; text-anchor: middle; }
svg text.shape { font-size: 10px; fill: #555; }
"""


@dataclass(frozen=True)
class Section:
    title: str
    rows: Mapping[str, str]
    pictures: Mapping[str, str] = field(default_factory=dict)  # inline SVG by caption


def html(title: str, sections: Iterable[Section]) -> str:
    body = "\n".join(map(section, sections))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}\n"
        "</body></html>\n"
    )


def section(s: Section) -> str:
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in s.rows.items()
    )
    figures = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{picture}</figure>"
        for caption, picture in s.pictures.items()
    )
    return f"<section><h2>{escape(s.title)}</h2><table>{rows}</table>{figures}</section>"
