"""The threshold that all layers of a cross-layer set share."""

from __future__ import annotations

import pytest
import torch

from tests.support.cross import LAYERS, K, batch, go_cross, make_cross
from winnow.schemas.errors import ConfigError
from winnow.trainer.run.threshold_cross import calibrate_cross


def test_rows_have_k_latents_per_layer_on_average_over_the_whole_set():
    runs = make_cross("cpu", activation="batchtopk")
    go_cross(runs, 4)
    with torch.no_grad():
        runs[1].sae.W_enc.mul_(2.0)  # so that one layer wins more places than it has candidates at first
    rows = [(inputs, weights) for inputs, _, weights in (batch(step) for step in (0, 1))]
    threshold = calibrate_cross([run.shard for run in runs], rows)
    assert threshold > 0
    active, count = [0] * LAYERS, 0
    for inputs, weights in rows:
        kept = weights > 0
        count += int(kept.sum())
        for layer, run in enumerate(runs):
            assert run.sae.threshold == threshold
            active[layer] += int((run.sae.encode(inputs[layer][kept])[0] > 0).sum())
    assert sum(active) == K * LAYERS * count
    assert active[1] > max(active[0], active[2])


def test_rows_of_weight_0_alone_are_refused():
    runs = make_cross("cpu", activation="batchtopk")
    inputs, _, weights = batch(0)
    with pytest.raises(ConfigError, match="some of weight above 0"):
        calibrate_cross([run.shard for run in runs], [(inputs, torch.zeros_like(weights))])
