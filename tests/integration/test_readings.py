"""Readings: rows chosen by the labels of their tokens fill every batch, on any world, from any step."""

from __future__ import annotations

import hashlib
import json
import logging

import numpy as np
import pytest
import torch

from tests.integration.test_planner import make_config, planned
from tests.support.pipeline import write_corpus
from tests.support.planted import HOOK
from tests.support.roots import chat_plan, chat_rows
from winnow.schemas.errors import ConfigError, IntegrityError, StoreError
from winnow.schemas.labels import LAST_TURN, ROLES, SPECIAL
from winnow.schemas.readings import ReadingCard, RowsSpec
from winnow.store import ActivationStore
from winnow.store.format import order as order_module
from winnow.store.format.labels import label_key
from winnow.store.objects import open_store
from winnow.store.read.joined import open_roots
from winnow.store.read.readings import Reading
from winnow.store.testing import make_plan, synthetic_labels, synthetic_rows, write_dataset

HOOKS = {"resid_post.1": 8, "mlp_out.2": 4}
PLAN = make_plan(units=6, hooks=HOOKS, labels=True)
ASSISTANT = RowsSpec(roles=("assistant", "user"), special=False)
OPTIONS = {"batch_rows": 32, "seed": 3, "lanes": 16, "group_units": 2}


@pytest.fixture(autouse=True)
def any_mixing(monkeypatch):
    """Tiny groups of tiny units mix badly; the arithmetic is the same."""
    monkeypatch.setattr(order_module, "LARGEST_DESIGN_EFFECT", float("inf"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("dataset"))
    write_dataset(open_store(folder), PLAN)
    return folder


def chosen_rows(dataset, rows):
    """Whether each row is chosen, reckoned from the labels by row."""
    windows, positions = dataset.locate(np.arange(dataset.rows))
    labels = [synthetic_labels(dataset.plan, unit) for unit in range(dataset.plan.units)]
    of = {name: np.concatenate([part[name] for part in labels])[windows, positions] for name in labels[0]}
    chosen = np.ones(dataset.rows, bool)
    if rows.roles:
        chosen &= np.isin(of["role"], [ROLES.index(role) for role in rows.roles])
    if rows.special is not None:
        chosen &= (of["flags"] & SPECIAL > 0) == rows.special
    if rows.turns == "last":
        chosen &= of["flags"] & LAST_TURN > 0
    elif rows.turns:
        chosen &= np.isin(of["turn"], rows.turns)
    return chosen & (of["offset"] >= rows.min_offset)


@pytest.mark.parametrize(
    "rows",
    [
        ASSISTANT,
        RowsSpec(roles=("tool",)),
        RowsSpec(turns="last", min_offset=4),
        RowsSpec(turns=(1, 2, 3), sources=(0,)),
        RowsSpec(special=True),
    ],
    ids=lambda rows: rows.words,
)
def test_batches_are_full_of_chosen_rows_each_once_an_epoch(folder, rows):
    dataset = ActivationStore.open(folder).only(rows)
    whole = np.concatenate([synthetic_rows(PLAN, unit, "resid_post.1") for unit in range(PLAN.units)])
    chosen = chosen_rows(dataset, rows)
    with dataset.stream("resid_post.1", epochs=2, **OPTIONS) as stream:
        order, seen = stream.order, [[], []]
        for batch in stream:
            at = order.rows_at(batch.step)
            assert len(at) == len(batch.weights) == 32
            assert np.array_equal(batch.rows["resid_post.1"].numpy(), whole[at])
            seen[order.locate(batch.step).epoch].append(at)
    train = np.flatnonzero(chosen)
    train = train[train >= PLAN.rows_per_unit * PLAN.spec.validation_units]
    for epoch in seen:
        taken = np.concatenate(epoch)
        assert len(np.unique(taken)) == len(taken) == order.rows_per_epoch
        assert chosen[taken].all()
        assert len(train) - len(taken) == order.dropped_rows
    assert not np.array_equal(seen[0][0], seen[1][0])


@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_world_sees_the_same_batches_from_any_step(folder, world):
    dataset = ActivationStore.open(folder).only(ASSISTANT)
    with dataset.stream(list(HOOKS), epochs=2, **OPTIONS) as stream:
        whole = list(stream)
    start = len(whole) // 3
    ranks = [
        dataset.stream(list(HOOKS), rank=rank, world=world, epochs=2, start_step=start, **OPTIONS)
        for rank in range(world)
    ]
    for wanted, *parts in zip(whole[start:], *ranks, strict=True):
        for hook in HOOKS:
            assert torch.equal(torch.cat([part.rows[hook] for part in parts]), wanted.rows[hook])
    for rank in ranks:
        assert rank.state().reading == dataset.reading.digest
        rank.close()


def test_weights_means_and_windows_are_those_of_chosen_rows(folder):
    every = ActivationStore.open(folder)
    dataset, chosen = every.only(ASSISTANT), chosen_rows(every, ASSISTANT)
    weights = dataset.weights(["mlp_out.2"], 0, dataset.rows)
    assert np.array_equal(weights, every.weights(["mlp_out.2"], 0, every.rows) * chosen)
    grid = dataset.window_weights(["mlp_out.2"], range(PLAN.windows))
    assert np.array_equal(grid[dataset.locate(np.arange(dataset.rows))], weights)
    rows = np.concatenate([synthetic_rows(PLAN, unit, "mlp_out.2") for unit in range(PLAN.units)])
    first = PLAN.rows_per_unit * PLAN.spec.validation_units
    kept = rows[first:][weights[first:] > 0].astype(np.float64)
    assert np.allclose(dataset.mean("mlp_out.2"), kept.mean(0))
    assert np.allclose(dataset.variance("mlp_out.2"), kept.var(0))


def test_counts_are_kept_and_a_later_run_reads_no_label_to_begin(folder, monkeypatch):
    one = ActivationStore.open(folder).only(ASSISTANT)
    counts = one.reading.counts
    assert counts.chosen == chosen_rows(one, ASSISTANT).sum()
    other = ActivationStore.open(folder).only(ASSISTANT)
    monkeypatch.setattr(type(other.reading), "_count", lambda _: pytest.fail("counted again"))
    assert np.array_equal(other.reading.counts.slices, counts.slices)
    assert np.array_equal(other.reading.counts.squares, counts.squares)


def test_without_conditions_it_is_the_whole_dataset(folder):
    dataset = ActivationStore.open(folder)
    assert dataset.only(RowsSpec()) is dataset
    assert dataset.only(ASSISTANT).only(RowsSpec()).reading is None


def test_a_uri_names_every_source_that_has_it(tmp_path):
    path = write_corpus(tmp_path / "corpus.jsonl", documents=300)
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({"a": text, "b": text[::-1]}) + "\n" for text in texts))
    sources = [{"uri": str(path), "column": column} for column in ("a", "b")]
    plan, store, _ = planned(make_config(tmp_path, corpus={"sources": sources}))

    def chosen(*named):
        reading = Reading(store, plan, RowsSpec(sources=named))
        return np.concatenate([reading.mask(unit) for unit in range(plan.units)])

    assert chosen(0).any()
    assert np.array_equal(chosen(0), ~chosen(1))
    assert chosen(str(path)).all()


