"""What the reconstruction costs the subject: delta CE and loss recovered on held-out windows.

Letters: B windows in a batch, T context length, D d_model.

Definitions (EVALUATION.md): the subject runs with the hook replaced by the reconstruction, by
zeros, or by the mean of the training rows; every variant replaces exactly the same positions, and
dropped leading positions and sinks stay clean. Cross-entropies are means over all next-token
predictions of the windows, in nats. `delta_ce` = patched - clean; `loss_recovered_zero` =
1 - delta_ce / (zero-ablated - clean), and `_mean` likewise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from harvester.ledger import read_ledger
from harvester.splice import Replacement
from harvester.subject import Subject
from schemas.config import Config
from schemas.errors import ConfigError
from schemas.subject import SubjectSpec
from store import ActivationStore
from store.console import Progress
from store.objects import open_store
from trainer.sae import Sae

BATCH_WINDOWS = 8
MAX_WINDOWS = 256
"""Held-out windows used, the first in the plan's (random) order."""
BOOTSTRAPS = 1000


def measure_in_subject(config: Config, sae: Sae, store: ActivationStore, hook: str) -> dict[str, float]:
    """Held-out figures that need the subject model, for the training summary.

    Returns:
        `delta_ce` with its 95 % bootstrap interval over windows, `loss_recovered_zero`,
        `loss_recovered_mean`, `ce_clean`, all in nats or shares, and `harvest_tokens_per_s`.

    Raises:
        ConfigError: The subject found is not the one the dataset was harvested from.
    """
    subject = Subject.load(_subject_spec(config, store))
    found, harvested = subject.identity.weights_sha256, store.plan.subject.weights_sha256
    if found != harvested:
        raise ConfigError("subject weights", expected=f"{harvested} (the dataset's)", got=found)
    held_out = len(store.plan.split_units("validation")) * store.plan.spec.windows_per_unit
    losses = splice_losses(subject, sae, store, hook, range(min(held_out, MAX_WINDOWS)))
    figures = summarise(losses)
    rate = read_ledger(open_store(config.root, config.storage)).tokens_per_second
    return figures if rate is None else figures | {"harvest_tokens_per_s": rate}


def _subject_spec(config: Config, store: ActivationStore) -> SubjectSpec:
    if config.subject is not None:
        return config.subject
    planned = store.plan.subject
    return SubjectSpec(
        model=planned.model, revision=planned.revision, dtype=planned.dtype, attention=planned.attention
    )


def splice_losses(
    subject: Subject, sae: Sae, store: ActivationStore, hook: str, windows: Sequence[int]
) -> dict[str, NDArray[np.float64]]:
    """Mean cross-entropy of each window, clean and with the hook replaced.

    Args:
        subject: The whole subject model.
        sae: Maps [rows, D] to its reconstruction in raw space.
        store: The dataset, for tokens, sinks and the mean.
        hook: Where the SAE reads.
        windows: Window numbers over the dataset.

    Returns:
        `clean`, `sae`, `zero`, `mean` -> [len(windows)] nats.
    """
    device = subject.device
    sae = sae.to(device)
    mean = torch.from_numpy(store.mean(hook)).to(device, torch.float32)
    variants: dict[str, Replacement] = {
        "sae": lambda x: sae(x),
        "zero": torch.zeros_like,
        "mean": lambda x: mean.expand_as(x),
    }
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in ("clean", *variants)}
    with Progress("delta CE", len(windows), "windows") as bar:
        for first in range(0, len(windows), BATCH_WINDOWS):
            batch = windows[first : first + BATCH_WINDOWS]
            tokens = np.stack([store.tokens(window) for window in batch])
            replaced = torch.from_numpy(store.window_weights([hook], batch) > 0).reshape(-1, 1).to(device)
            losses["clean"].append(subject.loss(tokens).mean(1))
            for name, variant in variants.items():
                patched = subject.loss(tokens, replace={hook: _at(replaced, variant)})
                losses[name].append(patched.mean(1))
            bar.advance(len(batch))
    return {name: torch.cat(values).double().cpu().numpy() for name, values in losses.items()}


def _at(rows: torch.Tensor, variant: Replacement) -> Replacement:
    """`variant` where `rows` [B*T, 1] is true, the activation itself elsewhere."""
    return lambda x: torch.where(rows, variant(x.float()).to(x.dtype), x)


def summarise(losses: dict[str, NDArray[np.float64]], seed: int = 0) -> dict[str, float]:
    """Figures from `splice_losses`: delta CE with its bootstrap interval, shares recovered."""
    clean = losses["clean"]
    delta = losses["sae"] - clean
    draws = np.random.default_rng(seed).integers(0, len(delta), (BOOTSTRAPS, len(delta)))
    low, high = np.quantile(delta[draws].mean(1), [0.025, 0.975])
    figures = {
        "ce_clean": clean.mean(),
        "delta_ce": delta.mean(),
        "delta_ce_low": low,
        "delta_ce_high": high,
        "loss_recovered_zero": 1 - delta.mean() / (losses["zero"] - clean).mean(),
        "loss_recovered_mean": 1 - delta.mean() / (losses["mean"] - clean).mean(),
    }
    return {name: float(value) for name, value in figures.items()}
