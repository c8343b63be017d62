"""Family `probes`: how well one latent solves a binary task. Probe loss, compared with a bag of words.

Letters: n texts of a side, M latents active on a task's training texts, W words of its vocabulary.

Activations are pooled over a text's tokens by mean (and by max, a second id). The latent is chosen, and its
one-dimensional logistic probe with ridge fitted, on the training texts; the figure is the mean over tasks of
the cross-entropy on the test texts. A constant prediction scores ln 2 = 0.693 nats on a balanced task. The
bag of words, a logistic regression on the presence of words with the same ridge, shows which tasks are
trivial.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from winnow.evaluator.bootstrap import mean_figure
from winnow.evaluator.probes.tasks import Task, load_tasks
from winnow.evaluator.sequences import sequence_codes
from winnow.evaluator.setting import Measured, Setting
from winnow.schemas.errors import ConfigError

_Floats = NDArray[np.float64]
_NEWTON_STEPS = 25
_POOLS = ("mean", "max")
_LARGEST_STEP = 4.0
"""A Newton step is clipped to this in each parameter; standardised inputs need no larger one."""


def log_loss(logits: _Floats, labels: _Floats) -> _Floats:
    """Compute each entry's cross-entropy in nats; `logits` [n, ...], `labels` 0/1 of that shape or [n, 1]."""
    # logaddexp instead of log(1 + exp): large logits do not overflow.
    return np.logaddexp(0.0, logits) - labels * logits


def fit_each(x: _Floats, labels: _Floats, ridge: float) -> tuple[_Floats, _Floats, _Floats]:
    """Fit a one-dimensional logistic regression for every column by Newton's method.

    It minimises mean cross-entropy + ridge * weight^2 / 2; the bias is not penalised.

    Args:
        x: [n, M], standardised.
        labels: [n], 0 or 1.
        ridge: Above 0.

    Returns:
        (weight [M], bias [M], the minimum reached [M]).
    """
    # All columns at once, with 2 x 2 Hessians written out: there are thousands of latents per task.
    n = len(x)
    y = labels[:, None]
    weight, bias = np.zeros(x.shape[1]), np.zeros(x.shape[1])
    for _ in range(_NEWTON_STEPS):
        p = 1 / (1 + np.exp(-(x * weight + bias)))
        slack, spread = p - y, p * (1 - p)
        g_w, g_b = (slack * x).mean(0) + ridge * weight, slack.mean(0)
        # 1e-9: when all predictions are certain, the bias has no curvature and the determinant would be 0.
        h_ww, h_wb, h_bb = (spread * x * x).mean(0) + ridge, (spread * x).mean(0), spread.mean(0) + 1e-9
        determinant = h_ww * h_bb - h_wb * h_wb
        step_w = (h_bb * g_w - h_wb * g_b) / determinant
        step_b = (h_ww * g_b - h_wb * g_w) / determinant
        weight -= np.clip(step_w, -_LARGEST_STEP, _LARGEST_STEP)
        bias -= np.clip(step_b, -_LARGEST_STEP, _LARGEST_STEP)
        if n and max(np.abs(step_w).max(initial=0), np.abs(step_b).max(initial=0)) < 1e-8:
            break
    reached = log_loss(x * weight + bias, y).mean(0) + ridge * np.square(weight) / 2
    return weight, bias, reached


def best_latent(
    train: _Floats, labels: _Floats, test: _Floats, test_labels: _Floats, ridge: float
) -> tuple[int, float, float]:
    """Choose a column on the training texts; return it, its test cross-entropy and its test accuracy."""
    # Not on the test texts, as in Gao et al. 2024, section 4.2: the best of thousands there is partly lucky.
    if not train.shape[1]:
        # No latent is active on any training text: what remains is the constant prediction.
        rate = labels.mean()
        loss = log_loss(np.full(len(test_labels), np.log(rate / (1 - rate))), test_labels).mean()
        return -1, float(loss), float(((rate > 0.5) == test_labels).mean())
    mean, spread = train.mean(0), train.std(0)
    spread = np.where(spread > 0, spread, 1.0)
    # Standardised by the training texts alone, so that one ridge means the same for every latent, and the
    # test texts stay unseen.
    weight, bias, reached = fit_each((train - mean) / spread, labels, ridge)
    chosen = int(reached.argmin())
    logits = (test[:, chosen] - mean[chosen]) / spread[chosen] * weight[chosen] + bias[chosen]
    loss = float(log_loss(logits, test_labels).mean())
    return chosen, loss, float(((logits > 0) == test_labels).mean())