# ---- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (RowsSpec(roles=("narrator",)), r"rows\.roles: expected any of none, system, .*got 'narrator'"),
        (RowsSpec(sources=(7,)), r"rows\.sources: expected any of .*got 7"),
        (RowsSpec(sources=(0, -1)), r"rows\.sources: expected any of .*got -1"),
        (RowsSpec(roles=("tool",), min_offset=10_000), "expected a choice of at least one row"),
    ],
)
def test_a_reading_that_cannot_be_is_refused_in_words(folder, rows, said):
    with pytest.raises(ConfigError, match=said):
        ActivationStore.open(folder).only(rows).stream("mlp_out.2", **OPTIONS)


def test_a_batch_that_no_group_can_fill_is_refused(folder):
    dataset = ActivationStore.open(folder).only(ASSISTANT)
    with pytest.raises(ConfigError, match="more than what the reading chooses of group 0"):
        dataset.stream("mlp_out.2", batch_rows=65536, seed=0, lanes=16, group_units=2)


def test_a_dataset_without_labels_says_so(tmp_path):
    write_dataset(open_store(str(tmp_path)), make_plan(units=2))
    with pytest.raises(ConfigError, match="has no labels"):
        ActivationStore.open(str(tmp_path)).only(ASSISTANT)


# ---- faults ---------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path):
    store = open_store(str(tmp_path / "root"))
    write_dataset(store, PLAN)
    return store


