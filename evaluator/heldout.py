"""The held-out figures of family `downstream` that `winnow train` adds to its summary."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

from winnow.common.reporter import say
from winnow.evaluator.families.downstream import (
    Reached,
    figures_of,
    joint_figures,
    runs_of,
    sae_variants,
    splice_losses,
)
from winnow.evaluator.kept_losses import KeptLosses
from winnow.evaluator.setting import subject_spec_of, subjects_of
from winnow.harvester.run.ledger import read_ledger
from winnow.sae.model import Sae
from winnow.schemas.base import canonical_json, sha256_hex
from winnow.schemas.config import Config
from winnow.schemas.errors import DISTRIBUTION
from winnow.schemas.fit import check_subject
from winnow.schemas.subject import read_only
from winnow.store import ActivationStore
from winnow.store.objects import ObjectStore, open_store
from winnow.store.read.joined import JoinedStore
from winnow.subject.load import Subject

SHOWN = ("ce_clean", "delta_ce", "loss_recovered_zero", "loss_recovered_mean")


def measure_in_subject(
    config: Config, sae: Sae, store: ActivationStore, hook: str, out: ObjectStore | None = None
) -> dict[str, float]:
    """Measure the held-out figures that need the subject model, for the training summary.

    Args:
        config: `root`, `subject`, `storage` and `evaluate` are read.
        sae: The SAE.
        store: The dataset.
        hook: The hook that it reads.
        out: Its folder, where the losses of the windows so far are kept, so that the same call resumes, until
            the caller removes them; None keeps nothing.

    Returns:
        `delta_ce` with its 95 % bootstrap interval over windows, `loss_recovered_zero`,
        `loss_recovered_mean`, `ce_clean`, all in nats or shares, and `harvest_tokens_per_s`. What cannot be
        measured is left out.

    Raises:
        SaeMismatch: The subject that was found is not the one that the dataset was harvested from.
    """
    why = next((part.plan.no_subject for part in store.datasets if part.plan.no_subject is not None), None)
    if why is not None:
        say(f"delta CE is not measured: {why}")
        return {}
    # An SAE without a card was never published; it is then an autoencoder of `hook`.
    written = sae.card.output_hooks if sae.card is not None else (hook,)
    fixed = next((name for name in written if read_only(name)), None)
    if fixed is not None:
        say(f"delta CE is not measured: the rows at {fixed} cannot be replaced")
        return {}
    if isinstance(store, JoinedStore):
        return _joint(config, sae, store, hook, out)
    say("delta CE: loading the subject")
    subject = Subject.load(subject_spec_of(store.plan, config.subject))
    check_subject(subject.identity, store.plan.subject)
    # No more windows than `winnow evaluate` takes, so that both report the same sample.
    held_out = len(store.plan.split_units("validation")) * store.plan.spec.windows_per_unit
    windows, sae = range(min(held_out, config.evaluate.windows)), sae.to(subject.device)
    runs = runs_of(subject, sae, store, hook)
    losses = splice_losses(
        runs,
        store,
        windows,
        sae_variants(sae, store, written, subject.device),
        batch_windows=config.evaluate.batch_windows,
        label="delta CE",
        kept=_kept(out, sae, store, hook, windows, [subject]),
    )
    reached = Reached.of(store, runs.hooks, windows)
    if reached.note:
        say(f"delta CE: {reached.note}")
    found = {figure.id: figure for figure in figures_of(losses, reached)}
    figures = {name: found[name].value for name in SHOWN}
    figures |= {"delta_ce_low": found["delta_ce"].low, "delta_ce_high": found["delta_ce"].high}
    rate = read_ledger(open_store(config.root, config.storage)).tokens_per_second
    figures |= {"harvest_tokens_per_s": rate}
    return {name: float(value) for name, value in figures.items() if value is not None}


def _kept(
    out: ObjectStore | None,
    sae: Sae,
    store: ActivationStore,
    hook: str,
    windows: range,
    subjects: Iterable[Subject],
) -> KeptLosses | None:
    """What an earlier call kept in `out`. Not part of its digest: `batch_windows`, which is float noise."""
    if out is None:
        return None
    facts = {
        # Another version may measure otherwise, or other variants.
        "version": metadata.version(DISTRIBUTION),
        "sae": sae.card.weights_sha256 if sae.card is not None else None,
        "plans": [part.plan.fingerprint for part in store.datasets],
        "datasets": [part.dataset_sha256 for part in store.datasets],
        "hook": hook,
        "windows": len(windows),
        "subjects": [subject.identity.model_dump(mode="json") for subject in subjects],
    }
    return KeptLosses(out, sha256_hex(canonical_json(facts)))


def _joint(
    config: Config, sae: Sae, store: JoinedStore, hook: str, out: ObjectStore | None
) -> dict[str, float]:
    """The figures of an SAE of several subjects, in each of them: `delta_ce.NAME` and so on."""
    subjects = subjects_of(store, subject_spec_of(store.plan, config.subject), config.evaluate.subjects)
    held_out = len(store.plan.split_units("validation")) * store.plan.spec.windows_per_unit
    windows = range(min(held_out, config.evaluate.windows))
    sae = sae.to(next(iter(subjects.values())).device)
    kept = _kept(out, sae, store, hook, windows, subjects.values())
    figures, _ = joint_figures(subjects, sae, store, windows, config.evaluate, kept)
    shown = [figure for figure in figures if figure.id.rpartition(".")[0] in SHOWN]
    return {figure.id: figure.value for figure in shown if figure.value is not None}
