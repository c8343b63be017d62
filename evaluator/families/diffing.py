"""Family `diffing`: which subject, or hook, of a crosscoder each latent belongs to. The subject does not run.

Letters: B rows, S slots of the codes, N latents, H parts of the crosscoder, D width of a part.

Everything is measured in the normalised space, where every part's rows have mean squared norm 1 (with
`normalize: dataset`): a subject whose activations are larger has no larger directions for it.
docs/evaluation.md states the formulas.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.common.reporter import Progress
from winnow.evaluator.setting import Codes, Measured, Setting
from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError
from winnow.schemas.evaluation import Figure
from winnow.schemas.parts import part_names
from winnow.store.read.readings import none_held_out

# Of two parts, those of Minder et al. 2025: 0.4 to 0.6 is shared, above 0.9 is only one's.
ONLY = 0.9
"""Relative norm above which a latent belongs to one part only."""
SHARED = 0.8
"""A latent is shared if each of the H parts has at least this over H of its norm."""
LEAST_ERROR, LEAST_RECONSTRUCTION = 0.2, 0.5
"""A latent of one part is specific to it if both of its ratios of latent scaling are below these."""
_EDGES = np.linspace(0, 1, 21)
TOP = 20
"""Latents listed per part: those of largest relative norm."""


def relative_norms(sae: Sae) -> Tensor:
    """float64 [N, H]: the share of each part in the sum of a latent's decoder norms; NaN if all are 0."""
    norms = torch.stack([part.double().norm(dim=1) for part in _decoders(sae)], dim=1)
    return norms / norms.sum(dim=1, keepdim=True)


def owners(norms: NDArray[np.float64]) -> NDArray[np.int64]:
    """int64 [N]: the part that each latent belongs to alone, H if all share it, -1 otherwise.

    Args:
        norms: Relative norms [N, H]; not finite if a latent has no direction.
    """
    parts = norms.shape[1]
    found = np.where((norms >= SHARED / parts).all(axis=1), parts, -1)
    alone = norms > ONLY
    return np.where(alone.any(axis=1), alone.argmax(axis=1), found)


def _decoders(sae: Sae) -> tuple[Tensor, ...]:
    """The decoder of each part, [N, D]."""
    return sae.W_dec.detach().split(list(sae.parts.widths), dim=1)


class Scaling:
    """Sums over rows from which latent scaling follows (Minder et al. 2025, arXiv 2504.02922).

    Every latent j has a home, the part h in which its direction is longest. For each part m, beta is the
    factor by which f_j d_j^h, what the latent contributes at home, fits a target y^m best by least squares:
    the part's error without the latent, or its reconstruction.

    Args:
        sae: A crosscoder whose parts have equal widths: the home's direction is read in every part.
    """

    def __init__(self, sae: Sae) -> None:
        self._sae, self._decoders = sae, _decoders(sae)
        self.home = relative_norms(sae).nan_to_num().argmax(dim=1)
        """int64 [N]: the part in which each latent's direction is longest."""
        whole = torch.stack(self._decoders, dim=1)
        self._direction = whole[torch.arange(sae.latents, device=whole.device), self.home]
        zeros = torch.zeros(sae.latents, len(self._decoders), dtype=torch.float64, device=whole.device)
        self._error, self._reconstruction, self._squares = zeros, zeros.clone(), zeros[:, 0].clone()

    def add(self, codes: Codes) -> None:
        """Add rows of weight 1."""
        sae, widths = self._sae, list(self._sae.parts.widths)
        x = sae.normalise(codes.rows)[0]
        given = sae.reconstruct(codes.values, codes.indices) - sae.b_pre
        errors, outputs = (x - sae.b_pre - given).split(widths, 1), given.split(widths, 1)
        self._squares.index_add_(0, codes.indices.flatten(), codes.values.flatten().double().square())
        # Slot by slot: the directions of all slots together would be B x S x D numbers.
        for slot in range(codes.values.shape[1]):
            latents, f = codes.indices[:, slot], codes.values[:, slot]
            direction = self._direction[latents] * f[:, None]
            for part, (error, output) in enumerate(zip(errors, outputs, strict=True)):
                for sums, target in ((self._error, error), (self._reconstruction, output)):
                    dots = (direction * target).sum(1, dtype=torch.float64)
                    sums[:, part].index_add_(0, latents, dots)

    def betas(self) -> tuple[Tensor, Tensor]:
        """float64 [N, H] each: beta of the errors and of the reconstructions; NaN for silent latents."""
        home = self._direction.double()
        own = torch.stack([(home * part.double()).sum(1) for part in self._decoders], dim=1)
        total = (self._squares * home.square().sum(1))[:, None]
        # The latent's own contribution in the part is added back, so that the error is that without it.
        error = (self._error + self._squares[:, None] * own) / total
        return error, self._reconstruction / total

    def ratios(self) -> tuple[Tensor, Tensor]:
        """float64 [N, H] each: every part's beta over that of the home, of errors and of reconstructions.

        NaN where the home's is not above 0: the latent is not found at home, and the ratio compares nothing.
        """
        # Otherwise a latent that is found elsewhere and not at home had a ratio below 0: the best there is.
        found: list[Tensor] = []
        for beta in self.betas():
            home = beta.gather(1, self.home[:, None])
            found.append(beta / home.where(home > 0, torch.nan))
        return found[0], found[1]


