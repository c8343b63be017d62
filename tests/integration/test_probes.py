"""The probe family through a real tiny subject: pooling, choice of a latent, bad input."""

from __future__ import annotations

import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from tests.support.evaluated import HOOK, random_sae, save_sae, toy_config
from winnow.cli.main import app
from winnow.evaluator.probes.family import measure, pooled
from winnow.evaluator.sequences import prefix_tokens
from winnow.evaluator.setting import Setting
from winnow.schemas.evaluation import EvaluateSpec


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    config = toy_config(folder, units=1)
    tasks = folder / "tasks"
    tasks.mkdir()
    draw = random.Random(0)
    words = ("lazy", "dog", "grain", "model", "stream", "numbers")
    texts = [" ".join(draw.choices(words, k=5)) + ("!" if n % 2 else ".") for n in range(120)]
    splits = ["train" if n < 80 else "test" for n in range(120)]
    labels = [n % 2 for n in range(120)]
    pq.write_table(pa.table({"text": texts, "label": labels, "split": splits}), tasks / "mark.parquet")
    spec = EvaluateSpec(tasks=str(tasks), probe_train=80, probe_test=40)
    return Setting.open(save_sae(config, folder / "sae", random_sae()), config.root, spec), config, texts


def test_texts_are_pooled_behind_the_prefix(made):
    setting, _, texts = made
    features, latents = pooled(setting, texts[:7], "test")
    tokenizer = setting.subject.tokenizer
    for number in (0, 6):
        ids = tokenizer(texts[number], add_special_tokens=False)["input_ids"][:32]
        rows = setting.subject.activations(torch.tensor([[*prefix_tokens(setting), *ids]]), [HOOK])[HOOK][
            0, 1:
        ]
        values, indices = setting.sae.encode(rows)
        dense = torch.zeros(len(ids), 48).scatter(1, indices, values)
        for pool, expected in (("mean", dense.mean(0)), ("max", dense.max(0).values)):
            found = np.zeros(48)
            found[latents] = features[pool][number]
            np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)


def test_the_family_has_both_pools_and_the_bag_of_words(made):
    measured = measure(made[0])
    found = {figure.id: figure.value for figure in measured.figures}
    assert set(found) == {"probe_loss_mean", "probe_loss_max", "probe_loss_bag_of_words"}
    task = measured.details["tasks"]["mark"]
    assert (task["train"], task["test"]) == (80, 40)
    assert found["probe_loss_bag_of_words"] < 0.2  # the mark is a word of its own
    assert 0 < found["probe_loss_max"] < 1.5
    assert 0 <= task["latent_mean"] < 48


def test_labels_are_needed(made, tmp_path):
    setting, config, _ = made
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "odd.parquet")
    arguments = [
        "evaluate",
        setting.uri,
        "--root",
        config.root,
        "--metrics",
        "probes",
        "--tasks",
        str(tmp_path),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2, result.output
    assert "lacks label" in result.stderr
