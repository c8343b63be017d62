"""ActivationStore over real storage: what is read is what was written."""

from __future__ import annotations

import numpy as np
import pytest

from winnow.schemas.errors import ConfigError, MissingObject
from winnow.schemas.harvest import UnitReceipt
from winnow.store import ActivationStore
from winnow.store.format.layout import locate, row_permutation
from winnow.store.objects import open_store
from winnow.store.read.reader import (
    load_plan,
    load_token_digests,
    read_receipt,
    read_tokens,
    receipts_present,
)
from winnow.store.records.commit import commit_receipt
from winnow.store.testing import (
    make_attempt,
    make_plan,
    planned_rows,
    synthetic_rows,
    synthetic_tokens,
    write_dataset,
    write_plan,
    write_unit,
)
from winnow.store.write.writer import seal, tokens_digest

HOOKS = {"resid_post.1": 8, "mlp_out.2": 4}
SINKS = {("resid_post.1", 1): [5, 77], ("mlp_out.2", 1): [77, 300], ("mlp_out.2", 3): [0]}
"""(hook, unit) -> planned rows that are made sinks."""


def rows_with_sinks(plan, unit, hook):
    rows = planned_rows(plan, unit, hook)
    rows[SINKS.get((hook, unit), [])] *= 128
    return rows[row_permutation(plan, unit)]


@pytest.fixture
def plan():
    return make_plan(units=4, hooks=HOOKS)


def void_receipt(plan, unit):
    return UnitReceipt(
        plan_fingerprint=plan.fingerprint,
        unit=unit,
        tokens_sha256=tokens_digest(synthetic_tokens(plan, unit)),
        shards={},
        void="the worker ran out of memory three times",
        attempt=make_attempt(),
    )


def test_a_dataset_reads_back(root_uri, plan):
    manifest = write_dataset(open_store(root_uri), plan, rows_with_sinks)
    store = ActivationStore.open(root_uri)
    assert store.manifest == manifest
    assert store.plan == plan
    assert (store.hooks, store.rows, store.d_model("mlp_out.2")) == (tuple(HOOKS), plan.rows, 4)
    for hook in HOOKS:
        whole = np.concatenate([rows_with_sinks(plan, unit, hook) for unit in range(plan.units)])
        for start, stop in [(0, plan.rows), (0, 0), (3, 4), (500, 1030), (plan.rows - 1, plan.rows)]:
            found = store.read_rows(hook, start, stop)
            assert found.dtype == np.float32
            assert np.array_equal(found, whole[start:stop])
    window = plan.spec.windows_per_unit + 3
    assert np.array_equal(store.tokens(window), synthetic_tokens(plan, 1)[3])


def test_locate_is_the_layouts(tmp_path, plan):
    write_dataset(open_store(str(tmp_path)), plan)
    store = ActivationStore.open(str(tmp_path))
    rows = [0, 1, 700, plan.rows - 1]
    found, expected = store.locate(rows), locate(plan, np.array(rows))
    assert np.array_equal(found, expected)
    windows, positions = store.locate(np.arange(plan.rows_per_unit, 2 * plan.rows_per_unit))
    planned = planned_rows(plan, 1, "mlp_out.2").reshape(plan.spec.windows_per_unit, plan.rows_per_window, -1)
    local = windows - plan.spec.windows_per_unit, positions - plan.spec.drop_leading
    assert np.array_equal(
        store.read_rows("mlp_out.2", plan.rows_per_unit, 2 * plan.rows_per_unit), planned[local]
    )


def test_sinks_weigh_nothing(tmp_path, plan):
    write_dataset(open_store(str(tmp_path)), plan, rows_with_sinks)
    store = ActivationStore.open(str(tmp_path))
    for hooks, count in [(["resid_post.1"], 2), (["mlp_out.2"], 3), (list(HOOKS), 4)]:
        weights = store.weights(hooks, 0, plan.rows)
        assert weights.dtype == np.float32
        assert (weights == 0).sum() == count
        part = store.weights(hooks, 600, 1300)
        assert np.array_equal(part, weights[600:1300])
        windows = np.arange(plan.windows)
        grid = store.window_weights(hooks, windows)
        assert grid.shape == (plan.windows, plan.spec.context_length)
        assert not grid[:, : plan.spec.drop_leading].any()
        assert np.array_equal(grid[store.locate(np.arange(plan.rows))], weights)
        chosen = [70, 3, 70, 200]
        assert np.array_equal(store.window_weights(hooks, chosen), grid[chosen])
    assert store.weights("mlp_out.2", 5, 5).shape == (0,)


