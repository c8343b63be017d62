"""Family `n2g`: explanations as n-grams that can be run: how often they are right, and what they recover.

Letters: W windows, T context length, N latents, n explained latents ("slots"), R rows of a pass, K codes.

Tries are learnt on training windows (`winnow.evaluator.n2g.learn`) and judged on held-out ones. *Recall*:
share of a latent's random positive tokens on which its trie fires. *Precision*: share of a trie's firings, in
windows that were not selected for anything, at which the latent is active. Both are means over latents, the
samples of the bootstrap. *Simulation* (Gao et al. 2024, section 4.4): the values of explained latents are
replaced by their tries', scaled by E[s a] / E[s^2] over the training rows that were searched; the others keep
theirs, unless all are to be explained (then they are 0). Its delta CE is relative to the SAE's own
reconstruction, and is compared with that of setting the explained latents to 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.common.reporter import Progress
from winnow.evaluator.activations import Activations, active, gather
from winnow.evaluator.bootstrap import figure, mean_figure
from winnow.evaluator.families.downstream import Reached, Variant, runs_for, splice_losses
from winnow.evaluator.n2g.learn import Example, learn
from winnow.evaluator.n2g.tries import WILDCARD, Firings, Pattern, Trie, fire
from winnow.evaluator.setting import Codes, Measured, Setting
from winnow.schemas.errors import Unmeasurable
from winnow.schemas.evaluation import Figure

# Bounds of `evaluation.json`, which with `n2g_latents: null` would otherwise describe every latent.
_DETAILED = 64
"""Latents whose explanations are written to the details."""
_PATTERNS = 24
"""N-grams per latent that are written."""
WINDOWS = 5
"""Top windows per latent that are written."""


@dataclass
class Explained:
    """Latents and their tries."""

    latents: NDArray[np.int64]
    """[n], ascending."""
    tries: list[Trie]
    scales: NDArray[np.float64]
    """[n]: E[s a] / E[s^2]; 0 where the trie never fired on the training rows."""
    examples: list[int]
    """[n]: number of examples that each trie was learnt from."""


def train_units(setting: Setting) -> range:
    """Return the first training units, as many as contain `n2g_train_rows`."""
    plan = setting.dataset.plan
    units = plan.split_units("train")
    return units[: max(1, -(-setting.spec.n2g_train_rows // plan.rows_per_unit))]


def unit_windows(setting: Setting, units: range) -> range:
    """Return the numbers of the windows of some units."""
    size = setting.dataset.plan.spec.windows_per_unit
    return range(units.start * size, units.stop * size)


def observed(stream: Iterable[Codes], label: str, rows: int) -> Iterable[Codes]:
    """Pass a stream of codes on with a progress bar."""
    with Progress(label, rows, "rows") as bar:
        for codes in stream:
            yield codes
            bar.advance(len(codes.rows))


def choose(
    found: Activations, spec_latents: int | None, examples: int, seed: int, field: str = "n2g_examples"
) -> NDArray[np.int64]:
    """Choose latents with `examples` top windows, all or `spec_latents` drawn at random; ascending.

    Raises:
        Unmeasurable: There is no such latent; `field` of `evaluate` is named.
    """
    often = np.flatnonzero((found.top.windows >= 0).sum(1) >= examples)
    if not len(often):
        raise Unmeasurable(
            f"evaluate.{field}",
            expected=f"a latent active in {examples} of the training windows searched",
            got="none",
            fix=f"Lower evaluate.{field} or raise evaluate.n2g_train_rows",
        )
    if spec_latents is None or spec_latents >= len(often):
        return often
    return np.sort(np.random.default_rng(seed).choice(often, spec_latents, replace=False))


class Lookup:
    """True activations of some latents at (window, position), from a stream of codes."""

    # Sorted keys and a binary search: dense, they would be windows x T x n values, of which few are not 0.
    def __init__(self, stream: Iterable[Codes], latents: NDArray[np.int64], total: int, context: int) -> None:
        self._context, self._n = context, len(latents)
        slot_of = np.full(total, -1, np.int64)
        slot_of[latents] = np.arange(len(latents))
        # An empty array to begin with, since a stream may have no rows and nothing cannot be concatenated.
        keys: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        values: list[NDArray[np.float32]] = [np.zeros(0, np.float32)]
        for codes in stream:
            entries = active(codes)
            slots = slot_of[entries.latents]
            mine = slots >= 0
            keys.append(self._key(entries.windows[mine], entries.positions[mine], slots[mine]))
            values.append(entries.values[mine])
        joined = np.concatenate(keys)
        order = np.argsort(joined, kind="stable")
        self._keys, self._values = joined[order], np.concatenate(values)[order]

    def _key(
        self, windows: NDArray[np.int64], positions: NDArray[np.int64], slots: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        return (windows * self._context + positions) * self._n + slots

    def at(
        self, windows: NDArray[np.int64], positions: NDArray[np.int64], slots: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Look up the activations at those places; 0 if inactive."""
        keys = self._key(windows, positions, slots)
        if not len(self._keys):
            return np.zeros(len(keys), np.float32)
        # A key beyond the last one is searched to the end: clipped, it is compared and found unequal.
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        return np.where(self._keys[place] == keys, self._values[place], 0).astype(np.float32)