def reading_of(store):
    return ActivationStore.over(store).only(ASSISTANT).reading


def test_a_process_killed_between_the_two_objects_leaves_nothing_wrong(own):
    counts = reading_of(own).counts
    digest = reading_of(own).digest
    own.delete(f"readings/{digest}.json")
    assert np.array_equal(reading_of(own).counts.slices, counts.slices)
    assert own.get(f"readings/{digest}.json")


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_damaged_counts_are_never_used(own, damage):
    reading = reading_of(own)
    key, body = f"readings/{reading.digest}.counts", reading.counts.to_bytes()
    own.put(key, body[:-1] if damage == "cut" else bytes(len(body)))
    with pytest.raises(IntegrityError, match=r"counts: expected sha256 .*Delete both"):
        _ = reading_of(own).counts


def test_a_card_of_another_reading_is_refused(own):
    reading = reading_of(own)
    key = f"readings/{reading.digest}.json"
    _ = reading.counts
    card = ReadingCard.from_json(own.get(key), origin=key)
    own.put(key, card.model_copy(update={"rows": RowsSpec(special=True)}).to_json())
    with pytest.raises(IntegrityError, match="is of another reading"):
        _ = reading_of(own).counts


def test_counts_that_do_not_fit_the_labels_end_the_stream(own):
    reading = reading_of(own)
    counts, key = reading.counts, f"readings/{reading.digest}.json"
    slices = counts.slices.copy()
    slices[:, 0] += 1
    wrong = counts._replace(slices=slices).to_bytes()
    card = ReadingCard.from_json(own.get(key), origin=key)

    own.put(f"readings/{reading.digest}.counts", wrong)
    own.put(key, card.model_copy(update={"counts_sha256": hashlib.sha256(wrong).hexdigest()}).to_json())
    dataset = ActivationStore.over(own).only(ASSISTANT)
    with (
        dataset.stream("mlp_out.2", **OPTIONS) as stream,
        pytest.raises(IntegrityError, match="as counted"),
    ):
        next(stream)


def test_a_label_chunk_that_changed_places_ends_the_stream(own):
    _ = reading_of(own).counts
    own.put(label_key("role", 1), own.get(label_key("role", 2)))
    dataset = ActivationStore.over(own).only(ASSISTANT)
    with (
        dataset.stream("mlp_out.2", **OPTIONS) as stream,
        pytest.raises(IntegrityError, match="label 'role' of unit 1"),
    ):
        next(stream)


def test_a_root_that_may_only_be_read_is_still_read(own, monkeypatch, caplog):
    def refuse(*_):
        raise StoreError("access denied")

    dataset = ActivationStore.over(own)
    monkeypatch.setattr(type(own), "put_new", refuse)
    with caplog.at_level(logging.WARNING), dataset.only(ASSISTANT).stream("mlp_out.2", **OPTIONS) as stream:
        assert len(next(stream).weights) == 32
    assert "could not be stored: access denied" in caplog.text


# ---- several subjects -----------------------------------------------------------------------------


def test_datasets_that_are_joined_are_read_alike(tmp_path):
    roots = {"base": str(tmp_path / "base"), "chat": str(tmp_path / "chat")}
    write_dataset(open_store(roots["base"]), make_plan(4, hooks={"mlp_out.2": 4}, labels=True))
    write_dataset(open_store(roots["chat"]), chat_plan(4, labels=True), chat_rows)
    dataset = open_roots("", roots).only(ASSISTANT)
    chosen = chosen_rows(dataset, ASSISTANT)
    hooks = ["base/mlp_out.2", f"chat/{HOOK}"]
    with dataset.stream(hooks, epochs=1, **OPTIONS) as stream:
        assert stream.state().reading == dataset.reading.digest
        for batch in stream:
            rows = stream.order.rows_at(batch.step)
            assert chosen[rows].all()
            for hook in hooks:
                assert np.array_equal(batch.rows[hook].numpy(), dataset_rows(dataset, hook)[rows])
    weights = dataset.weights(hooks, 0, dataset.rows)
    assert not weights[~chosen].any()
    assert weights.sum() > 0


def dataset_rows(dataset, hook):
    return dataset.read_rows(hook, 0, dataset.rows)