def test_the_mean_is_of_training_rows_of_weight_one(tmp_path, plan):
    write_dataset(open_store(str(tmp_path)), plan, rows_with_sinks)
    store = ActivationStore.open(str(tmp_path))
    for hook in HOOKS:
        rows = store.read_rows(hook, plan.rows_per_unit, plan.rows).astype(np.float64)
        kept = rows[store.weights([hook], plan.rows_per_unit, plan.rows) > 0]
        assert np.allclose(store.mean(hook), kept.mean(axis=0), atol=1e-12)
        assert np.allclose(store.variance(hook), kept.var(axis=0), atol=1e-9)


def test_a_void_unit_keeps_its_place_with_weight_zero(tmp_path, plan):
    root = open_store(str(tmp_path))
    write_plan(root, plan)
    for unit in (0, 1, 3):
        write_unit(root, plan, unit)
    commit_receipt(root, plan, void_receipt(plan, 2))
    seal(root, plan)
    store = ActivationStore.open(str(tmp_path))
    size = plan.rows_per_unit
    assert store.manifest.void_units == (2,)
    assert not store.weights(["mlp_out.2"], 2 * size, 3 * size).any()
    assert not store.read_rows("mlp_out.2", 2 * size, 3 * size).any()
    assert np.array_equal(
        store.read_rows("mlp_out.2", 3 * size, 4 * size), synthetic_rows(plan, 3, "mlp_out.2")
    )
    seen = set()
    for batch in store.stream(list(HOOKS), batch_rows=64, seed=0, epochs=1):
        void = batch.weights == 0
        assert not batch.rows["mlp_out.2"][void].any()
        seen.update(np.unique(void.numpy()).tolist())
    assert seen == {False, True}


def test_tokens_and_receipts_before_the_seal(root_uri, plan):
    root = open_store(root_uri)
    write_dataset(root, plan, units=[0, 2])
    assert load_plan(root) == plan
    assert receipts_present(root, plan) == {0: 0, 2: 0}
    assert read_receipt(root, plan, 2).unit == 2
    with pytest.raises(MissingObject):
        read_receipt(root, plan, 1)
    digests = load_token_digests(root, plan)
    assert np.array_equal(read_tokens(root, plan, 3), synthetic_tokens(plan, 3))
    assert np.array_equal(read_tokens(root, plan, 3, digests), synthetic_tokens(plan, 3))


def test_what_is_not_ready_says_what_to_run(tmp_path, plan):
    with pytest.raises(ConfigError, match=rf"{tmp_path} holds no dataset.*winnow plan"):
        ActivationStore.open(str(tmp_path))
    write_dataset(open_store(str(tmp_path)), plan, units=[0])
    with pytest.raises(ConfigError, match=r"not sealed.*winnow harvest"):
        ActivationStore.open(str(tmp_path))


def test_wrong_arguments_are_named(tmp_path, plan):
    write_dataset(open_store(str(tmp_path)), plan)
    store = ActivationStore.open(str(tmp_path))
    calls = [
        (lambda: store.read_rows("resid_post.9", 0, 1), "resid_post.1, mlp_out.2"),
        (lambda: store.read_rows("mlp_out.2", 0, plan.rows + 1), "rows"),
        (lambda: store.read_rows("mlp_out.2", -1, 1), "rows"),
        (lambda: store.weights([], 0, 1), "hooks"),
        (lambda: store.window_weights(["mlp_out.2"], [plan.windows]), "windows"),
        (lambda: store.tokens(-1), "window"),
        (lambda: store.mean("x.1"), "hook"),
    ]
    for call, named in calls:
        with pytest.raises(ConfigError, match=named):
            call()
    with pytest.raises(IndexError):
        store.locate([plan.rows])
