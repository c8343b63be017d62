"""Thresholds in place of TopK, set on a dataset's rows, and what they cost.

Legend: B rows, D width, N latents, K active latents per row, S slots of codes.

Circuit tracers hold a latent active above a threshold, whatever the others do. A threshold per layer under
which rows have K latents on average keeps the sparsity; which latents are active differs by row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from winnow.sae.metrics import L0, Fvu
from winnow.sae.model import Sae
from winnow.sae.sets import TranscoderSet
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError
from winnow.store import ActivationStore

CHUNK_ROWS = 4096
"""Rows read and encoded at a time, of all layers."""
CALIBRATION_ROWS = 32_768
"""Training rows that thresholds are set on, at most, rounded up to whole units."""
_CANDIDATES = 4
"""First guess of how many times K the row with the most active latents has above the threshold."""

Rows = dict[str, Tensor]


@dataclass(frozen=True)
class LayerCost:
    """What a threshold changes at a layer, on the held-out rows."""

    threshold: float
    l0_topk: float
    l0: float
    fvu_topk: float
    """FVU of the layer's MLP output in raw units, as the set predicts it with TopK."""
    fvu: float
    """The same with thresholds."""


@torch.no_grad()
def with_thresholds(
    set_: TranscoderSet, root: str, storage: StorageSpec | None = None
) -> tuple[TranscoderSet, dict[int, LayerCost]]:
    """Replace TopK by one threshold per layer, set on training rows and measured on held-out ones.

    Args:
        set_: A set with `topk`; its weights are shared, not copied.
        root: Folder or URI of a dataset with all of its hooks.
        storage: How object storage is reached.

    Returns:
        The same set with `batchtopk`, which outside training is a threshold; layer -> what that costs.

    Raises:
        ConfigError: The dataset lacks a hook, or has no rows of weight above 0.
    """
    dataset = ActivationStore.open(root, storage)
    if missing := [hook for hook in set_.of.hooks if hook not in dataset.hooks]:
        raise ConfigError(
            f"{root} lacks {', '.join(missing[:6])}",
            expected="every hook that the set reads or predicts",
            fix="Give the dataset that the set was trained on",
        )
    twins: dict[int, Sae] = {}
    for layer in set_.layers:
        # A layer at a time: the values of all of them would not fit in memory.
        hook = set_.of.read_hook(layer)
        kept = [
            rows[hook][weights > 0] for rows, weights in _rows(dataset, (hook,), "train", CALIBRATION_ROWS)
        ]
        twins[layer] = _twin(set_[layer], _threshold(set_[layer], [rows for rows in kept if len(rows)]))
    found = TranscoderSet(twins, set_.of)
    found.card = set_.card
    return found, _measure(set_, found, dataset)


def _threshold(sae: Sae, rows: list[Tensor]) -> float:
    """The number above which these raw rows have K latents on average; at least 0."""
    if not rows:
        raise ConfigError("the rows for the threshold", expected="some of weight above 0", got="none")
    quota, width = sae.k * sum(map(len, rows)), _CANDIDATES * sae.k
    while True:
        width = min(width, sae.latents)
        values = torch.cat([sae.select(sae.normalise(part)[0], width)[0] for part in rows])
        best = values.flatten().topk(min(quota + 1, values.numel())).values
        # Half-way between the last value that is active and the next, so that rounding changes neither.
        threshold = best[-2:].mean().item() if len(best) > quota else 0.0
        # A row whose last candidate is above it may have more latents than were looked at.
        if width == sae.latents or bool((values[:, -1] <= threshold).all()):
            return threshold
        width *= 4


def _twin(sae: Sae, threshold: float) -> Sae:
    """The same weights with `batchtopk` and this threshold."""
    parts = sae.parts.model_copy(update={"activation": "batchtopk"})
    twin = Sae(sae.d_model, sae.latents, sae.k, sae.normalize_mode, parts, device="meta")
    for name, tensor in [*sae.named_parameters(), *sae.named_buffers()]:
        setattr(twin, name, tensor)
    twin.threshold = torch.tensor(threshold, dtype=sae.W_enc.dtype, device=sae.W_enc.device)
    return twin.requires_grad_(False)


def _measure(before: TranscoderSet, after: TranscoderSet, dataset: ActivationStore) -> dict[int, LayerCost]:
    """FVU and L0 of every layer, with TopK and with thresholds, on the held-out rows."""
    sets, layers = (before, after), before.layers
    fvu = {layer: (Fvu(before.d_model), Fvu(before.d_model)) for layer in layers}
    l0 = {layer: (L0(), L0()) for layer in layers}
    for rows, weights in _rows(dataset, before.of.hooks, "validation"):
        inputs = {layer: rows[before.of.read_hook(layer)] for layer in layers}
        for which, set_ in enumerate(sets):
            codes = set_.encode(inputs)
            for layer, y_hat in set_.decode(codes, inputs).items():
                fvu[layer][which].add(rows[f"mlp_out.{layer}"], y_hat, weights)
                l0[layer][which].add(codes[layer][0], weights)
    return {
        layer: LayerCost(
            threshold=after[layer].threshold.item(),
            l0_topk=l0[layer][0].value,
            l0=l0[layer][1].value,
            fvu_topk=fvu[layer][0].value,
            fvu=fvu[layer][1].value,
        )
        for layer in layers
    }


def _rows(
    dataset: ActivationStore, hooks: tuple[str, ...], split: str, most: int | None = None
) -> Iterator[tuple[Rows, Tensor]]:
    """Yield raw rows [B, D] by hook and their weights [B], of the units of a split in order."""
    units, size = dataset.plan.split_units(split), dataset.plan.rows_per_unit
    stop = units.stop * size
    if most is not None:
        stop = min(stop, (units.start + -(-most // size)) * size)
    for first in range(units.start * size, stop, CHUNK_ROWS):
        last = min(first + CHUNK_ROWS, stop)
        rows = {hook: torch.from_numpy(dataset.read_rows(hook, first, last)) for hook in hooks}
        # Of all hooks together: a row that is a sink at any of them has weight 0, as in training.
        yield rows, torch.from_numpy(dataset.weights(hooks, first, last))
