"""Formatting figures for people."""

from __future__ import annotations


def count_of(count: int, noun: str) -> str:
    """Format a number of things: `1 unit`, `1,204 units`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def human_rate(rate: float) -> str:
    """Format a rate: `1,204`, or `0.35` if it is small."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def human_figure(figure: float) -> str:
    """Format a figure with four digits, or a whole number with all of them: `0.2578`, `63,488`."""
    return f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.4g}"


def human_bytes(count: float) -> str:
    """Format bytes: `1.5 GiB`."""
    for suffix in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or suffix == "TiB":
            return f"{count:.0f} {suffix}" if suffix == "B" else f"{count:.1f} {suffix}"
        count /= 1024
    raise AssertionError("unreachable")


def human_hours(hours: float) -> str:
    """Format a time given in hours: `2.5 days`, `3.2 h`, `4.0 min` or `12 s`."""
    for size, unit in ((24.0, "days"), (1.0, "h"), (1 / 60, "min")):
        if hours >= size:
            return f"{hours / size:,.1f} {unit}"
    return f"{hours * 3600:.0f} s" if hours == 0 or hours * 3600 >= 1 else "under 1 s"


def brief(text: str, most: int) -> str:
    """One line of at most `most` characters: whole sentences, or of a longer first one its first words."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line.rstrip(".")
    return line[:most].rpartition(". ")[0] or line[: most - 6].rpartition(" ")[0] + " [...]"
