"""Family `ablation`: how few logits a latent affects, compared with residual channels.

Letters: D d_model, V vocabulary, T positions compared, n variants of one row.

One latent i that is active at one position t is ablated in the raw scale, ``x' = x - z_i d_i``, and the SAE's
error is kept. E is the difference of logits minus its median over V at each position, for t .. t+T-1; the
figure is ``(|E|_1 / |E|_2)^2 / (V T)``, the share of logits that the effect is spread over (Gao et al. 2024,
section 4.5). The baseline ablates one channel, ``x' = x - x_j e_j``.

Every latent at every token would take rows x L0 passes, so rows, and latents and channels at each row, are
sampled uniformly; the interval (bootstrap over rows) is the error due to that. All variants of a row, and the
clean row, run in one batch, from the hook upwards, for T positions, on the clean pass's keys and values.
Of a transcoder, x is the row of its target, and channels are those of the target. Latents of a layer of a
cross-layer set are taken out of all their targets at once, in a whole pass for each.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.common.reporter import Progress
from winnow.evaluator.bootstrap import figure, mean_figure
from winnow.evaluator.setting import Measured, Setting
from winnow.sae.model import Sae
from winnow.schemas.errors import Unmeasurable


def effect_sparsity(logits: Tensor, clean: Tensor) -> Tensor:
    """Compute (|E|_1 / |E|_2)^2 / (V T) of each variant.

    Args:
        logits: [n, T, V] of the variants.
        clean: [T, V].

    Returns:
        float64 [n], from 1 / (V T), if one logit moved, to 1, if all moved equally; NaN if none moved.
    """
    out = torch.empty(len(logits), dtype=torch.float64)
    # One variant at a time: the float32 difference of all would be n x T x V numbers more.
    for number, variant in enumerate(logits):
        effect = variant.float() - clean.float()
        # The softmax ignores what is added to all logits of a position, so it must not count as an effect.
        effect -= effect.median(dim=-1, keepdim=True).values
        # Sums over V x T numbers (49,152 x 16 for SmolLM2) in float64.
        ones, squares = effect.abs().sum(dtype=torch.float64), effect.square().sum(dtype=torch.float64)
        out[number] = ones.square() / squares / effect.numel()
    return out


def _mean_moved(shares: NDArray[np.float64]) -> float:
    """Compute the mean of the shares that are numbers; NaN if nothing moved at all."""
    moved = shares[~np.isnan(shares)]
    return float(moved.mean()) if len(moved) else float("nan")


def without_latents(sae: Sae, row: Tensor, slots: Tensor, target: Tensor | None = None) -> Tensor:
    """Ablate one slot of a row's codes per variant, keeping the SAE's error.

    Args:
        sae: The SAE.
        row: Activation [D] in the raw scale.
        slots: int64 [n], numbers of slots of `sae.encode(row)`.
        target: A transcoder's activation [O] at its targets, in the raw scale; None is `row` itself.

    Returns:
        [n, O] in the raw scale.
    """
    x = row.float()[None]
    values, indices = sae.encode(x)
    dropped = values.repeat(len(slots), 1)
    dropped[torch.arange(len(slots)), slots] = 0
    # By decoding twice rather than from a row of W_dec: normalisation and its inverse stay in one place, the
    # SAE.
    whole = sae.decode(values, indices, like=x)
    y = x if target is None else target.float()[None]
    return y - (whole - sae.decode(dropped, indices.expand(len(slots), -1), like=x))


def without_channels(row: Tensor, channels: Tensor) -> Tensor:
    """Set one channel of the row [D] to 0 per variant: [n, D]."""
    out = row.float().repeat(len(channels), 1)
    out[torch.arange(len(channels)), channels] = 0
    return out


def sample_rows(setting: Setting, draw: np.random.Generator) -> list[tuple[int, int]]:
    """Draw (window, position) pairs, windows in turn: stored positions of weight above 0 with T tokens left.

    Fewer than `ablation_rows` if there are no more; no pair is drawn twice.

    Raises:
        Unmeasurable: No position has T tokens left in its window, or none of those that a reading chooses.
    """
    length = setting.spec.ablation_tokens
    windows = draw.permutation(len(setting.windows))
    fit = setting.dataset.window_weights(setting.hooks, windows.tolist()) > 0
    # Every row is compared over the same T positions, so the last T - 1 of a window cannot begin one.
    fit[:, max(fit.shape[1] - length + 1, 0) :] = False
    usable = [(int(w), np.flatnonzero(row)) for w, row in zip(windows, fit, strict=True) if row.any()]
    if not usable:
        # Of a reading it may be the choice of rows that leaves none, however few the tokens.
        reading = setting.dataset.reading
        rows = "a held-out row" if reading is None else f"a held-out row with {reading.rows.words}"
        raise Unmeasurable(
            "evaluate.ablation_tokens",
            expected=f"{rows} and that many tokens left in its window of {fit.shape[1]}",
            got=f"no such row for {length}",
            fix="Lower it, or choose more rows" if reading is not None else "Lower it",
        )
    chosen: list[tuple[int, int]] = []
    # Rows of one window are alike: each window is used once before any is used again. One row twice would
    # be no second sample, and narrow the interval.
    while usable and (lacking := setting.spec.ablation_rows - len(chosen)):
        drawn = [(window, left, int(draw.choice(left))) for window, left in usable[:lacking]]
        chosen += [(window, position) for window, _, position in drawn]
        usable = [(window, left[left != position]) for window, left, position in drawn if len(left) > 1]
    return chosen


class _Passes:
    """One position of one window: what is read and written there, and logits from it on.

    Attributes:
        row: What the latents are read from, float32 [D].
        written: What they write to, float32 [O]: the same row, unless the SAE is a transcoder.
        channels: Leading channels of `written` that the baseline takes from: a transcoder's own target.
    """

    def __init__(self, setting: Setting, window: int, position: int) -> None:
        self._setting, self._position = setting, position
        self._stop = position + setting.spec.ablation_tokens
        self._ids = setting.tokens([window])[:, : self._stop]
        positions = setting.dataset.positions([window])
        self._positions = None if positions is None else positions[:, : self._stop]
        self._hooks, self._start = setting.card.output_hooks, None
        parts: list[Tensor] = []
        found: dict[str, Tensor] = {}
        if setting.card.target_hooks:
            found = setting.subject.activations(self._ids, list(setting.hooks), positions=self._positions)
            parts = [found[hook][0, position].float() for hook in self._hooks]
        # What several hooks hold cannot be changed from one of them on.
        if len(self._hooks) == 1:
            self._start = setting.tail.start(self._ids, keep_cache=True, positions=self._positions)
            parts = [self._start.rows[0, position].float()]
        self.row = found[setting.hook][0, position].float() if found else parts[0]
        self.written, self.channels = torch.cat(parts), len(parts[0])
        self._widths = [len(part) for part in parts]

    def logits(self, variants: Tensor) -> Tensor:
        """Logits [n, T, V] from this position on, with each of the variants [n, O] in place of `written`."""
        # Only from `position` on, on the clean pass's keys and values: earlier positions cannot change.
        if self._start is not None:
            return self._setting.tail.continued(self._start, 0, self._position, self._stop, variants)
        made: list[Tensor] = []
        # The changes, not the rows: a later target's own row already follows from those at an earlier one.
        for variant in variants - self.written:
            parts = zip(self._hooks, variant.split(self._widths), strict=True)
            replace = {hook: partial(self._add, part=part) for hook, part in parts}
            logits = self._setting.subject.logits(self._ids, replace, positions=self._positions)
            made.append(logits[0, self._position :])
        return torch.stack(made)

    def _add(self, rows: Tensor, part: Tensor) -> Tensor:
        rows = rows.clone()
        rows[self._position] += part.to(rows)
        return rows


def _ablate_row(
    setting: Setting, window: int, position: int, draw: np.random.Generator
) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """Ablate sampled latents, and as many channels, at one position, one at a time.

    Returns:
        The number of latents active there, and `effect_sparsity` of each latent and of each channel that was
        ablated; both are empty if no latent is active.
    """
    spec, sae, run = setting.spec, setting.sae, _Passes(setting, window, position)
    slots = np.flatnonzero((sae.encode(run.row[None])[0][0] > 0).cpu().numpy())
    if not len(slots):
        return 0, np.empty(0), np.empty(0)
    count = min(spec.ablation_latents, len(slots))
    chosen = draw.choice(slots, count, replace=False)
    channels = draw.choice(run.channels, min(spec.ablation_latents, run.channels), replace=False)
    device = run.row.device
    variants = torch.cat(
        [
            # The clean row in the same batch: float noise is then the same on both sides.
            run.written[None],
            without_latents(sae, run.row, torch.from_numpy(chosen).to(device), run.written),
            without_channels(run.written, torch.from_numpy(channels).to(device)),
        ]
    )
    logits = run.logits(variants)
    shares = effect_sparsity(logits[1:], logits[0]).numpy()
    return len(slots), shares[:count], shares[count:]


def measure(setting: Setting) -> Measured:
    """Sample rows; at each, ablate sampled latents and sampled channels, one at a time.

    Raises:
        Unmeasurable: The windows are too short.
    """
    spec, draw = setting.spec, np.random.default_rng(setting.spec.seed)
    latent_means, channel_means, every, active = [], [], list[float](), list[int]()
    rows = sample_rows(setting, draw)
    with torch.no_grad(), Progress("ablation", len(rows), "rows") as bar:
        for window, position in rows:
            count, latents, channels = _ablate_row(setting, window, position, draw)
            active.append(count)
            bar.advance(1)
            # Nothing was ablated. The row still counts among those that were sampled, and the note says so.
            if not count:
                continue
            every += latents.tolist()
            latent_means.append(_mean_moved(latents))
            channel_means.append(_mean_moved(channels))
    moved, channels = np.array(latent_means, np.float64), np.array(channel_means, np.float64)
    # The ratio is of means over the same rows, hence only over those on which both have moved something.
    latents, both = moved[~np.isnan(moved)], ~(np.isnan(moved) | np.isnan(channels))
    options: dict[str, Any] = {"seed": spec.seed, "unit": "rows"}
    if len(latents) < len(rows):
        left_out = f"{len(rows) - len(latents)} of {len(rows)} rows left out"
        options["note"] = f"{left_out}: no latent is active there, or none moves a logit"
    figures = [
        mean_figure("ablation_sparsity", latents, **options),
        mean_figure("ablation_sparsity_channels", channels[~np.isnan(channels)], **options | {"note": ""}),
        figure("ablation_sparsity_ratio", lambda a, b: a / b, moved[both], channels[both], **options),
    ]
    error = float(latents.std(ddof=1) / len(latents) ** 0.5) if len(latents) > 1 else None
    details = {
        "latents_ablated": len(every),
        "active_a_row": float(np.mean(active)),
        "standard_error": error,
        "quantiles_of_latents": np.nanquantile(every, [0.1, 0.5, 0.9]).tolist() if len(latents) else [],
    }
    told = "" if error is None else f", standard error {error:.2g}"
    note = (
        f"{len(every):,} of about {sum(active):,} active latents at {len(active)} sampled rows, "
        f"{spec.ablation_tokens} positions each{told}"
    )
    return Measured(figures, details, (note,))
