"""Figures as people read them."""

from __future__ import annotations


def human_rate(rate: float) -> str:
    """`1,204`, or `0.35` for a small figure."""
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def human_bytes(count: float) -> str:
    """`1.5 GiB`."""
    for suffix in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or suffix == "TiB":
            return f"{count:.0f} {suffix}" if suffix == "B" else f"{count:.1f} {suffix}"
        count /= 1024
    raise AssertionError("unreachable")
