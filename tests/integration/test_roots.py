"""`train.roots`: datasets of several subjects read as one, aligned by digest or refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.planted import HOOK, planted_rows
from tests.support.roots import HOOKS, chat_plan, chat_rows, roots_config, write_base, write_chat
from winnow.common.config_file import load_config
from winnow.sae import Sae
from winnow.schemas.errors import ConfigError, IntegrityError, MissingObject, PlanMismatch
from winnow.schemas.training import TrainSpec
from winnow.store import ActivationStore
from winnow.store.format import order as order_module
from winnow.store.format.layout import tokens_key
from winnow.store.format.shards import to_float32, to_stored
from winnow.store.objects import open_store
from winnow.store.read.joined import JoinedStore, open_roots
from winnow.store.testing import make_plan, synthetic, write_dataset, write_unit
from winnow.store.testing.synthetic import write_plan
from winnow.store.write.writer import seal
from winnow.trainer.run.loop import train

UNITS = 9


@pytest.fixture(autouse=True)
def any_mixing(monkeypatch):
    """Tiny groups of tiny units mix badly; the arithmetic is the same."""
    monkeypatch.setattr(order_module, "LARGEST_DESIGN_EFFECT", float("inf"))


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("roots")
    return {"chat": write_chat(folder), "base": write_base(folder)}


@pytest.fixture
def joined(roots) -> JoinedStore:
    return open_roots("", roots)


def batches(dataset: ActivationStore, **options):
    with dataset.stream(HOOKS, batch_rows=128, seed=3, group_units=2, **options) as stream:
        yield from stream


def test_a_batch_holds_the_same_tokens_of_both(joined):
    truth = {
        HOOKS[0]: np.concatenate([planted_rows(joined.parts["base"].plan, u, HOOK) for u in range(UNITS)]),
        HOOKS[1]: np.concatenate([chat_rows(joined.parts["chat"].plan, u, HOOK) for u in range(UNITS)]),
    }
    stored = {HOOKS[0]: "bfloat16", HOOKS[1]: "float16"}
    order = joined.order(batch_rows=128, seed=3, group_units=2)
    for batch in batches(joined, epochs=1):
        rows = order.rows_at(batch.step)
        assert list(batch.rows) == list(HOOKS)
        for hook, values in truth.items():
            wanted = to_float32(to_stored(values[rows], stored[hook]), stored[hook])
            assert np.array_equal(batch.rows[hook].numpy(), wanted)
        # A sink of either has weight 0: rows 0 to 2 of a unit in the base, row 6 in the other.
        of_unit = rows % joined.plan.rows_per_unit
        assert np.array_equal(batch.weights.numpy() == 0, np.isin(of_unit, [0, 1, 2, 6]))


def test_every_row_comes_once_an_epoch(joined):
    order = joined.order(batch_rows=128, seed=3, group_units=2)
    seen = np.concatenate([order.rows_at(step) for step in range(order.steps_per_epoch)])
    assert len(np.unique(seen)) == len(seen) == order.rows_per_epoch
    assert sum(len(batch.weights) for batch in batches(joined, epochs=1)) == len(seen)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_every_world_sees_the_same_batches_from_any_step(joined, world):
    whole = list(batches(joined, steps=12))
    parts = [list(batches(joined, rank=n, world=world, start_step=5, steps=12)) for n in range(world)]
    for number, batch in enumerate(whole[5:]):
        for hook in HOOKS:
            assert torch.equal(torch.cat([part[number].rows[hook] for part in parts]), batch.rows[hook])
        assert torch.equal(torch.cat([part[number].weights for part in parts]), batch.weights)


def test_the_order_of_the_names_changes_nothing(roots, joined):
    swapped = open_roots("", dict(reversed(roots.items())))
    assert swapped.plan.fingerprint == joined.plan.fingerprint
    assert swapped.dataset_sha256 == joined.dataset_sha256
    one, two = (next(batches(dataset)) for dataset in (joined, swapped))
    assert all(torch.equal(one.rows[hook], two.rows[hook]) for hook in HOOKS)


def test_rows_weights_and_means_are_those_of_the_parts(joined):
    base, chat = joined.parts["base"], joined.parts["chat"]
    assert np.array_equal(joined.read_rows(HOOKS[1], 500, 700), chat.read_rows(HOOK, 500, 700))
    both = base.weights([HOOK], 500, 1100) * chat.weights([HOOK], 500, 1100)
    assert np.array_equal(joined.weights(HOOKS, 500, 1100), both)
    windows = [70, 3]
    both = base.window_weights([HOOK], windows) * chat.window_weights([HOOK], windows)
    assert np.array_equal(joined.window_weights(HOOKS, windows), both)
    assert np.array_equal(joined.mean(HOOKS[1]), chat.mean(HOOK))
    assert np.array_equal(joined.tokens(70), base.tokens(70))
    assert [a.tolist() for a in joined.locate([5])] == [a.tolist() for a in base.locate([5])]
    with pytest.raises(ConfigError, match="one of base/"):
        joined.d_model(HOOK)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seed": 1}, r"plan\.seed: expected 0, as in base, got 1"),
        ({"context_length": 17}, r"plan\.context_length: expected 9, as in base, got 17"),
        ({"drop_leading": 2}, r"plan\.drop_leading: expected 1, as in base, got 2"),
        ({"units": 8}, r"units: expected 9, as in base, got 8"),
    ],
)
def test_datasets_that_are_not_aligned_are_refused_with_the_first_difference(tmp_path, roots, fields, said):
    other = write_chat(tmp_path, **fields)
    config = load_config(roots_config(tmp_path, {"base": roots["base"], "chat": other}))
    with pytest.raises(PlanMismatch, match=said):
        train(config)
    assert not (tmp_path / "run").exists()
    command = [sys.executable, "-m", "winnow.trainer", str(tmp_path / "roots.yaml")]
    if "seed" in fields:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 2, done.stderr
        assert "not aligned" in done.stderr
        assert not (tmp_path / "run").exists()


def test_other_tokens_are_refused_with_the_first_unit(tmp_path, roots, monkeypatch):
    own = synthetic._tokens

    def altered(unit, *shape):
        tokens = own(unit, *shape)
        if unit == 4:
            tokens[7, 3] += 1
        return tokens

    monkeypatch.setattr(synthetic, "_tokens", altered)
    other = write_chat(tmp_path)
    with pytest.raises(PlanMismatch, match="tokens of unit 4: expected"):
        open_roots("", {"base": roots["base"], "chat": other})


def test_rows_of_other_tokens_than_planned_are_refused(tmp_path, roots, monkeypatch):
    """A receipt that was made from a swapped token chunk."""
    root, plan, own = tmp_path / "chat", chat_plan(UNITS), synthetic.synthetic_tokens
    store = open_store(str(root))
    write_plan(store, plan)
    for unit in range(UNITS):
        with monkeypatch.context() as patch:
            if unit == 2:
                patch.setattr(synthetic, "synthetic_tokens", lambda plan, unit: own(plan, unit + 1))
            write_unit(store, plan, unit, chat_rows)
    seal(store, plan)
    with pytest.raises(IntegrityError, match="the receipt of unit 2 is for other tokens"):
        open_roots("", {"base": roots["base"], "chat": str(root)})


def test_a_swapped_token_chunk_is_refused_when_it_is_read(tmp_path):
    roots = {"base": write_base(tmp_path, 3), "chat": write_chat(tmp_path, 3)}
    one, two = (Path(roots["base"]) / tokens_key(unit) for unit in (1, 2))
    one.write_bytes(two.read_bytes())
    with pytest.raises(IntegrityError, match="tokens of unit 1"):
        open_roots("", roots).unit_tokens(1)


def test_a_subject_that_is_harvested_later_by_another_process_joins(tmp_path):
    base = write_base(tmp_path, 3)
    roots = {"base": base, "chat": str(tmp_path / "chat")}
    with pytest.raises(ConfigError, match="holds no dataset"):
        open_roots("", roots)
    program = (
        "import sys; from pathlib import Path; from tests.support.roots import write_chat; "
        "write_chat(Path(sys.argv[1]), 3)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=120)
    assert open_roots("", roots).hooks == HOOKS


def test_a_dataset_that_is_not_finished_is_refused_or_followed(tmp_path):
    roots = {"base": write_base(tmp_path, 4), "chat": str(tmp_path / "chat")}
    store, plan = open_store(roots["chat"]), chat_plan(4)
    write_dataset(store, plan, chat_rows, units=[0, 1, 2])
    with pytest.raises(ConfigError, match="not sealed"):
        open_roots("", roots)
    followed = open_roots("", roots, follow=True, timeout_seconds=0.5)
    first = next(batches(followed, start_step=0))
    write_unit(store, plan, 3, chat_rows)
    seal(store, plan)
    assert torch.equal(first.rows[HOOKS[1]], next(batches(open_roots("", roots))).rows[HOOKS[1]])


def test_damage_in_one_of_them_stops_the_stream(tmp_path):
    roots = {"base": write_base(tmp_path, 3), "chat": write_chat(tmp_path, 3)}
    shard = Path(roots["chat"]) / "activations" / HOOK / "c" / "1" / "0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(IntegrityError, match="unit 1"):
        list(batches(open_roots("", roots), epochs=1))
    shard.unlink()
    with pytest.raises(MissingObject, match="unit 1"):
        list(batches(open_roots("", roots), epochs=1))


def test_a_crosscoder_of_two_subjects_trains_and_says_where_it_came_from(tmp_path, roots):
    config = load_config(roots_config(tmp_path, roots))
    summary = train(config)
    sae = Sae.load(tmp_path / "run")
    assert summary["fvu"] < 0.5
    assert sae.parts.widths == (32, 24)
    assert sae.card.input_hooks == HOOKS
    identity = sae.card.identity
    assert list(identity.roots) == ["base", "chat"]
    assert identity.roots["chat"].subject_model == "synthetic-chat"
    assert (
        identity.roots["chat"].plan_fingerprint
        == chat_plan(UNITS, dtype="float16", compress="zstd").fingerprint
    )
    # Trained once more, it is found finished, wherever the datasets are by now.
    moved = {name: str(Path(uri).rename(Path(uri).with_name(f"moved-{name}"))) for name, uri in roots.items()}
    try:
        assert train(load_config(roots_config(tmp_path, moved))) == summary
    finally:
        for name, uri in moved.items():
            Path(uri).rename(roots[name])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"roots": None}, "there is no roots"),
        ({"hook": HOOK, "with_hooks": []}, "a hook is NAME/HOOK"),
        ({"with_hooks": []}, r"roots that no hook reads: \['chat'\]"),
        ({"with_hooks": ["other/resid_post.1"]}, r"got \['other/resid_post.1'\]"),
    ],
)
def test_hooks_must_name_the_roots(fields, said):
    spec = {"out": "x", "roots": {"base": "a", "chat": "b"}, "hook": HOOKS[0], "with_hooks": [HOOKS[1]]}
    spec |= {"normalize": "dataset", "latents": 8, "k": 2}
    TrainSpec.model_validate(spec)
    with pytest.raises(ValueError, match=said):
        TrainSpec.model_validate(spec | fields)


def test_a_transcoder_reads_one_subject_and_predicts_the_other(tmp_path, roots):
    fields = {"with_hooks": [], "target_hook": HOOKS[1], "epochs": 1}
    train(load_config(roots_config(tmp_path, roots, **fields)))
    card = Sae.load(tmp_path / "run").card
    assert (card.hook, card.target_hook, card.parts.d_out) == (HOOKS[0], HOOKS[1], 24)


def test_plans_made_from_the_same_corpus_are_aligned_whoever_made_them():
    plan = make_plan(3, hooks={HOOK: 8})
    assert plan.tokens_sha256 == chat_plan(3).tokens_sha256
