"""Exported latents: one self-contained HTML page, and the JSON that two other viewers read.

- `features.html`: no script, nothing fetched; values are shown as tooltips.
- `openai/atoms/N.json`: what the sae-viewer of openai/sparse_autoencoder reads for feature N.
  `mean_act` and `mean_act_squared` are over all tokens; bin b of `hist` is from 0.2 (b - 1) to 0.2 b.
- `neuronpedia/batch-0.json`: dashboards as SAEDashboard writes and as Neuronpedia's converter reads them.
  What an index does not hold (neuron alignment, correlations, logit histograms) is left empty.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from winnow.common.figures import count_of
from winnow.explorer.index.latents import TOP_BAND
from winnow.explorer.site.exhibit import Exhibit, subject_names
from winnow.schemas.errors import ConfigError
from winnow.schemas.joined import split_hook
from winnow.schemas.subject import parse_hook

_STYLE = Path(__file__).parents[1] / "static" / "style.css"
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
# Every latent of an export is held in memory until all three forms are written, and is a file of its own.
_MAX_EXPORTED = 10_000
_OPENAI_BIN = 0.2
"""Width of a bin of the sae-viewer's histogram, which is fixed in its code; its bins have whole numbers."""
Row = dict[str, Any]


def parse_latents(text: str, latents: int) -> list[int]:
    """Parse `"3,10-12"` to [3, 10, 11, 12], and `"all"` to every latent.

    Raises:
        ConfigError: Another form, latents that do not exist, or more than 10,000.
    """
    if text == "all":
        text = f"0-{latents - 1}"
    chosen: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise ConfigError(
                "--latents", expected="numbers and ranges, such as 3,10-12, or all", got=text[:80]
            )
        first, last = int(low), int(high or low)
        if not first <= last < latents:
            raise ConfigError(
                "--latents", expected=f"0 to {latents - 1}, low before high", got=part.strip()[:40]
            )
        if len(chosen) + last - first + 1 > _MAX_EXPORTED:
            raise ConfigError("--latents", expected=f"at most {_MAX_EXPORTED} at once", got=text[:80])
        chosen += range(first, last + 1)
    return chosen


def export(exhibit: Exhibit, latents: Sequence[int], out: Path) -> list[Path]:
    """Write all three forms of some latents to `out` and return the files."""
    # All rows are read before the first file: damage in the index leaves no partial export.
    rows = [exhibit.table.latent(number) | {"latent": number} for number in latents]
    files = {out / "features.html": html_page(exhibit, rows)}
    for row in rows:
        files[out / "openai" / "atoms" / f"{row['latent']}.json"] = _json(openai_feature(exhibit, row))
    files[out / "neuronpedia" / "batch-0.json"] = _json(_neuronpedia_batch(exhibit, rows))
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(files)


def _json(value: Any) -> str:
    # NaN is not JSON, though Python writes it: browsers' parsers refuse the whole file.
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


# ---- other viewers -------------------------------------------------------------------------------


def openai_feature(exhibit: Exhibit, row: Row) -> Row:
    """One feature for the sae-viewer."""
    density = row["fires"] / max(exhibit.table.meta.rows, 1)

    def sequences(wanted: bool) -> list[Row]:
        return [
            {
                "density": sum(value > 0 for value in each["values"]) / len(each["values"]),
                "doc_id": each["window"],
                "idx": each["position"] - each["first"],
                "acts": each["values"],
                "act": each["values"][each["position"] - each["first"]],
                "tokens": exhibit.words(each["tokens"]),
                "token_ints": each["tokens"],
            }
            for each in row["examples"]
            if (each["band"] == TOP_BAND) == wanted
        ]

    return {
        "density": density,
        # The index has the mean over the rows on which a latent fires; the viewer wants that over all tokens.
        "mean_act": density * row["mean"],
        "mean_act_squared": density * row["mean_square"],
        "hist": {str(number): count for number, count in openai_bins(row["histogram"], row["largest"])},
        "random": sequences(False),
        "top": sequences(True),
    }


