"""Ablation sparsity against a plain computation with whole forward passes, and at its known ends."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.evaluated import HOOK, random_sae, save_sae, toy_config
from winnow.evaluator.families import ablation
from winnow.evaluator.setting import Setting
from winnow.schemas.errors import ConfigError
from winnow.schemas.evaluation import EvaluateSpec
from winnow.schemas.readings import RowsSpec

SPEC = {"ablation_tokens": 4, "ablation_rows": 6, "ablation_latents": 6}


@pytest.fixture(scope="module")
def setting_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    config = toy_config(folder, units=1)
    uri = save_sae(config, folder / "sae", random_sae())
    return lambda **spec: Setting.open(uri, config.root, EvaluateSpec(**{**SPEC, **spec}))


def test_the_share_has_its_known_ends():
    clean = torch.zeros(4, 100)
    one, half = torch.zeros(2, 4, 100)
    one[2, 7] = 3.0
    half += torch.where(torch.arange(100) % 2 == 0, 1.0, -1.0)
    half[:, 0] = 0  # an even number of logits has two middle ones: break the tie
    shares = ablation.effect_sparsity(torch.stack([one, half, one + 5.0]), clean)
    assert shares[0] == pytest.approx(1 / 400)
    assert shares[2] == pytest.approx(1 / 400)  # a constant changes no probability
    assert 0.3 < shares[1] <= 1


def test_taking_a_latent_away_keeps_the_error(setting_of):
    sae = setting_of().sae
    row = torch.randn(16, generator=torch.Generator().manual_seed(0)) * 5 + 2
    values, indices = sae.encode(row[None])
    found = ablation.without_latents(sae, row, torch.arange(6))
    norm = (row - row.mean()).norm()
    expected = row - values[0, :, None] * sae.W_dec[indices[0]] * norm
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert ablation.without_channels(row, torch.tensor([3]))[0, 3] == 0


def test_a_reading_without_a_row_that_reaches_far_enough_is_named(setting_of):
    last = int(setting_of().dataset.unit_labels(0)["offset"].max())
    setting = setting_of(rows=RowsSpec(min_offset=last), ablation_tokens=16)
    assert setting.dataset.window_weights([HOOK], list(setting.windows)).sum() == 1
    with pytest.raises(ConfigError, match=f"a held-out row with min_offset={last} and that many tokens left"):
        ablation.sample_rows(setting, np.random.default_rng(0))


def test_it_equals_whole_forward_passes(setting_of):
    setting = setting_of()
    found = ablation.measure(setting)
    rows = ablation.sample_rows(setting, np.random.default_rng(0))
    means = []
    for window, position in rows:
        tokens = setting.tokens([window])
        x = setting.subject.activations(tokens, [HOOK])[HOOK][0]
        values, indices = setting.sae.encode(x[position][None])
        norm = (x[position] - x[position].mean()).norm()
        clean = setting.subject.logits(tokens)[0, position : position + 4]
        shares = []
        for value, latent in zip(values[0], indices[0], strict=True):
            if value <= 0:
                continue
            changed = x.clone()
            changed[position] -= value * norm * setting.sae.W_dec[latent]
            logits = setting.subject.logits(tokens, replace={HOOK: lambda _, new=changed: new})
            effect = logits[0, position : position + 4] - clean
            effect = effect - effect.median(-1, keepdim=True).values
            shares.append(((effect.abs().sum() / effect.norm()) ** 2 / effect.numel()).item())
        means.append(np.mean(shares))
    figures = {figure.id: figure for figure in found.figures}
    assert figures["ablation_sparsity"].value == pytest.approx(np.mean(means), rel=1e-3)
    assert figures["ablation_sparsity"].low < figures["ablation_sparsity"].value
    assert 0 < figures["ablation_sparsity_channels"].value <= 1
    assert found.details["latents_ablated"] == sum(1 for _ in range(6)) * 6
    assert "standard error" in found.notes[0]


def test_positions_have_room_and_too_long_a_reach_is_refused(setting_of):
    setting = setting_of(ablation_tokens=16)
    rows = ablation.sample_rows(setting, np.random.default_rng(0))
    assert {position for _, position in rows} == {1}  # T = 17, position 0 is not stored
    assert len({window for window, _ in rows}) == 6
    with pytest.raises(ConfigError, match="left in its window of 17, got no such row for 17"):
        ablation.sample_rows(setting_of(ablation_tokens=17), np.random.default_rng(0))