def _keys(windows: NDArray[np.int64], positions: NDArray[np.int64], context: int) -> NDArray[np.int64]:
    """Number tokens over the dataset, each once."""
    return np.unique(windows * context + positions)


def explain(setting: Setting, found: Activations, latents: NDArray[np.int64]) -> Explained:
    """Learn the tries of some latents and the scales of their values, on training windows."""
    spec, plan = setting.spec, setting.dataset.plan
    units = train_units(setting)
    windows = unit_windows(setting, units)
    tokens = setting.tokens(windows)
    # The BOS of a window is not text: `sequence_codes` puts it before every trial again.
    begin = int(setting.window.bos)
    examples = [
        Example(slot, int(latent), tokens[window - windows.start, begin : position + 1].tolist(), value)
        for slot, latent in enumerate(latents)
        for value, window, position in found.top.of(int(latent))[: spec.n2g_examples]
        if position >= begin
    ]
    tries, used = learn(setting, examples, len(latents), tokens[:, begin:])
    # The scale that minimises the squared error of s * E[s a] / E[s^2]: n-grams are learnt from top
    # activations, so that their values are too high for ordinary ones.
    over = np.zeros(len(latents))
    squares = np.zeros(len(latents))
    for unit in units:  # one at a time, so that only one unit's activations are in memory
        inside = unit_windows(setting, range(unit, unit + 1))
        allowed = setting.dataset.window_weights(setting.hooks, list(inside)) > 0
        fired = fire(tries, tokens[inside.start - windows.start :][: len(inside)], allowed)
        context = plan.spec.context_length
        # Only where a trie fires: elsewhere s is 0 and adds nothing, so that most rows need not be encoded.
        places = _keys(fired.windows + inside.start, fired.positions, context)
        codes = setting.codes(range(unit, unit + 1), places)
        lookup = Lookup(codes, latents, setting.sae.latents, context)
        true = lookup.at(fired.windows + inside.start, fired.positions, fired.slots)
        np.add.at(over, fired.slots, fired.values * true)
        np.add.at(squares, fired.slots, np.square(fired.values))
    scales = np.divide(over, squares, out=np.zeros_like(over), where=squares > 0)
    return Explained(latents, tries, scales, used)


# ---- figures -------------------------------------------------------------------------------------


def score_tries(
    explained: Explained, fired: Firings, lookup: Lookup, held_out: Activations, tokens: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], list[dict[str, Any]]]:
    """Judge tries on held-out windows.

    Args:
        explained: The latents and their tries.
        fired: Their firings in the held-out windows.
        lookup: True activations there.
        held_out: Random positives there.
        tokens: Token ids [W, T] of those windows.

    Returns:
        (recall [n], precision [n], facts of each latent); NaN if there is nothing to count.
    """
    n = len(explained.latents)
    right = lookup.at(fired.windows, fired.positions, fired.slots) > 0
    firings = np.bincount(fired.slots, minlength=n)
    hits = np.bincount(fired.slots[right], minlength=n)
    recall, facts = np.full(n, np.nan), list[dict[str, Any]]()
    for slot, latent in enumerate(explained.latents):
        # Asked token by token: `fired` lists firings, but a positive without one is what recall is about.
        positives = held_out.positives.of(int(latent))
        caught = [explained.tries[slot].predict(tokens[w].tolist(), p) is not None for _, w, p in positives]
        if positives:
            recall[slot] = np.mean(caught)
        facts.append(
            {
                "latent": int(latent),
                "recall": _number(recall[slot]),
                "positives": len(positives),
                "precision": float(hits[slot] / firings[slot]) if firings[slot] else None,
                "firings": int(firings[slot]),
                "held_out_active": int(held_out.firings[latent]),
                "examples_used": explained.examples[slot],
                "scale": float(explained.scales[slot]),
            }
        )
    precision = np.divide(hits, firings, out=np.full(n, np.nan), where=firings > 0)
    return recall, precision, facts


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _in_words(setting: Setting, pattern: Pattern) -> list[str | None]:
    """Render an n-gram's tokens as text; None for a wildcard."""
    tokenizer: Any = setting.subject.tokenizer
    return [None if token == WILDCARD else tokenizer.decode([token]) for token in pattern]