def openai_bins(counts: Sequence[int], largest: float) -> list[tuple[int, float]]:
    """Convert counts in equal widths from 0 to `largest` to (number, count) of the sae-viewer's bins.

    A count is divided among the bins that its width overlaps, so counts need not be whole; their sum is
    preserved. Empty bins are left out.
    """
    width = largest / len(counts) / _OPENAI_BIN  # in units of the viewer's bins
    bins: dict[int, float] = {}
    for i, count in enumerate(counts):
        low, high = i * width, (i + 1) * width
        for number in range(int(low), int(high) + 1 if count else 0):
            share = (min(high, number + 1) - max(low, number)) / width
            # A boundary that rounding puts beside that of a bin would make a bin of almost nothing.
            if share > 1e-9:
                bins[number + 1] = bins.get(number + 1, 0) + count * share
    return sorted(bins.items())


def _neuronpedia_batch(exhibit: Exhibit, rows: Iterable[Row]) -> Row:
    """A batch of dashboards for Neuronpedia."""
    meta = exhibit.table.meta
    named = parse_hook(split_hook(meta.hook)[1])
    return {
        "model_id": subject_names(meta),
        # The field must be a number; a hook at a module's path has no layer of its own.
        "layer": named[1] if named else 0,
        "sae_set": exhibit.name,
        "sae_id_suffix": None,
        "features": [_dashboard(exhibit, row) for row in rows],
    }


def _dashboard(exhibit: Exhibit, row: Row) -> Row:
    meta = exhibit.table.meta
    width = row["largest"] / len(row["histogram"])
    # Neuronpedia's converter reads these fields by name, so they are present though an index has no values.
    empty = {
        f"{kind}_{name}": []
        for kind, names in (
            ("neuron_alignment", ("indices", "values", "l1")),
            ("correlated_neurons", ("indices", "pearson", "l1")),
            ("correlated_features", ("indices", "pearson", "l1")),
            ("logits_hist_data", ("bar_heights", "bar_values")),
        )
        for name in names
    }
    return empty | {
        "feature_index": row["latent"],
        "neg_str": exhibit.words(row.get("suppressed_ids", [])),
        "neg_values": row.get("suppressed_logits", []),
        "pos_str": exhibit.words(row.get("promoted_ids", [])),
        "pos_values": row.get("promoted_logits", []),
        "frac_nonzero": row["fires"] / max(meta.rows, 1),
        "freq_hist_data_bar_heights": row["histogram"],
        "freq_hist_data_bar_values": [(i + 0.5) * width for i in range(len(row["histogram"]))],
        "decoder_weights_dist": [],
        "n_prompts_total": meta.windows,
        "n_tokens_in_prompt": meta.context_length,
        "dataset": "",
        "activations": [_activation(exhibit, row, each) for each in row["examples"]],
    }


def _activation(exhibit: Exhibit, row: Row, each: Row) -> Row:
    """One example; `bin_contains` is a share of all tokens, and -1 marks the strongest, which have no bin."""
    band, edges = each["band"], row["quantiles"]
    top = band == TOP_BAND
    density = row["fires"] / max(exhibit.table.meta.rows, 1)
    return {
        "bin_min": -1 if top else edges[band],
        "bin_max": row["largest"] if top else edges[band + 1],
        "bin_contains": -1 if top else density / (len(edges) - 1),
        "qualifying_token_index": each["position"] - each["first"],
        "tokens": exhibit.words(each["tokens"]),
        "values": each["values"],
    }


# ---- HTML ----------------------------------------------------------------------------------------


