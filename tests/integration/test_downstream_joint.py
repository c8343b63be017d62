"""Delta CE of transcoders and crosscoders, on ones whose figures are known beforehand."""

from __future__ import annotations

import pytest
import torch

from tests.support.evaluated import D_MODEL, HOOK, identity_sae, toy_config, zero_sae
from winnow.evaluator.families.downstream import AcrossHooks, Losses, sae_variants, splice_losses
from winnow.evaluator.heldout import measure_in_subject
from winnow.sae import Sae
from winnow.schemas.training import SaeParts
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.subject import Subject

READ = "mlp_out.0"  # below HOOK


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_config(tmp_path_factory.mktemp("toy"))


@torch.no_grad()
def identity(parts: SaeParts, width: int) -> Sae:
    """Gives back what it reads, whatever it is said to reconstruct."""
    sae = Sae(width, 2 * width, 2 * width, "none", parts)
    eye = torch.eye(width)
    sae.W_enc.copy_(torch.cat([eye, -eye]))
    sae.W_dec.copy_(sae.W_enc)
    return sae


def saved(sae: Sae, folder, hook=READ, **hooks) -> Sae:
    sae.save(open_store(str(folder)), hook=hook, **hooks)
    return Sae.load(folder)


def joint_losses(subject: Subject, sae: Sae, store: ActivationStore, windows: range) -> Losses:
    """By whole passes, as for SAEs of several hooks."""
    reads, writes = sae.card.input_hooks, sae.card.output_hooks
    variants = sae_variants(sae, store, writes, subject.device)
    return splice_losses(AcrossHooks(subject, reads, writes, store), store, windows, variants)


def test_a_crosscoder_that_gives_its_rows_back_costs_nothing(toy, tmp_path):
    parts = SaeParts(widths=(D_MODEL, D_MODEL))
    sae = saved(identity(parts, 2 * D_MODEL), tmp_path, with_hooks=(HOOK,))
    figures = measure_in_subject(toy, sae, ActivationStore.open(toy.root), READ)
    assert figures["delta_ce"] == pytest.approx(0, abs=1e-5)
    assert figures["loss_recovered_zero"] == pytest.approx(1, abs=1e-3)


def test_a_transcoders_output_takes_the_place_of_the_targets_rows(toy, tmp_path):
    parts = SaeParts(d_out=D_MODEL, target_normalize="none")
    sae = saved(identity(parts, D_MODEL), tmp_path, target_hook=HOOK)
    store = ActivationStore.open(toy.root)
    subject = Subject.load(toy.subject)
    losses = joint_losses(subject, sae, store, range(3))
    tokens = store.tokens(1)[None]
    rows = subject.activations(tokens, [READ])[READ].flatten(0, 1)
    keep = torch.from_numpy(store.window_weights([READ, HOOK], [1]) > 0).reshape(-1, 1)
    assert 0 < keep.sum() < len(keep)
    patched = subject.loss(tokens, {HOOK: lambda x: torch.where(keep, rows, x)})
    assert losses["sae"][1] == pytest.approx(patched.mean().item(), abs=1e-5)
    assert losses["clean"][1] == pytest.approx(subject.loss(tokens).mean().item(), abs=1e-5)
    assert losses["sae"][1] != pytest.approx(losses["clean"][1], abs=1e-5)


def test_an_autoencoder_gives_the_same_either_way(toy, tmp_path):
    store, subject = ActivationStore.open(toy.root), Subject.load(toy.subject)
    zero = saved(zero_sae(), tmp_path, HOOK)
    losses = joint_losses(subject, zero, store, range(4))
    assert losses["sae"] == pytest.approx(losses["zero"])
    same = saved(identity_sae(), tmp_path, HOOK)
    assert joint_losses(subject, same, store, range(4))["kl.sae"] == pytest.approx(0, abs=1e-6)
