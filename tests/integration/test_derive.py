"""`winnow derive`: each rule against an independent reckoning, and an ordinary dataset afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from tests.integration.test_readings import chosen_rows
from tests.support.evaluated import identity_sae, save_sae
from tests.support.pipeline import make_alone, pipeline_config
from winnow.cli.main import app
from winnow.common.config_file import load_config
from winnow.evaluator.families import reconstruction
from winnow.evaluator.setting import Setting
from winnow.explorer.site import reading
from winnow.harvester.plan.planner import make_plan as plan_corpus
from winnow.sae import Sae
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError, SaeMismatch
from winnow.schemas.readings import RowsSpec
from winnow.store import ActivationStore
from winnow.store.check.info import dataset_info
from winnow.store.check.verify import verify
from winnow.store.format import order as order_module
from winnow.store.format.layout import row_permutation
from winnow.store.format.shards import to_float32, to_stored
from winnow.store.objects import open_store
from winnow.store.read.labels import read_labels
from winnow.store.read.reader import read_tokens
from winnow.store.testing import make_attempt, make_plan, synthetic_rows, synthetic_tokens, write_dataset
from winnow.store.write.writer import commit_void, seal, tokens_digest
from winnow.subject import Subject
from winnow.subject.generate import Steer

HOOKS = {"resid_post.1": 8, "mlp_out.2": 4}
PLAN = make_plan(units=20, windows_per_unit=128, hooks=HOOKS, labels=True, validation_units=6)
ROWS = "{roles: [assistant, user], special: false}"


def winnow(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def derived(*arguments: object) -> tuple[ActivationStore, dict]:
    code, out, err = winnow("derive", *arguments, "--json")
    assert code == 0, err
    dataset = ActivationStore.open(str(arguments[1]))
    assert not verify(dataset.store, level="full")
    return dataset, json.loads(out)


def with_a_sink(plan, unit, hook):
    rows = synthetic_rows(plan, unit, hook)
    if hook == "mlp_out.2":
        rows[5] *= 1000
    return rows


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("parent"))
    write_dataset(open_store(folder), PLAN, with_a_sink)
    return folder


@pytest.fixture(scope="module")
def harvested(tmp_path_factory) -> Config:
    """A real one, float32."""
    plan = {"dtype": "float32", "validation_units": 8}
    path = pipeline_config(tmp_path_factory.mktemp("harvested"), units=8, plan=plan)
    make_alone(load_config(path))
    return load_config(path)


def planned(dataset: ActivationStore, hook: str) -> np.ndarray:
    """All rows [rows, D], in the planned order of each unit."""
    size, out = dataset.plan.rows_per_unit, []
    for unit in range(dataset.plan.units):
        rows = np.empty((size, dataset.d_model(hook)), np.float32)
        rows[row_permutation(dataset.plan, unit)] = dataset.read_rows(hook, unit * size, (unit + 1) * size)
        out.append(rows)
    return np.concatenate(out)


def test_chosen_rows_are_those_of_the_parent_in_its_order(root, tmp_path):
    dataset, facts = derived(root, tmp_path / "out", "--rows", ROWS)
    parent, plan = ActivationStore.open(root), dataset.plan
    chosen = chosen_rows(parent, RowsSpec(roles=("assistant", "user"), special=False))
    chosen &= parent.weights(tuple(HOOKS), 0, parent.rows) > 0
    edge = PLAN.split_units("train").start * PLAN.rows_per_unit
    held, train = np.flatnonzero(chosen[:edge]), edge + np.flatnonzero(chosen[edge:])
    counts = [len(split) // plan.rows_per_unit for split in (held, train)]
    assert [plan.spec.validation_units, plan.spec.train_units] == counts
    assert facts["left_out"] == len(held) + len(train) - plan.rows
    taken = np.concatenate([held[: counts[0] * plan.rows_per_unit], train[: counts[1] * plan.rows_per_unit]])
    assert 5 not in taken  # a sink
    for hook in HOOKS:
        assert np.array_equal(planned(dataset, hook), parent.read_rows(hook, 0, parent.rows)[taken])
    # Tokens and labels go along, row by row.
    windows, positions = parent.locate(taken)
    tokens, labels = (
        np.concatenate([read_tokens(each.store, each.plan, unit) for unit in range(each.plan.units)])
        for each in (parent, dataset)
    )
    assert np.array_equal(labels.reshape(-1), tokens[windows, positions])
    for name in ("role", "document", "offset"):
        before, after = (
            np.concatenate(
                [read_labels(each.store, each.plan, unit, [name])[name] for unit in range(each.plan.units)]
            )
            for each in (parent, dataset)
        )
        assert np.array_equal(after.reshape(-1), before[windows, positions])
    assert dataset.plan.derived.parent == parent.dataset_sha256


def test_it_is_streamed_and_chosen_from_again(root, tmp_path, monkeypatch):
    monkeypatch.setattr(order_module, "LARGEST_DESIGN_EFFECT", float("inf"))
    dataset, _ = derived(root, tmp_path / "out", "--rows", ROWS)
    with dataset.stream("resid_post.1", batch_rows=64, seed=0, epochs=1, group_units=2) as stream:
        seen = np.concatenate([batch.rows["resid_post.1"].numpy() for batch in stream])
    train = dataset.plan.spec.train_units * dataset.plan.rows_per_unit
    assert np.array_equal(
        np.unique(seen, axis=0), np.unique(planned(dataset, "resid_post.1")[-train:], axis=0)
    )
    again, _ = derived(tmp_path / "out", tmp_path / "again", "--rows", "{roles: [user]}")
    assert again.plan.labels.tokens_by_role[PLAN.labels.roles.index("user")] == again.rows
    assert len(again.plan.derived.rules) == 2
    restricted = dataset.only(RowsSpec(roles=("user",)))
    order = restricted.order(batch_rows=64, seed=0, group_units=2)
    assert order.steps_per_epoch > 0


def test_the_mean_of_each_document_of_a_window(harvested, tmp_path):
    dataset, _ = derived(harvested.root, tmp_path / "out", "--mean", "document")
    parent = ActivationStore.open(harvested.root)
    size, expected, tokens = parent.plan.rows_per_unit, [], []
    splits = [parent.plan.split_units(name) for name in ("validation", "train")]
    for units in splits:
        means, last = [], []
        for unit in units:
            rows = np.empty((size, 16))
            rows[row_permutation(parent.plan, unit)] = parent.read_rows(
                "resid_post.1", unit * size, (unit + 1) * size
            )
            weights = parent.window_weights(parent.hooks, range(unit * 64, unit * 64 + 64))
            documents = parent.unit_labels(unit, ["document"])["document"]
            for window in range(64):
                for document in dict.fromkeys(documents[window, 1:].tolist()):
                    inside = (documents[window] == document) & (weights[window] > 0)
                    if inside.any():
                        means.append(rows.reshape(64, 16, 16)[window, inside[1:]].mean(0))
                        last.append(parent.unit_tokens(unit)[window, np.flatnonzero(inside)[-1]])
        count = len(means) // dataset.plan.rows_per_unit * dataset.plan.rows_per_unit
        expected += means[:count]
        tokens += last[:count]
    assert len(expected) == dataset.rows
    np.testing.assert_allclose(planned(dataset, "resid_post.1"), expected, atol=1e-6)
    found = [read_tokens(dataset.store, dataset.plan, unit) for unit in range(dataset.plan.units)]
    assert np.concatenate(found).reshape(-1).tolist() == tokens


def test_another_dtype_keeps_windows_and_what_runs_them(harvested, tmp_path):
    dataset, _ = derived(harvested.root, tmp_path / "out", "--dtype", "int8")
    parent = ActivationStore.open(harvested.root)
    assert dataset.plan.tokens_sha256 == parent.plan.tokens_sha256
    rows = parent.read_rows("mlp_out.0", 0, parent.rows)
    expected = to_float32(to_stored(rows, "int8"), "int8")
    assert np.array_equal(dataset.read_rows("mlp_out.0", 0, dataset.rows), expected)
    assert np.array_equal(dataset.unit_tokens(1), parent.unit_tokens(1))
    setting = Setting.open(save_sae(harvested, tmp_path / "sae", identity_sae()), str(tmp_path / "out"))
    assert setting.left_out == {}


def test_the_difference_of_aligned_datasets(harvested, tmp_path):
    half = tmp_path / "half"
    raw = harvested.model_dump(mode="json", exclude={"corpus", "plan"}) | {
        "root": str(half),
        "plan": {"hooks": ["mlp_out.0", "resid_post.1"], "tokens_from": harvested.root, "attend": "document"},
    }
    make_alone(Config.model_validate(raw))
    dataset, _ = derived(harvested.root, tmp_path / "out", "--minus", half)
    one, two = ActivationStore.open(harvested.root), ActivationStore.open(str(half))
    for hook in one.hooks:
        expected = one.read_rows(hook, 0, one.rows) - two.read_rows(hook, 0, one.rows)
        assert np.array_equal(dataset.read_rows(hook, 0, one.rows), expected)
    assert dataset.plan.no_text is None
    assert "differences" in str(dataset.plan.no_subject)
    assert dataset.plan.derived.rule.minus == two.dataset_sha256


def test_an_sae_of_differences_is_neither_measured_nor_run_on_what_they_were_made_of(
    harvested, tmp_path, monkeypatch
):
    monkeypatch.setattr(order_module, "LARGEST_DESIGN_EFFECT", float("inf"))
    raw = harvested.model_dump(mode="json", exclude_none=True)
    plan = {"hooks": ["mlp_out.0", "resid_post.1"], "tokens_from": harvested.root, "attend": "document"}
    half = Config.model_validate({**raw, "corpus": None, "root": str(tmp_path / "half"), "plan": plan})
    make_alone(half)
    dataset, _ = derived(harvested.root, tmp_path / "out", "--minus", half.root)
    run, config = str(tmp_path / "run"), tmp_path / "config.yaml"
    train = {**raw["train"], "out": run, "epochs": 1}
    config.write_text(yaml.safe_dump({**raw, "root": dataset.uri, "train": train}))
    code, _, err = winnow("train", config, "--json")
    assert code == 0, err
    sae = Sae.load(run)
    assert sae.card.identity.derived == dataset.plan.derived.rules
    evaluate = ("evaluate", run, "--metrics", "reconstruction", "--root")
    assert winnow(*evaluate, dataset.uri)[0] == 0
    for command in (
        (*evaluate, harvested.root),
        ("index", run, "--root", harvested.root, "--out", tmp_path / "index"),
        ("attribute", run, "--root", dataset.uri, "--prompt", "harvest", "--answer", "a"),
    ):
        code, _, err = winnow(*command)
        assert (code, "subject's own rows" in err, "minus " in err) == (2, True, True), err
    assert not (tmp_path / "index").exists()
    subject = Subject.load(harvested.subject)
    with pytest.raises(SaeMismatch, match="the rows of the SAE: expected the subject's own rows"):
        reading.read_tokens(subject, sae, range(8))
    with pytest.raises(SaeMismatch, match="the rows of the SAE to steer by"):
        Steer(sae, 0, "scale", 2.0)
    Steer(sae, 0, "add", 2.0)
    plain = save_sae(harvested, tmp_path / "plain", identity_sae())
    code, _, err = winnow("evaluate", plain, "--metrics", "reconstruction", "--root", dataset.uri)
    assert (code, "got the subject's own rows" in " ".join(err.split())) == (2, True), err


def test_what_needs_text_is_refused_in_words_and_the_rest_works(harvested, tmp_path):
    dataset, _ = derived(harvested.root, tmp_path / "out", "--rows", "{special: false}")
    sae = save_sae(harvested, tmp_path / "sae", identity_sae())
    setting = Setting.open(sae, dataset.uri)
    assert "downstream" in setting.left_out
    assert "regrouped" in setting.left_out["downstream"]
    fvu = {figure.id: figure.value for figure in reconstruction.measure(setting).figures}["fvu_raw"]
    assert fvu == pytest.approx(0, abs=1e-9)
    code, _, err = winnow("index", sae, "--root", dataset.uri, "--out", tmp_path / "index")
    assert (code, "no windows of text" in err) == (2, True), err
    assert not (tmp_path / "index").exists()
    config = tmp_path / "config.yaml"
    raw = harvested.model_dump(mode="json", exclude_none=True)
    config.write_text(yaml.safe_dump({**raw, "root": dataset.uri}))
    code, _, err = winnow("harvest", config)
    assert code == 2
    assert "derived from another" in err
    plan = {**raw["plan"], "tokens_from": dataset.uri}
    on = Config.model_validate({**raw, "root": str(tmp_path / "on"), "plan": plan, "corpus": None})
    with pytest.raises(ConfigError, match="tokens_from"):
        plan_corpus(on, open_store(on.root))
    code, _, err = winnow("derive", dataset.uri, tmp_path / "mean", "--mean", "turn")
    assert (code, "windows of text" in err) == (2, True)
    info = dataset_info(dataset.store)
    assert info.derived == dataset.plan.derived
    assert "special=false" in winnow("info", dataset.uri)[1]


def test_training_says_that_delta_ce_is_not_measured(harvested, tmp_path, monkeypatch):
    monkeypatch.setattr(order_module, "LARGEST_DESIGN_EFFECT", float("inf"))
    dataset, _ = derived(harvested.root, tmp_path / "out", "--rows", "{special: false}")
    raw = harvested.model_dump(mode="json", exclude_none=True)
    config = tmp_path / "config.yaml"
    train = {**raw["train"], "out": str(tmp_path / "run"), "epochs": 1}
    config.write_text(yaml.safe_dump({**raw, "root": dataset.uri, "train": train}))
    code, out, err = winnow("train", config, "--json")
    assert code == 0, err
    assert "delta CE is not measured" in err
    assert "delta_ce" not in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--rows, --mean, --minus or --dtype"),
        (["--rows", "{roles: [nobody]}"], "nobody"),
        (["--rows", "{colour: red}"], "colour"),
        (["--rows", "{min_offset: 100000}"], "held-out"),
        (["--minus", "OTHER"], "not aligned"),
        (["--minus", "ABSENT"], "no dataset"),
    ],
)
def test_bad_input_gets_a_sentence_and_nothing_is_written(root, tmp_path, options, said):
    other = str(tmp_path / "other")
    write_dataset(open_store(other), make_plan(units=2, hooks=HOOKS, labels=True, seed=3))
    out = tmp_path / "out"
    places = {"OTHER": other, "ABSENT": str(tmp_path / "absent")}
    given = [places.get(each, each) for each in options]
    code, _, err = winnow("derive", root, out, *given)
    assert code == 2, err
    assert said in err.replace("\n", " ")
    assert not out.exists()


def test_a_dataset_without_labels_and_one_root_twice_are_refused(root, tmp_path):
    plain = str(tmp_path / "plain")
    write_dataset(open_store(plain), make_plan(units=2, hooks=HOOKS))
    code, _, err = winnow("derive", plain, tmp_path / "out", "--rows", ROWS)
    assert (code, "has no labels" in err) == (2, True)
    assert not (tmp_path / "out").exists()
    code, _, err = winnow("derive", plain, plain, "--dtype", "float32")
    assert (code, "a root of its own" in err) == (2, True)
    assert derived(plain, tmp_path / "other", "--dtype", "float32")[0].plan.labels is None
    code, _, err = winnow("derive", root, tmp_path / "other", "--rows", ROWS)
    assert code == 2
    assert "already holds another plan" in err


def test_void_units_stay_void_or_give_no_rows(tmp_path):
    plan = make_plan(units=8, windows_per_unit=128, hooks=HOOKS, labels=True)
    store = open_store(str(tmp_path / "parent"))
    write_dataset(store, plan, units=[unit for unit in range(8) if unit != 3])
    digest = tokens_digest(synthetic_tokens(plan, 3))
    commit_void(store, plan, 3, "a cause", tokens_sha256=digest, attempt=make_attempt())
    seal(store, plan)
    kept, _ = derived(store.uri, tmp_path / "kept", "--dtype", "float32")
    assert kept.manifest.void_units == (3,)
    chosen, facts = derived(store.uri, tmp_path / "chosen", "--rows", "{min_offset: 0, special: false}")
    parent = ActivationStore.open(store.uri)
    wanted = chosen_rows(parent, RowsSpec(special=False)) & (parent.weights(tuple(HOOKS), 0, parent.rows) > 0)
    assert chosen.manifest.void_units == ()
    assert chosen.rows + facts["left_out"] == wanted.sum()


def test_another_rule_at_the_same_root_is_refused(root, tmp_path):
    derived(root, tmp_path / "out", "--rows", ROWS)
    before = Path(tmp_path, "out", "plan.json").read_bytes()
    code, _, err = winnow("derive", root, tmp_path / "out", "--rows", "{roles: [user]}")
    assert code == 2
    assert "already holds another plan" in err
    assert Path(tmp_path, "out", "plan.json").read_bytes() == before
