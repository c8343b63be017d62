"""The trainer's own figures on the held-out windows, and which weights they choose.

Legend: B rows at a time, D d_model.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from schemas.errors import IntegrityError
from store import ActivationStore
from trainer.losses import L0, Fvu
from trainer.sae import Sae
from trainer.step import Run

CHUNK_ROWS = 8192
"""Rows read and reconstructed at a time."""


def heldout_rows(dataset: ActivationStore, hook: str) -> Iterator[tuple[Tensor, Tensor]]:
    """All rows [B, D] of the validation units with their weights [B], in stored order."""
    units = dataset.plan.split_units("validation")
    size = dataset.plan.rows_per_unit
    for first in range(units.start * size, units.stop * size, CHUNK_ROWS):
        stop = min(first + CHUNK_ROWS, units.stop * size)
        weights = dataset.weights([hook], first, stop)
        yield torch.from_numpy(dataset.read_rows(hook, first, stop)), torch.from_numpy(weights)


@torch.no_grad()
def heldout_figures(sae: Sae, dataset: ActivationStore, hook: str) -> dict[str, float]:
    """`fvu_normalised`, `fvu_raw` and `l0` on the held-out rows of weight above 0.

    Raises:
        IntegrityError: There is no such row, or a stored one is damaged.
    """
    device = sae.W_enc.device
    normalised, raw, l0 = Fvu(sae.d_model, device), Fvu(sae.d_model, device), L0()
    for rows, weights in heldout_rows(dataset, hook):
        rows, weights = rows.to(device), weights.to(device)
        x, scale = sae.normalise(rows)
        values, indices = sae.select(x)
        x_hat = sae.reconstruct(values, indices)
        normalised.add(x, x_hat, weights)
        raw.add(rows, sae.restore(x_hat, scale), weights)
        l0.add(values, weights)
    if not normalised.rows:
        raise IntegrityError("the held-out windows", expected="rows of weight above 0", got="none")
    return {"fvu_normalised": normalised.value, "fvu_raw": raw.value, "l0": l0.value}


def candidates(run: Run) -> dict[str, Sae]:
    """The finished run's SAEs: `raw` (the weights as they are) and, where it is kept, `ema`."""
    found = {"raw": run.sae}
    if run.ema is not None:
        sae = run.sae.twin()
        sae.fill(run.sae.tensors() | run.ema.weights())
        found["ema"] = sae
    return found
