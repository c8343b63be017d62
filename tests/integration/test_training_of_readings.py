"""Training on chosen rows: what is learnt, resumed and published."""

from __future__ import annotations

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from tests.support.planted import ACTIVE, D_MODEL, DIRECTIONS, HOOK, directions, planted_rows
from winnow.cli.main import app
from winnow.common.config_file import load_config
from winnow.evaluator.report import evaluate
from winnow.explorer.index.build import Recipe
from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError
from winnow.schemas.evaluation import EvaluateSpec
from winnow.schemas.features import IndexSpec
from winnow.schemas.labels import ROLES
from winnow.schemas.readings import RowsSpec
from winnow.store import ActivationStore
from winnow.store.check.verify import verify
from winnow.store.format.layout import row_permutation
from winnow.store.objects import open_store
from winnow.store.testing import make_plan, synthetic_labels, write_dataset
from winnow.trainer.run import member
from winnow.trainer.run.loop import train

ASSISTANT = {"roles": ["assistant"], "special": False}
EPOCHS = 150
PLAN = make_plan(9, hooks={HOOK: D_MODEL}, labels=True)


def rows_by_role(plan, unit, hook):
    """Rows of assistants are sums of the first half of the directions; all others of any, and longer."""
    rows = planted_rows(plan, unit, hook)
    role = synthetic_labels(plan, unit)["role"][:, plan.spec.drop_leading :].ravel()
    theirs = np.flatnonzero(role[row_permutation(plan, unit)] == ROLES.index("assistant"))
    draw = np.random.default_rng([unit, 99])
    chosen = draw.random((len(theirs), DIRECTIONS // 2)).argsort(1)[:, :ACTIVE]
    weights = draw.uniform(1, 2, chosen.shape).astype(np.float32)
    rows[theirs] = np.einsum("rk,rkd->rd", weights, directions()[chosen]) / 4
    return rows


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled") / "data"
    write_dataset(open_store(str(folder)), PLAN, rows_by_role)
    return folder


@pytest.fixture
def config_of(root, tmp_path):
    def make(out="run", **fields):
        spec = {
            "out": str(tmp_path / out), "hook": HOOK, "latents": 24, "k": ACTIVE, "batch_rows": 128,
            "lanes": 8, "epochs": EPOCHS, "lr": 0.01, "dead_after_tokens": 1500, "sample_rows": 400,
            "normalize": "dataset", "device": "cpu", "threads": 1, "rows": ASSISTANT,
        }  # fmt: skip
        path = tmp_path / f"{out}.yaml"
        path.write_text(yaml.safe_dump({"root": str(root), "train": spec | fields}))
        return load_config(path)

    return make


@pytest.fixture
def trained(config_of):
    config = config_of()
    return config, train(config)


def test_only_chosen_rows_are_learnt_and_every_figure_names_them(trained, config_of):
    config, summary = trained
    sae = Sae.load(config.train.out)
    assert sae.card.rows == RowsSpec(**ASSISTANT)
    # the other half of the directions never came
    found = (directions() @ sae.W_dec.detach().numpy().T).max(1)
    assert found[: DIRECTIONS // 2].mean() > found[DIRECTIONS // 2 :].mean() + 0.1
    assert summary["fvu_raw"] < 0.2
    # tokens are those of full batches
    per_epoch = ActivationStore.open(config.root).only(sae.card.rows).order(
        batch_rows=128, seed=0, lanes=8, group_units=8
    ).rows_per_epoch  # fmt: skip
    assert summary["tokens"] == EPOCHS * per_epoch

    reconstruction = config.model_copy(update={"evaluate": EvaluateSpec(metrics=("reconstruction",))})
    own = evaluate(config.train.out, reconstruction)
    assert own.figure("fvu_raw").value == pytest.approx(summary["fvu_raw"], rel=0.2)
    every = reconstruction.model_copy(
        update={"evaluate": EvaluateSpec(metrics=("reconstruction",), rows=RowsSpec())}
    )
    assert evaluate(config.train.out, every).figure("fvu_raw").value > 3 * summary["fvu_raw"]
    asked = ["evaluate", config.train.out, "--root", config.root, "--metrics", "reconstruction"]
    shown = CliRunner().invoke(app, [*asked, "--rows", "{roles: [assistant], special: false}"])
    assert shown.exit_code == 0
    assert "of rows with roles=assistant special=false only" in shown.output.replace("\n", " ")
    refused = CliRunner().invoke(app, [*asked, "--rows", "{roles: [narrator]}"])
    assert refused.exit_code == 2
    refused = CliRunner().invoke(app, [*asked, "--rows", str(NONE_HELD_OUT)])
    assert refused.exit_code == 2
    assert "at least one held-out row" in refused.output
    # readings are part of a sound dataset
    assert not verify(open_store(config.root), level="list")


NONE_HELD_OUT = {"roles": ["system"], "min_offset": 498}  # some in units 5 to 9, none in unit 1


def test_rows_of_which_none_is_held_out_are_refused_before_the_first_step(config_of):
    config = config_of(rows=NONE_HELD_OUT)
    with pytest.raises(ConfigError, match=r"roles=system min_offset=498: expected .* one held-out row"):
        train(config)
    assert list(open_store(config.train.out).list()) == []


def test_an_index_is_of_the_same_rows_unless_others_are_asked_for(trained, tmp_path):
    config, _ = trained

    def opened(**fields):
        spec = IndexSpec(logits=0, neighbours=0, **fields)
        return Recipe(config.train.out, config.root, str(tmp_path / "index"), None, spec).open()

    own, every = opened(), opened(rows=RowsSpec())
    assert own.spec.rows == own.dataset.reading.rows == RowsSpec(**ASSISTANT)
    assert every.spec.rows is every.dataset.reading is None


def test_killed_and_resumed_the_weights_are_the_same(trained, config_of, monkeypatch):
    config, _ = trained
    whole = open_store(config.train.out).get("sae.safetensors")
    other = config_of("other", checkpoint_seconds=0)
    original = member.train_step

    class Killed(Exception):
        pass

    def step(run, *batch):
        if run.counts.step == 37:
            raise Killed
        return original(run, *batch)

    with monkeypatch.context() as patch:
        patch.setattr(member, "train_step", step)
        with pytest.raises(Killed):
            train(other)
    # with other rows it would be another run
    with pytest.raises(ConfigError, match="rows"):
        train(config_of("other", checkpoint_seconds=0, rows={"roles": ["user"]}))
    train(other)
    assert open_store(other.train.out).get("sae.safetensors") == whole
