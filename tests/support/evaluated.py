"""A toy dataset of a tiny subject, and SAEs made by hand for it, for tests of the evaluator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.pipeline import pipeline_config
from winnow.common.config_file import load_config
from winnow.evaluator import kept_losses
from winnow.harvester.run.driver import ensure_plan, harvest
from winnow.sae import Sae
from winnow.schemas.config import Config
from winnow.schemas.training import SaeIdentity
from winnow.store import ActivationStore
from winnow.store.objects import open_store

HOOK = "resid_post.1"
D_MODEL = 16


def toy_config(folder: Path, *, units: int = 2, **sections: Any) -> Config:
    """Plan and harvest the toy pipeline in this process (no Ray); returns its config.

    `sections` override fields of its config's sections: `plan={"context_length": 8}`.
    """
    path = pipeline_config(folder, units=units, storage={"single_writer": True}, **sections)
    config = load_config(path)
    store = open_store(config.root, config.storage)
    harvest(config, store, ensure_plan(config, store))
    return config


def save_sae(
    config: Config, uri: Path, sae: Sae, *, hook: str = HOOK, seed_of: str | None = None, **hooks: Any
) -> str:
    """Save an SAE as one that was trained on the config's dataset; returns its URI."""
    plan = ActivationStore.open(config.root).plan
    identity = SaeIdentity(
        plan_fingerprint=plan.fingerprint,
        dataset_sha256=None,
        subject_model=plan.subject.model,
        subject_weights_sha256=seed_of or plan.subject.weights_sha256,
    )
    sae.save(
        open_store(str(uri)), hook=hook, **hooks, identity=identity, metrics={"dead_share_last_epoch": 0.25}
    )
    return str(uri)


@torch.no_grad()
def identity_sae() -> Sae:
    """X = relu(x) - relu(-x): 2 D latents, all of them allowed."""
    sae = Sae(D_MODEL, 2 * D_MODEL, 2 * D_MODEL, "none")
    eye = torch.eye(D_MODEL)
    sae.W_enc.copy_(torch.cat([eye, -eye]))
    sae.W_dec.copy_(sae.W_enc)
    return sae


@torch.no_grad()
def zero_sae() -> Sae:
    """Gives zeros, whatever comes in."""
    sae = identity_sae()
    sae.W_dec.zero_()
    return sae


@torch.no_grad()
def random_sae(latents: int = 48, k: int = 6, seed: int = 0) -> Sae:
    """Random unit directions, tied, on layer-normalised rows: bad, and never degenerate."""
    sae = Sae(D_MODEL, latents, k, "layer")
    draw = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(latents, D_MODEL, generator=draw), dim=1)
    sae.W_enc.copy_(rows)
    sae.W_dec.copy_(rows)
    sae.b_pre.copy_(0.05 * torch.randn(D_MODEL, generator=draw))
    sae.b_enc.copy_(0.02 * torch.randn(latents, generator=draw))
    return sae


@torch.no_grad()
def permuted(sae: Sae, seed: int = 1) -> Sae:
    """The same SAE with its latents in another order."""
    order = torch.randperm(sae.latents, generator=torch.Generator().manual_seed(seed))
    other = Sae(sae.d_model, sae.latents, sae.k, sae.normalize_mode)
    for name in ("W_enc", "W_dec", "b_enc"):
        getattr(other, name).copy_(getattr(sae, name)[order])
    other.b_pre.copy_(sae.b_pre)
    return other


def stop_after(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, calls: int) -> None:
    """Interrupt, as Ctrl-C does, at the call of `owner.name` after so many; from then on it runs as ever.

    Losses are kept after each batch, not once in 10 s.
    """
    monkeypatch.setattr(kept_losses, "WRITE_SECONDS", 0)
    run, seen = getattr(owner, name), []

    def stopping(*arguments: Any, **options: Any) -> Any:
        seen.append(name)
        if len(seen) == calls + 1:
            raise KeyboardInterrupt
        return run(*arguments, **options)

    monkeypatch.setattr(owner, name, stopping)
