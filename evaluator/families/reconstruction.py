"""Family `reconstruction`: FVU in both spaces, L0, dead share, density histogram. The subject does not run.

Letters: W windows, N latents, D width of what is reconstructed. `winnow.sae.metrics` defines FVU and L0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from winnow.common.reporter import Progress
from winnow.evaluator.bootstrap import figure
from winnow.evaluator.setting import Measured, Setting
from winnow.sae.metrics import L0, Fvu
from winnow.sae.model import Sae
from winnow.schemas.evaluation import Figure
from winnow.schemas.parts import part_names
from winnow.store.read.readings import none_held_out

_EDGES = np.arange(-7.0, 0.51, 0.5)
"""Edges of the density histogram in half decades: log10 of the share of rows."""


class WindowSums:
    """Sums per window, from which the bootstrap of an FVU follows. Memory: W x D."""

    def __init__(self, windows: int, d_model: int) -> None:
        self.error, self.squares, self.rows = (np.zeros(windows) for _ in range(3))
        self.sums = np.zeros((windows, d_model), np.float32)
        self._shift: NDArray[np.float32] | None = None

    def add(self, x: torch.Tensor, x_hat: torch.Tensor, windows: NDArray[np.int64]) -> None:
        """Add rows [B, D] of weight 1 and their reconstruction; `windows` [B] are their windows."""
        x_np, error = x.float().cpu().numpy(), (x - x_hat).square().sum(1).double().cpu().numpy()
        # Squares are summed around the first chunk's mean, which is near that of all rows: around 0, the
        # spread would be a small difference of large sums.
        if self._shift is None:
            self._shift = x_np.mean(0)
        centred = x_np - self._shift
        # np.add.at, because a window occurs many times in a chunk and `+=` would count it once.
        np.add.at(self.error, windows, error)
        np.add.at(self.squares, windows, np.square(centred).sum(1, dtype=np.float64))
        np.add.at(self.rows, windows, 1.0)
        np.add.at(self.sums, windows, centred)

    def figure(self, id: str, fvu: Fvu, seed: int) -> Figure:
        """Make the figure of the exact FVU with its interval."""
        used = self.rows > 0
        made = figure(id, lambda e, s: e / s, self.error[used], self.spread[used], seed=seed)
        return made.model_copy(update={"value": fvu.value if made.value is not None else None})

    @property
    def spread(self) -> NDArray[np.float64]:
        """Sum of squared distances to the mean of all rows, per window."""
        # In every draw distances are to the mean of all rows. The drawn windows' own mean would differ by a
        # share of about one over the number of rows, and would need all rows again.
        total = self.sums[self.rows > 0].sum(0, dtype=np.float64) / self.rows.sum()
        return self.squares - 2 * self.sums @ total + self.rows * (total @ total)


def measure(setting: Setting) -> Measured:
    """Measure FVU, L0, dead shares and densities on the stored rows of the held-out windows.

    Of a transcoder, FVU is that of its target; a layer of a cross-layer set has none of its own.

    Raises:
        IntegrityError: There is no row of weight above 0, or a stored one is damaged.
        ConfigError: Rows were chosen, and none is held out.
    """
    sae, count, seed = setting.sae, len(setting.windows), setting.spec.seed
    widths = {} if setting.partial else _widths(setting)
    names = tuple(widths)
    spaces = {name: Fvu(width, setting.device) for name, width in widths.items()}
    sums = {name: WindowSums(count, width) for name, width in widths.items()}
    l0, active, rows_in = L0(), np.zeros(count), np.zeros(count)
    firings = torch.zeros(sae.latents, dtype=torch.int64, device=setting.device)
    total = count * setting.dataset.plan.rows_per_window
    with torch.no_grad(), Progress("reconstruction", total, "rows") as bar:
        for codes in setting.held_out_codes(targets=bool(names)):
            bar.advance(len(codes.rows))
            keep = codes.weights > 0
            # A void unit: all of its rows have weight 0.
            if not bool(keep.any()):
                continue
            rows, values, indices = codes.rows[keep], codes.values[keep], codes.indices[keep]
            windows = codes.windows[keep.cpu().numpy()]
            if names:
                true = None if codes.targets is None else codes.targets[keep]
                for name, pair in _by_part(setting, _pairs(sae, rows, values, indices, true)).items():
                    spaces[name].add(*pair)
                    sums[name].add(*pair, windows)
            l0.add(values)
            np.add.at(rows_in, windows, 1.0)
            np.add.at(active, windows, (values > 0).sum(1).cpu().numpy())
            firings += torch.bincount(indices[values > 0], minlength=sae.latents)
    if not rows_in.any():
        raise none_held_out(setting.dataset.reading)
    # The values come from `Fvu` and `L0`, as in training; the sums per window are for the intervals.
    figures = [sums[name].figure(name, fvu, seed) for name, fvu in spaces.items()]
    made = figure("l0", lambda a, n: a / n, active[rows_in > 0], rows_in[rows_in > 0], seed=seed)
    figures.append(made.model_copy(update={"value": l0.value}))
    figures += _dead_shares(setting, firings.cpu().numpy(), int(rows_in.sum()))
    details = histogram(firings.cpu().numpy(), rows_in.sum())
    details["rows"] = int(rows_in.sum())
    details["rows_left_out"] = int(total - rows_in.sum())
    notes = () if names else (f"no FVU: {setting.why_partial}",)
    return Measured(figures, details, notes)


def _widths(setting: Setting) -> dict[str, int]:
    """The FVUs that are measured, with the width of their rows: of a crosscoder also each part's."""
    spaces = ("fvu_normalised", "fvu_raw")
    found: dict[str, int] = dict.fromkeys(spaces, setting.sae.d_out)
    for name, width in zip(part_names(setting.card), setting.sae.parts.widths, strict=True):
        found |= {f"{space}.{name}": width for space in spaces}
    return found


