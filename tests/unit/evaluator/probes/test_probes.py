"""Probes: the fits, who chooses what on which texts, the tasks and how they are read."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.optimize import minimize
from typer.testing import CliRunner

from winnow.evaluator.probes import tasks as probe_tasks
from winnow.evaluator.probes import texts as probe_texts
from winnow.evaluator.probes.build import main
from winnow.evaluator.probes.family import bag_of_words, best_latent, fit_each, log_loss
from winnow.schemas.errors import ConfigError, IntegrityError


def test_every_column_gets_its_own_optimum():
    draw = np.random.default_rng(0)
    x, labels = draw.normal(size=(60, 5)), (draw.random(60) > 0.4).astype(float)
    x[:, 0] = labels * 2 - 1  # separable: only the ridge bounds it
    x[:, 1] = 0
    weight, bias, reached = fit_each(x, labels, 0.01)
    for column in range(5):

        def objective(theta, z=x[:, column]):
            return log_loss(theta[0] * z + theta[1], labels).mean() + 0.005 * theta[0] ** 2

        best = minimize(objective, np.zeros(2), method="BFGS", options={"gtol": 1e-9})
        assert reached[column] == pytest.approx(best.fun, abs=1e-7)
        np.testing.assert_allclose((weight[column], bias[column]), best.x, atol=1e-3)


def test_the_latent_is_chosen_on_the_training_texts_never_on_test():
    draw = np.random.default_rng(1)
    labels, test_labels = (draw.permutation(np.repeat([0.0, 1.0], 40)) for _ in range(2))
    train, test = draw.random((80, 6)), draw.random((80, 6))
    train[:, 2] = labels  # perfect here, noise on test
    test[:, 4] = test_labels  # perfect on test, noise here
    chosen, loss, accuracy = best_latent(train, labels, test, test_labels, 0.01)
    assert chosen == 2
    assert loss > 0.6
    assert accuracy < 0.75
    test[:, 2] = test_labels
    assert best_latent(train, labels, test, test_labels, 0.01)[1] < 0.2


def test_without_any_active_latent_the_base_rate_is_what_it_costs():
    labels = np.array([0.0, 1.0, 1.0, 0.0])
    empty = np.zeros((4, 0))
    assert best_latent(empty, labels, empty, labels, 0.01)[:2] == (-1, pytest.approx(np.log(2)))


def test_a_bag_of_words_finds_words_and_nothing_else():
    texts = [f"{'good' if n % 2 else 'bad'} thing {n}" for n in range(60)]
    labels = np.array([n % 2 for n in range(60)], float)
    assert bag_of_words(texts[:40], labels[:40], texts[40:], labels[40:], 0.01)[0] < 0.3
    orders = ["one two" if n % 2 else "two one" for n in range(60)]
    assert bag_of_words(orders[:40], labels[:40], orders[40:], labels[40:], 0.01)[0] == pytest.approx(
        np.log(2)
    )


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    result = CliRunner().invoke(_app(), [str(folder), "--json"])
    assert result.exit_code == 0, result.output
    return folder


def _app():
    import typer

    app = typer.Typer()
    app.command()(main)
    return app


def test_the_suite_is_balanced_disjoint_and_the_same_every_time(suite, monkeypatch, tmp_path):
    tasks = probe_tasks.load_tasks(str(suite))
    assert len(tasks) == len(probe_texts.SUITE) >= 12
    for task in tasks:
        for side in (task.train, task.test):
            labels = [label for _, label in side]
            assert sum(labels) * 2 == len(labels) >= 80
        assert not {text for text, _ in task.train} & {text for text, _ in task.test}
    some = (probe_texts.question, probe_texts.sum_correct, probe_texts.word_order)
    monkeypatch.setattr(probe_tasks, "SUITE", some)
    again = probe_tasks.build_suite(tmp_path)
    for name, digest in again.items():
        assert digest == probe_tasks.sha256_hex((suite / f"{name}.parquet").read_bytes())


def test_words_give_trivial_tasks_away_and_not_those_of_order(suite):
    found = {}
    for task in probe_tasks.load_tasks(str(suite)):
        if task.name in ("code_or_prose", "word_order", "sum_correct"):
            (texts, labels), (test, test_labels) = (
                zip(*side, strict=True) for side in (task.train, task.test)
            )
            args = (texts[:160], np.array(labels[:160], float), test, np.array(test_labels, float), 0.01)
            found[task.name] = bag_of_words(*args)[1]
    assert found["code_or_prose"] > 0.95
    assert abs(found["word_order"] - 0.5) < 0.12
    assert abs(found["sum_correct"] - 0.5) < 0.15


def test_a_built_suite_is_kept_and_its_digests_are_checked(monkeypatch, tmp_path):
    monkeypatch.setattr(probe_tasks, "SUITE", (probe_texts.past_tense,))
    monkeypatch.setattr(probe_tasks, "cache_dir", lambda: tmp_path)
    (task,) = probe_tasks.own_suite()
    assert {verb for text, _ in task.train for verb in text.split()} & {"sold", "sells"}
    file = probe_tasks.suite_folder() / "past_tense.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="built again"):
        probe_tasks.own_suite()


def parquet(**columns) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def test_any_task_is_taken_with_or_without_a_split():
    texts = [f"text {n}" for n in range(90)]
    task = probe_tasks.parse_task("t", parquet(text=texts, label=[n % 2 == 0 for n in range(90)]))
    assert len(task.train) + len(task.test) == 90
    assert 15 < len(task.test) < 45
    task = probe_tasks.parse_task(
        "t", parquet(text=["a", "b", "c", "d"], label=[0, 1, 0, 1], split=["train", "train", "test", "test"])
    )
    assert task.test == [("c", 0), ("d", 1)]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"not parquet", "Parquet"),
        (parquet(text=["a", "b"]), "lacks label"),
        (parquet(text=["a", "b"], label=[0, 2]), "0 or 1"),
        (parquet(text=["a", "b"], label=[0, 1], split=["train", "later"]), "later"),
        (parquet(text=["a", "b"], label=[0, 0], split=["train", "test"]), "both labels"),
    ],
)
def test_a_task_that_does_not_fit_is_named(data, words):
    with pytest.raises(ConfigError, match=words):
        probe_tasks.parse_task("odd", data)


def test_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="text and label"):
        probe_tasks.load_tasks(str(tmp_path))
