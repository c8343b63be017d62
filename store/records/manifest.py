"""Opening a dataset: from `manifest.json` to checked receipts."""

from __future__ import annotations

from winnow.schemas.base import MAX_JSON_BYTES, sha256_hex
from winnow.schemas.errors import ConfigError, IntegrityError, MissingObject
from winnow.schemas.harvest import HarvestManifest, HarvestPlan
from winnow.store.format.layout import manifest_key
from winnow.store.objects import ObjectStore
from winnow.store.records.index import ReceiptIndex
from winnow.store.records.parts import DatasetDigest, read_index


def find_manifest(store: ObjectStore, plan: HarvestPlan) -> HarvestManifest | None:
    """Find the manifest of highest revision, checked against the plan and its parents; None: not sealed.

    Raises:
        IntegrityError, UnsupportedVersion: A manifest cannot be read or does not fit.
    """
    # From revision 0 on, each naming its parent's digest: a revision whose chain is broken is not believed.
    manifest: HarvestManifest | None = None
    parent: str | None = None
    revision = 0
    while True:
        key = manifest_key(revision)
        try:
            data = store.get(key, MAX_JSON_BYTES)
        except MissingObject:
            return manifest
        manifest = HarvestManifest.from_json(data, origin=f"{store.uri}/{key}")
        _check(plan, manifest, f"{store.uri}/{key}", revision, parent)
        parent, revision = sha256_hex(data), revision + 1


def load_manifest(store: ObjectStore, plan: HarvestPlan) -> HarvestManifest:
    """Find the manifest as `find_manifest` does; ConfigError if the dataset is not sealed."""
    manifest = find_manifest(store, plan)
    if manifest is None:
        raise ConfigError(
            f"{store.uri} is not sealed: its harvest has not finished",
            expected=manifest_key(),
            got="nothing there",
            fix="Run `winnow harvest` with its config again: it resumes where it stopped",
        )
    return manifest


def load_index(store: ObjectStore, plan: HarvestPlan, manifest: HarvestManifest) -> ReceiptIndex:
    """Read every receipt of a sealed dataset, checked against plan and manifest, in columns.

    Raises:
        MissingObject: A part does not exist.
        IntegrityError: Bytes, receipts or the dataset's digest differ from the manifest's.
    """
    index, digest = ReceiptIndex(plan), DatasetDigest(plan)
    for part in manifest.parts:
        read_index(store, plan, part, index, digest)
    # Each part has its own digest; this one also covers their order and completeness.
    facts = (
        ("dataset_sha256", manifest.dataset_sha256, digest.hexdigest()),
        ("void_units", manifest.void_units, tuple(index.void.nonzero()[0].tolist())),
    )
    _same(f"the receipts of {store.uri}", facts)
    return index


def _check(
    plan: HarvestPlan, manifest: HarvestManifest, origin: str, revision: int, parent: str | None
) -> None:
    first = [0]
    for part in manifest.parts:
        first.append(first[-1] + part.units)
    facts = (
        ("plan_fingerprint", plan.fingerprint, manifest.plan_fingerprint),
        ("revision", revision, manifest.revision),
        ("parent", parent, manifest.parent),
        ("units", plan.units, manifest.units),
        ("rows", plan.rows, manifest.rows),
        ("hooks", sorted(plan.spec.hooks), sorted(manifest.sinks)),
        ("units of the parts", plan.units, first[-1]),
        ("first units of the parts", first[:-1], [part.first_unit for part in manifest.parts]),
    )
    _same(origin, facts)


def _same(origin: str, facts: tuple[tuple[str, object, object], ...]) -> None:
    for name, expected, got in facts:
        if expected != got:
            raise IntegrityError(f"{origin}: {name} is wrong", expected=expected, got=got)
