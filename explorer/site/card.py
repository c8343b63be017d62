"""One latent as a fragment of HTML: for notebooks, and for pages of other people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Self

from winnow.explorer.index.latents import TOP_BAND
from winnow.explorer.site.exhibit import Exhibit
from winnow.explorer.site.export import seen, visible

_AROUND = 12
"""Tokens shown on each side of the strongest one."""
# Every style is an attribute: a notebook and a page of somebody else have a style sheet of their own, and
# some of them drop `<style>`. Half transparent, so that text keeps its contrast on light and on dark.
_HEAT = "background:rgba(240,150,30,{:.2f})"
# As `.token` in style.css: a vocabulary has tokens of sixty dashes.
_TOKEN = (
    "background:rgba(128,128,128,.18);border-radius:3px;padding:0 .3em;"
    "display:inline-block;max-width:12rem;white-space:pre-wrap;overflow-wrap:break-word"
)
_NUMBER = "opacity:.75;display:inline-block;min-width:3.5em"
_PAGE = (
    "margin:.5em;background:Canvas;color:CanvasText;font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere"
)
_BOX = "border:1px solid rgba(128,128,128,.5);border-radius:8px;padding:.6em 1em;max-width:56em"


@dataclass(frozen=True)
class Card:
    """What a latent does, from its index.

    Attributes:
        latent: Its number.
        html: The fragment: no script, no style sheet, nothing fetched; text of the corpus is escaped.
        text: The same without markup.
    """

    latent: int
    html: str
    text: str

    @classmethod
    def of(cls, exhibit: Exhibit, latent: int, examples: int) -> Self:
        """The card of a latent that the SAE has, with at most `examples` texts, the strongest first."""
        row = exhibit.table.latent(latent)
        top = [each for each in row["examples"] if each["band"] == TOP_BAND][:examples]
        said = [each.text for each in exhibit.table.explanations.get(latent, [])]
        density = row["fires"] / max(exhibit.table.meta.rows, 1)
        rate = f"fires on {density:.3%} of tokens, up to {row['largest']:.3g}"
        words = {
            "fires on": exhibit.words(row["token_ids"]),
            "promotes": exhibit.words(row.get("promoted_ids", [])),
            "suppresses": exhibit.words(row.get("suppressed_ids", [])),
        }
        title = f"Latent {latent} of {exhibit.name}"
        html = (
            f'<div style="{_BOX}"><strong>{escape(title)}</strong> <span style="opacity:.75">{rate}</span>'
            + "".join(f"<div>{escape(each)}</div>" for each in said)
            + "".join(_words(name, each) for name, each in words.items() if each)
            + "".join(_example(exhibit, each, row["largest"]) for each in top)
            + "</div>"
        )
        lines = [f"{title}: {rate}", *said]
        lines += [f"{name}: {' '.join(map(visible, each))}" for name, each in words.items() if each]
        lines += [_plain(exhibit, each) for each in top]
        return cls(latent, html, "\n".join(lines))

    def page(self, address: str) -> str:
        """A page of its own, for an iframe; `address` is that of the latent's page."""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta name="color-scheme" content="light dark"><title>Latent {self.latent}</title></head>'
            f'<body style="{_PAGE}"><main>{self.html}</main>'
            f'<p><a style="color:inherit" href="{escape(address)}" target="_blank" rel="noopener">'
            f"All about latent {self.latent}</a></p></body></html>"
        )

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html


def _words(name: str, words: Sequence[str]) -> str:
    tokens = " ".join(f'<code style="{_TOKEN}">{seen(word)}</code>' for word in words)
    return f'<div style="margin-top:.3em">{name} {tokens}</div>'


def _cut(exhibit: Exhibit, each: dict[str, Any]) -> tuple[list[tuple[str, float]], int]:
    """The tokens around the strongest one, with their activations, and its place among them."""
    peak = each["position"] - each["first"]
    start = max(0, peak - _AROUND)
    pairs = zip(exhibit.words(each["tokens"]), each["values"], strict=True)
    return list(pairs)[start : peak + _AROUND + 1], peak - start


def _example(exhibit: Exhibit, each: dict[str, Any], largest: float) -> str:
    pairs, peak = _cut(exhibit, each)
    spans = "".join(
        f'<span title="{value:.3g}" style="{_HEAT.format(0.1 + 0.5 * value / largest)}">{seen(text)}</span>'
        if value > 0
        else seen(text)
        for text, value in pairs
    )
    return (
        '<div style="margin-top:.4em;white-space:pre-wrap;line-height:1.5">'
        f'<span style="{_NUMBER}">{pairs[peak][1]:.3g}</span>{spans}</div>'
    )


def _plain(exhibit: Exhibit, each: dict[str, Any]) -> str:
    pairs, peak = _cut(exhibit, each)
    texts = [visible(text) for text, _ in pairs]
    texts[peak] = f"[{texts[peak]}]"
    return f"  {pairs[peak][1]:.3g}  {''.join(texts)}"