def bag_of_words(
    train: Sequence[str], labels: _Floats, test: Sequence[str], test_labels: _Floats, ridge: float
) -> tuple[float, float]:
    """Fit a logistic regression on which words and marks occur; return test cross-entropy and accuracy."""
    # Words of the training texts only: others have no weight.
    words = [set(_words(text)) for text in train]
    place = {word: number for number, word in enumerate(sorted(set().union(*words)))}

    def encode(texts: Sequence[str]) -> _Floats:
        out = np.zeros((len(texts), len(place)))
        for line, text in enumerate(texts):
            out[line, [place[word] for word in set(_words(text)) if word in place]] = 1
        return out

    x, x_test = encode(train), encode(test)

    def objective(theta: _Floats) -> tuple[float, _Floats]:
        logits = x @ theta[:-1] + theta[-1]
        slack = 1 / (1 + np.exp(-logits)) - labels
        value = log_loss(logits, labels).mean() + ridge * np.square(theta[:-1]).sum() / 2
        return value, np.append(x.T @ slack / len(x) + ridge * theta[:-1], slack.mean())

    theta: _Floats = minimize(objective, np.zeros(len(place) + 1), jac=True, method="L-BFGS-B").x
    logits = x_test @ theta[:-1] + theta[-1]
    return float(log_loss(logits, test_labels).mean()), float(((logits > 0) == test_labels).mean())


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)?|\d+|[^\w\s]", text.lower())


def pooled(
    setting: Setting, texts: Sequence[str], label: str
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.int64]]:
    """Pool each text's activations over its first `probe_tokens` tokens.

    Returns:
        `mean` and `max` -> float32 [n, M] over the latents active on any text, and those latents [M].
    """
    # Without BOS: `sequence_codes` puts before each text what the windows begin with.
    rule = setting.window.inside
    sequences = [setting.subject.encode(text, rule)[: setting.spec.probe_tokens] for text in texts]
    if any(not ids for ids in sequences):
        raise ConfigError("probe tasks", expected="texts of at least one token", got="a text without any")
    # Sparse until all texts are known: dense, it would be n x N, of which few latents are ever active.
    sparse: dict[int, tuple[Any, Any, Any]] = {}
    for codes in sequence_codes(setting, sequences, label):
        on = codes.values > 0
        values, latents = codes.values[on].cpu().numpy(), codes.indices[on].cpu().numpy()
        # By all tokens, not only active ones: the mean of a latent that is silent on most of a text is small.
        own, inverse = np.unique(latents, return_inverse=True)
        total, top = np.zeros(len(own), np.float32), np.zeros(len(own), np.float32)
        np.add.at(total, inverse, values)
        np.maximum.at(top, inverse, values)
        sparse[codes.number] = (own, total / len(codes.values), top)
    latents = np.unique(np.concatenate([own for own, _, _ in sparse.values()]))
    out = {pool: np.zeros((len(texts), len(latents)), np.float32) for pool in _POOLS}
    for line, (own, mean, top) in sparse.items():
        at = np.searchsorted(latents, own)
        out["mean"][line, at], out["max"][line, at] = mean, top
    return out, latents


def measure(setting: Setting) -> Measured:
    """Measure every task of `spec.tasks`, or of our own suite.

    Raises:
        ConfigError: A task cannot be read.
        DependencyMissing: A package of the suite's texts is not installed.
    """
    tasks = load_tasks(setting.spec.tasks)
    results = {task.name: _measure_task(setting, task) for task in tasks}
    options = {"unit": "tasks", "seed": setting.spec.seed}
    figures = [
        mean_figure(id, np.array([result[id] for result in results.values()]), **options)
        for id in ("probe_loss_mean", "probe_loss_max", "probe_loss_bag_of_words")
    ]
    ahead = [n for n, found in results.items() if found["probe_loss_mean"] < found["probe_loss_bag_of_words"]]
    won = ", ".join(ahead) or "none"
    note = f"one latent beats the bag of words on {len(ahead)} of {len(tasks)} tasks: {won}"
    return Measured(figures, {"tasks": results}, (note,))


def _measure_task(setting: Setting, task: Task) -> dict[str, Any]:
    """Measure one task: probe losses and accuracies of both pools, the latents chosen, the bag of words."""
    spec = setting.spec
    train, test = balanced(task.train, spec.probe_train), balanced(task.test, spec.probe_test)
    labels, test_labels = (np.array([label for _, label in side], float) for side in (train, test))
    texts = [text for text, _ in (*train, *test)]
    # Both sides in one call, so that texts of equal length share batches.
    features, latents = pooled(setting, texts, f"probe {task.name}")
    found: dict[str, Any] = {"train": len(train), "test": len(test)}
    for pool, x in features.items():
        # A latent that is silent on all training texts cannot be chosen: which to take must not depend on the
        # test.
        used = (x[: len(train)] > 0).any(0)
        kept = x[:, used].astype(float)
        chosen, loss, accuracy = best_latent(
            kept[: len(train)], labels, kept[len(train) :], test_labels, spec.probe_ridge
        )
        found[f"probe_loss_{pool}"], found[f"accuracy_{pool}"] = loss, accuracy
        found[f"latent_{pool}"] = int(latents[used][chosen]) if chosen >= 0 else None
    words = bag_of_words(texts[: len(train)], labels, texts[len(train) :], test_labels, spec.probe_ridge)
    found["probe_loss_bag_of_words"], found["accuracy_bag_of_words"] = words
    return found


def balanced(side: list[tuple[str, int]], limit: int) -> list[tuple[str, int]]:
    """Take at most `limit` texts, the first of each label in equal number, so that a cut stays balanced."""
    by_label = [[row for row in side if row[1] == label] for label in (0, 1)]
    return [row for rows in by_label for row in rows[: -(-limit // 2)]]
