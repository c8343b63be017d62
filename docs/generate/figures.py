"""The index of figures, from the tables of the pages that define them."""

from __future__ import annotations

import re
from pathlib import Path

INTRODUCTION = """# Metrics

An index of every figure that `winnow evaluate` and `winnow circuit` report. The pages that are linked say
how each is measured, on which sample, and what it costs. In `evaluation.json` a figure has an id, a value,
a 95 % interval, and the size and unit of its sample. This page is generated from those pages.
"""
PAGES = ("evaluation.md", "circuits.md")
"""Pages of `docs/` whose tables define figures."""
_SECTION = re.compile(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
_TABLE = re.compile(r"^\| (?:id|figure) \| (?:definition)? ?\|\n\|[-| ]+\|\n((?:\|.*\n?)+)", re.MULTILINE)


def page() -> str:
    """Write the index of all figures."""
    docs = Path(__file__).parents[1]
    parts = [INTRODUCTION]
    for name in PAGES:
        for title, text in _SECTION.findall((docs / name).read_text(encoding="utf-8")):
            rows = "".join(_TABLE.findall(text + "\n"))
            if rows:
                anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
                parts.append(f"## {title}\n\nDefined in [{title}](../{name}#{anchor}).\n")
                parts.append(f"| id | definition |\n|---|---|\n{rows}")
    return "\n".join(parts)