# ---- simulation ----------------------------------------------------------------------------------


class _Simulation:
    """Replacements of a batch of windows' rows: explained latents simulated, or set to 0.

    Args:
        setting: What is measured.
        explained: Latents, tries and scales.
        fired: Firings in the held-out windows, which are numbered from 0.
        everything: Also set latents that are not explained to 0.
    """

    def __init__(self, setting: Setting, explained: Explained, fired: Firings, everything: bool) -> None:
        self._sae, self._fired, self._everything = setting.sae, fired, everything
        self._context = setting.dataset.plan.spec.context_length
        self._latents = torch.from_numpy(explained.latents).to(setting.device)
        self._ids = explained.latents
        self._values = explained.scales[fired.slots] * fired.values

    def variants(self) -> dict[str, Variant]:
        """Make the variants `sae`, `simulated` and `zeroed`."""
        return {
            "sae": lambda x, _: self._sae(x),
            "simulated": lambda x, windows: self._replace(x, windows, simulate=True),
            "zeroed": lambda x, windows: self._replace(x, windows, simulate=False),
        }

    def _replace(self, x: Tensor, windows: Sequence[int], simulate: bool) -> Tensor:
        values, indices = self._sae.encode(x)
        if self._everything:
            values = torch.zeros_like(values)
        else:
            values = values.masked_fill(torch.isin(indices, self._latents), 0)
        if simulate:
            extra_values, extra_indices = self._simulated(windows, len(x))
            # Further slots beside those at 0: a trie also fires where the latent is not among the row's
            # codes.
            values = torch.cat([values, extra_values.to(values)], 1)
            indices = torch.cat([indices, extra_indices.to(indices.device)], 1)
        return self._sae.decode(values, indices, like=x)

    def _simulated(self, windows: Sequence[int], rows: int) -> tuple[Tensor, Tensor]:
        """Make codes (values, indices) [R, m] of the firings in some windows, 0 in empty slots."""
        row_parts: list[NDArray[np.int64]] = []
        at_parts: list[NDArray[np.int64]] = []
        for line, window in enumerate(windows):
            # Firings are in the order of windows, so those of one are a slice.
            low, high = np.searchsorted(self._fired.windows, [window, window + 1])
            at_parts.append(np.arange(low, high))
            row_parts.append(line * self._context + self._fired.positions[low:high])
        row, at = np.concatenate(row_parts), np.concatenate(at_parts)
        # Rows ascend, so a firing's slot is its distance to its row's first firing.
        place = np.arange(len(row)) - np.searchsorted(row, row)
        width = int(place.max(initial=0)) + 1
        values, indices = np.zeros((rows, width), np.float32), np.zeros((rows, width), np.int64)
        values[row, place] = self._values[at]
        indices[row, place] = self._ids[self._fired.slots[at]]
        return torch.from_numpy(values), torch.from_numpy(indices)