def html_page(exhibit: Exhibit, rows: Sequence[Row]) -> str:
    """All latents on one self-contained page."""
    # The policy forbids scripts: text of the corpus is escaped, and what escaping missed could not run.
    meta = exhibit.table.meta
    contents = " ".join(f'<a href="#l{row["latent"]}">{row["latent"]}</a>' for row in rows)
    title = escape(f"Latents of {exhibit.name}")
    hooks = ", ".join(part.hook for part in meta.parts) or meta.hook
    reading = f", those with {meta.spec.rows.words} only" if meta.spec.rows is not None else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE.read_text(encoding='utf-8')}</style></head><body><main><h1>{title}</h1>"
        f'<p class="soft">{escape(hooks)} of {escape(subject_names(meta))}; '
        f"{count_of(meta.rows, 'row')} of {count_of(meta.windows, 'window')} read{escape(reading)}"
        f"{'; windows begin with BOS' if exhibit.window.bos else ''}. Hover a token for its value.</p>"
        f"<p>{contents}</p>{''.join(_section(exhibit, row) for row in rows)}</main></body></html>\n"
    )


def _section(exhibit: Exhibit, row: Row) -> str:
    number = row["latent"]
    said = "".join(f"<p>{escape(each.text)}</p>" for each in exhibit.table.explanations.get(number, []))
    density = row["fires"] / max(exhibit.table.meta.rows, 1)
    lowered = _tokens(exhibit, row.get("suppressed_ids", []), row.get("suppressed_logits", []))
    top = [each for each in row["examples"] if each["band"] == TOP_BAND]
    drawn = [each for each in row["examples"] if each["band"] != TOP_BAND]
    return (
        f'<section class="card" id="l{number}"><h2>Latent {number}</h2>{said}'
        f'<p class="soft">fires on {density:.3%} of tokens, up to {row["largest"]:.3g}</p>'
        f"{_parts(exhibit, number)}"
        f"<p>Fires on {_tokens(exhibit, row['token_ids'], row['token_shares'])}</p>"
        f"<p>Promotes {_tokens(exhibit, row.get('promoted_ids', []), row.get('promoted_logits', []))}</p>"
        f"<p>Suppresses {lowered}</p>"
        f"<h2>Strongest</h2>{_strips(exhibit, top, row['largest'])}"
        f"<details><summary>Drawn at random, from weak to strong</summary>"
        f"{_strips(exhibit, drawn, row['largest'])}</details></section>"
    )


def _parts(exhibit: Exhibit, number: int) -> str:
    """Of a crosscoder: whose the latent is, and the relative norms of its parts."""
    parts = exhibit.table.meta.parts
    if not parts:
        return ""
    norms = zip(parts, exhibit.norms[number].tolist(), strict=True)
    told = ", ".join(f"{part.name} {norm:.2f}" for part, norm in norms)
    return f'<p class="soft">{exhibit.brief(number)["owner"]}; relative decoder norm: {told}</p>'


def _tokens(exhibit: Exhibit, ids: Sequence[int], scores: Sequence[float]) -> str:
    return " ".join(
        f'<code class="token" title="{score:.3g}">{seen(text)}</code>'
        for text, score in zip(exhibit.words(list(ids)), scores, strict=True)
    )


def _strips(exhibit: Exhibit, examples: Sequence[Row], largest: float) -> str:
    lines: list[str] = []
    for each in examples:
        pairs = zip(exhibit.words(each["tokens"]), each["values"], strict=True)
        spans = "".join(
            f'<span title="{value:.3g}" style="--a:{value / largest:.2f}">{seen(text)}</span>'
            if value > 0
            else f"<span>{seen(text)}</span>"
            for text, value in pairs
        )
        peak = each["values"][each["position"] - each["first"]]
        lines.append(
            f'<div class="example"><span class="num">{peak:.3g}</span><p class="strip">{spans}</p></div>'
        )
    return "".join(lines)


def seen(text: str) -> str:
    """Token text as HTML, with line breaks and tabs made visible."""
    return escape(visible(text))


def visible(text: str) -> str:
    """Token text with line breaks and tabs made visible."""
    return text.replace("\n", "↵").replace("\t", "⇥")
