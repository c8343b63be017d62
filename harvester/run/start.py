"""A harvest from its config alone: planned, forecast, run and sealed."""

from __future__ import annotations

from winnow.common.reporter import say
from winnow.harvester.run.driver import ensure_plan
from winnow.harvester.run.driver import harvest as run_units
from winnow.harvester.run.driver import harvest_part as run_part
from winnow.harvester.run.forecast import forecast, summary_line
from winnow.harvester.run.part import Part
from winnow.schemas.config import Config
from winnow.schemas.harvest import HarvestManifest, HarvestPlan
from winnow.store import ActivationStore
from winnow.store.objects import ObjectStore, open_store


def harvest(config: Config, *, accept_quarantined: bool = False) -> ActivationStore:
    """Run the config's subject over its corpus and store the activations at its root; resumes.

    Args:
        config: With the sections `subject`, `corpus` and `plan`.
        accept_quarantined: Commit units that cannot be computed as void, with the cause.

    Returns:
        The finished dataset, opened. A finished one is only opened again.

    Raises:
        ConfigError: Anything wrong with config or corpus.
        PlanMismatch: The root holds another plan; the differing fields are named.
        WorkerError: Units are quarantined, or too many attempts failed in a row.
        NonFiniteError: Only NaN or infinity from the subject prevents the seal.
        StoreError: The store fails the probe, refuses or is full.
    """
    store, plan = _begun(config)
    run_units(config, store, plan, accept_quarantined=accept_quarantined)
    return ActivationStore.open(config.root, config.storage)


def harvest_part(
    config: Config, part: Part, *, accept_quarantined: bool = False
) -> tuple[HarvestPlan, HarvestManifest | None]:
    """Harvest one part of a dataset, as `harvest` does the whole; the last part to end seals it.

    Returns:
        The plan, and the manifest once all parts are done.
    """
    store, plan = _begun(config)
    return plan, run_part(config, store, plan, part, accept_quarantined=accept_quarantined)


def _begun(config: Config) -> tuple[ObjectStore, HarvestPlan]:
    """The root and its plan, with a line about what is left to do."""
    store = open_store(config.root, config.storage)
    plan = ensure_plan(config, store)
    # After planning, which fixes the number of units; nothing to say about a harvest that is complete.
    before = forecast(config, store, plan)
    if before.units_to_do:
        say(summary_line(before))
    return store, plan