def simulate(
    setting: Setting, explained: Explained, fired: Firings, *, silent: bool = False
) -> tuple[list[Figure], dict[str, float]]:
    """Measure delta CE of simulating, and of zeroing, the explained latents, relative to the reconstruction.

    Of a transcoder, to its prediction in its target's place.

    Args:
        setting: What is measured.
        explained: Latents, tries and scales.
        fired: Firings in the held-out windows.
        silent: Whether neither a trie nor an explained latent is active there, so that nothing is simulated.
    """
    seed, everything = setting.spec.seed, setting.spec.n2g_latents is None
    variants = _Simulation(setting, explained, fired, everything).variants()
    # `downstream`, if it was measured in the same command, has the losses of the reconstruction already.
    known = {name: setting.losses[name] for name in variants if name in setting.losses}
    losses = known | splice_losses(
        runs_for(setting),
        setting.dataset,
        setting.windows,
        {name: variant for name, variant in variants.items() if name not in known},
        clean=False,
        batch_windows=setting.spec.batch_windows,
        label="n2g simulation",
    )
    reached = Reached.of(setting.dataset, setting.hooks, setting.windows)
    # Differences of 0 in every window would not be a measurement of 0. With `everything` the others are
    # zeroed, and the losses differ in any case.
    sample = reached.windows & (not silent or everything)
    simulated, zeroed = ((losses[name] - losses["sae"])[sample] for name in ("simulated", "zeroed"))
    note = reached.note
    if reached.windows.any() and not sample.any():
        note = "no explained latent is active on the held-out windows, and no trie fires"
    options: dict[str, Any] = {"seed": seed, "note": note}
    figures = [
        mean_figure("n2g_simulated_delta_ce", simulated, **options),
        mean_figure("n2g_zeroed_delta_ce", zeroed, **options),
        figure("n2g_recovered", lambda s, z: 1 - s / z, simulated, zeroed, **options),
    ]
    return figures, {name: float(values.mean()) for name, values in losses.items()}


def measure(setting: Setting) -> Measured:
    """Learn tries on training windows, judge them on held-out ones, simulate with them.

    Raises:
        Unmeasurable: No latent is active often enough.
    """
    spec, plan, total = setting.spec, setting.dataset.plan, setting.sae.latents
    context, units = plan.spec.context_length, train_units(setting)
    stream = observed(setting.codes(units), "n2g search", len(units) * plan.rows_per_unit)
    found = gather(stream, total, top=spec.n2g_examples, positives=0, context=context)
    latents = choose(found, spec.n2g_latents, spec.n2g_examples, spec.seed)
    explained = explain(setting, found, latents)

    tokens = setting.tokens(setting.windows)
    allowed = setting.dataset.window_weights(setting.hooks, list(setting.windows)) > 0
    held_out = gather(
        setting.held_out_codes(), total, top=0, positives=spec.n2g_positives, context=context, seed=spec.seed
    )
    fired = fire(explained.tries, tokens, allowed)
    # The held-out rows again, but only those tokens on which a trie has fired.
    places = _keys(fired.windows, fired.positions, context)
    lookup = Lookup(setting.held_out_codes(places), latents, total, context)
    recall, precision, facts = score_tries(explained, fired, lookup, held_out, tokens)
    options = {"seed": spec.seed, "unit": "latents"}
    figures = [
        mean_figure("n2g_recall", recall[~np.isnan(recall)], **options),
        mean_figure("n2g_precision", precision[~np.isnan(precision)], **options),
    ]
    simulated, losses, notes = [], {}, ()
    why = setting.why_partial if setting.partial else setting.why_fixed
    if why is not None:
        notes = (f"not simulated: {why}",)
    else:
        silent = not len(fired.slots) and not held_out.firings[latents].any()
        simulated, losses = simulate(setting, explained, fired, silent=silent)

    for slot, fact in enumerate(facts[:_DETAILED]):
        fact["density"] = float(found.firings[fact["latent"]] / found.rows)
        fact["patterns"] = [
            {"tokens": _in_words(setting, pattern), "value": value, "examples": count}
            for pattern, value, count in explained.tries[slot].patterns()[:_PATTERNS]
        ]
        fact["top"] = [
            {"value": value, "window": window, "position": position}
            for value, window, position in found.top.of(fact["latent"])[:WINDOWS]
        ]
    often = int(((found.top.windows >= 0).sum(1) >= spec.n2g_examples).sum())
    note = (
        f"{len(latents):,} of the {often:,} latents (of {total:,}) active in {spec.n2g_examples} or more of "
        f"{len(units) * plan.spec.windows_per_unit:,} training windows; "
        f"{int((~np.isnan(precision)).sum())} tries fired on held-out windows, {len(fired.slots):,} times"
    )
    details = {"latents": facts[:_DETAILED], "mean_nats": losses, "train_rows": found.rows}
    return Measured([*figures, *simulated], details, (note, *notes))