def _by_part(
    setting: Setting, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The pairs of all parts together, and of a crosscoder those of each."""
    found, widths = dict(pairs), list(setting.sae.parts.widths)
    for space, pair in pairs.items() if widths else ():
        true, given = (rows.split(widths, dim=1) for rows in pair)
        for part, name in enumerate(part_names(setting.card)):
            found[f"{space}.{name}"] = true[part], given[part]
    return found


def _pairs(
    sae: Sae, rows: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, target: torch.Tensor | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What should come out and what does, in the normalised and in the raw space."""
    # One encoding serves both spaces; only the decoder's output is scaled back for the raw one.
    x, scale = sae.normalise(rows)
    given = sae.reconstruct(values, indices, x)
    true, raw = (x, rows) if target is None else (sae.normalise_target(target), target)
    return {"fvu_normalised": (true, given), "fvu_raw": (raw, sae.restore(given, scale))}


def _dead_shares(setting: Setting, firings: NDArray[np.int64], rows: int) -> list[Figure]:
    """Make the figures of latents silent on the split, and by the trainer's count if the card has it."""
    silent = Figure(
        id="dead_share",
        value=float((firings == 0).mean()),
        samples=len(firings),
        unit="latents",
        note=f"silent on all {rows:,} held-out rows: a count, no sample",
    )
    told = setting.card.metrics.get("dead_share_last_epoch")
    if told is None:
        return [silent]
    note = "over the trainer's last epoch: a count, no sample"
    trainer = Figure(id="dead_share_trainer", value=told, samples=len(firings), unit="latents", note=note)
    return [silent, trainer]


def histogram(firings: NDArray[np.int64], rows: float) -> dict[str, Any]:
    """Count latents by log10 of the share of rows on which they are active, and silent ones separately."""
    # Silent latents have no logarithm, and clipping would hide them in the lowest bin.
    shares = np.log10(firings[firings > 0] / rows)
    counts, edges = np.histogram(np.clip(shares, _EDGES[0], _EDGES[-1]), _EDGES)
    return {
        "density_log10_edges": edges.tolist(),
        "density_latents": counts.tolist(),
        "density_silent": int((firings == 0).sum()),
        "density_median_log10": float(np.median(shares)) if len(shares) else None,
    }