def measure(setting: Setting) -> Measured:
    """Measure relative decoder norms and latent scaling on the stored rows of the held-out windows.

    Raises:
        ConfigError: The SAE is not a crosscoder.
        IntegrityError: There is no row of weight above 0, or a stored one is damaged.
        ConfigError: Rows were chosen, and none is held out.
    """
    sae = setting.sae
    if not sae.parts.widths:
        raise ConfigError(
            "metrics diffing",
            expected="a crosscoder, whose latents have a direction per subject or hook",
            got=f"an SAE of {setting.hook}",
            fix="Leave diffing out, or train with `train.with_hooks`",
        )
    scaling = Scaling(sae) if len(set(sae.parts.widths)) == 1 else None
    firings = torch.zeros(sae.latents, dtype=torch.int64, device=setting.device)
    rows = 0
    total = len(setting.windows) * setting.dataset.plan.rows_per_window
    with torch.no_grad(), Progress("diffing", total, "rows") as bar:
        for codes in setting.held_out_codes():
            bar.advance(len(codes.rows))
            kept = _kept(codes)
            rows += len(kept.rows)
            firings += torch.bincount(kept.indices[kept.values > 0], minlength=sae.latents)
            if scaling is not None:
                scaling.add(kept)
    if not rows:
        raise none_held_out(setting.dataset.reading)
    return _report(setting, firings.cpu().numpy(), rows, scaling)


def _kept(codes: Codes) -> Codes:
    keep = codes.weights > 0
    chosen = keep.cpu().numpy()
    return Codes(
        codes.rows[keep],
        codes.weights[keep],
        codes.windows[chosen],
        codes.positions[chosen],
        codes.values[keep],
        codes.indices[keep],
    )


def _report(setting: Setting, firings: NDArray[np.int64], rows: int, scaling: Scaling | None) -> Measured:
    """The figures, over the latents that are active on the held-out rows."""
    names = part_names(setting.card)
    norms = relative_norms(setting.sae).cpu().numpy()
    active = (firings > 0) & np.isfinite(norms).all(axis=1)
    ratios = None
    if scaling is not None:
        ratios = [ratio.cpu().numpy() for ratio in scaling.ratios()]
    owner = owners(norms)
    only = {name: active & (owner == part) for part, name in enumerate(names)}
    shared = active & (owner == len(names))
    count = int(active.sum())
    note = f"of {count:,} latents active on {rows:,} held-out rows: a count, no sample"

    def share(id: str, which: NDArray[np.bool_]) -> Figure:
        value = float(which.sum()) / count if count else None
        return Figure(id=id, value=value, samples=count, unit="latents", note=note)

    figures = [share("latents_shared", shared)]
    figures += [share(f"latents_only.{name}", which) for name, which in only.items()]
    for part, name in enumerate(names if ratios is not None else ()):
        assert ratios is not None
        error, reconstruction = (_worst(ratio, part)[only[name]] for ratio in ratios)
        specific = (error < LEAST_ERROR) & (reconstruction < LEAST_RECONSTRUCTION)
        figures += [
            _median(f"latent_scaling_error.{name}", error),
            _median(f"latent_scaling_reconstruction.{name}", reconstruction),
            Figure(
                id=f"latents_specific.{name}",
                value=float(specific.mean()) if len(specific) else None,
                samples=len(specific),
                unit="latents",
                note="" if len(specific) else "no latent belongs to it only",
            ),
        ]
    details: dict[str, Any] = {"parts": dict(zip(names, setting.card.input_hooks, strict=True)), "rows": rows}
    details["relative_norm_edges"] = _EDGES.tolist()
    details["relative_norm_latents"] = {
        name: np.histogram(norms[active, part], _EDGES)[0].tolist() for part, name in enumerate(names)
    }
    details["top"] = {
        name: _top(norms[:, part], part, active, firings / rows, ratios) for part, name in enumerate(names)
    }
    unequal = "no latent scaling: the parts have different widths, so no direction can be read in all of them"
    return Measured(figures, details, () if ratios is not None else (unequal,))


def _worst(ratio: NDArray[np.float64], part: int) -> NDArray[np.float64]:
    """[N]: the largest ratio of the other parts: it tells most against the latent's being `part`'s."""
    return np.delete(ratio, part, axis=1).max(axis=1)


def _median(id: str, values: NDArray[np.float64]) -> Figure:
    found = values[~np.isnan(values)]
    value = float(np.median(found)) if len(found) else None
    note = "" if len(values) else "no latent belongs to it only"
    if lost := len(values) - len(found):
        note = f"{lost} of {len(values)} latents left out: their beta at home is not above 0"
    return Figure(id=id, value=value, samples=len(found), unit="latents", note=note)


def _top(
    norms: NDArray[np.float64],
    part: int,
    active: NDArray[np.bool_],
    density: NDArray[np.float64],
    ratios: list[NDArray[np.float64]] | None,
) -> list[dict[str, float | int]]:
    """The active latents of largest relative norm in a part, with their densities and ratios."""
    order = [int(n) for n in np.argsort(-norms, kind="stable") if active[n]][:TOP]
    found: list[dict[str, float | int]] = []
    for latent in order:
        line: dict[str, float | int] = {"latent": latent, "relative_norm": float(norms[latent])}
        line["density"] = float(density[latent])
        for key, ratio in zip(("scaling_error", "scaling_reconstruction"), ratios or (), strict=False):
            worst = float(_worst(ratio[latent : latent + 1], part)[0])
            if not np.isnan(worst):
                line[key] = worst
        found.append(line)
    return found
