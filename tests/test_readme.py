"""Every python snippet of the README runs, in order, each on its own."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
TEXT = README.read_text()
SNIPPETS = list(re.finditer(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))


def test_the_readme_has_snippets() -> None:
    assert SNIPPETS


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s[1].strip().splitlines()[-1])
def test_a_snippet_runs(snippet: re.Match[str]) -> None:
    above = "\n" * TEXT.count("\n", 0, snippet.start(1))  # errors name the README's own lines
    exec(compile(above + snippet[1], str(README), "exec"), {"__name__": "readme"})
