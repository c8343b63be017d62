"""Evaluates an SAE, family by family, into `evaluation.json`; earlier measurements are kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from winnow.common.figures import human_figure
from winnow.common.reporter import say
from winnow.evaluator.families import ablation, compute, diffing, downstream, reconstruction, sets, stability
from winnow.evaluator.judge import family as judge
from winnow.evaluator.kept_losses import KeptLosses
from winnow.evaluator.n2g import family as n2g
from winnow.evaluator.probes import family as probes
from winnow.evaluator.probes.tasks import tasks_identity
from winnow.evaluator.set_setting import SetSetting, open_setting
from winnow.evaluator.setting import Measured, Setting
from winnow.sae.model import read_card, require_some_sae
from winnow.schemas.base import canonical_json, sha256_hex
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError, MissingObject, Unmeasurable
from winnow.schemas.evaluation import FAMILIES, Evaluation, Family, FamilyResult, Figure
from winnow.schemas.readings import RowsSpec
from winnow.schemas.training import SaeCard
from winnow.store.objects import ObjectStore, open_store

EVALUATION_KEY = "evaluation.json"
_DEFINITIONS = "v2"
"""Changed whenever a definition changes: it is part of every digest, so that all results are measured
again."""

MEASURES: dict[str, Callable[..., Measured]] = {
    "reconstruction": reconstruction.measure,
    "downstream": downstream.measure,
    "stability": stability.measure,
    "ablation": ablation.measure,
    "probes": probes.measure,
    "n2g": n2g.measure,
    "judge": judge.measure,
    "diffing": diffing.measure,
}
"""Family -> what measures it. `compute` is not among them: it takes the figures of `downstream` and runs
nothing."""
SET_MEASURES: dict[str, Callable[..., Measured]] = {
    "reconstruction": sets.reconstruction,
    "downstream": sets.downstream,
}
"""Family -> what measures it of a transcoder set."""
DEPENDS: dict[str, tuple[str, ...]] = {
    "reconstruction": ("windows", "rows"),
    "downstream": ("windows", "rows"),
    "compute": ("windows", "rows", "law"),
    "stability": ("against",),
    "ablation": ("windows", "rows", "ablation_rows", "ablation_latents", "ablation_tokens"),
    "probes": ("tasks", "probe_train", "probe_test", "probe_tokens", "probe_ridge"),
    "n2g": ("windows", "rows", "n2g_latents", "n2g_examples", "n2g_train_rows", "n2g_positives"),
    "judge": ("windows", "rows", "n2g_train_rows", "judge"),
    "diffing": ("windows", "rows"),
}
"""Family -> the fields of `EvaluateSpec` that its figures depend on, besides the seed. `batch_windows` is in
none: it affects float noise only."""


def _chosen_families(setting: Setting | SetSetting) -> list[Family]:
    """List the requested families, or all that have what they need, in the order of measurement.

    Raises:
        ConfigError: A family was requested without what it needs.
    """
    spec = setting.spec
    needs: dict[Family, object] = {"compute": spec.law, "stability": spec.against, "judge": spec.judge}
    needs["diffing"] = isinstance(setting, Setting) and setting.card.with_hooks
    lacking = [name for name, given in needs.items() if not given]
    left_out = setting.left_out
    if spec.metrics is None:
        for why in dict.fromkeys(left_out.values()):
            names = [name for name in left_out if left_out[name] == why and name not in lacking]
            say(f"left out: {', '.join(names)}: {why}")
        return [name for name in FAMILIES if name not in lacking and name not in left_out]
    for asked, why in left_out.items():
        if asked in spec.metrics:
            raise ConfigError(
                f"metrics {asked} of {setting.uri}",
                expected=", ".join(name for name in FAMILIES if name not in left_out),
                got=why,
            )
    for name in lacking:
        if name in spec.metrics:
            _measure_lacking(setting, name)
    # `compute` is a function of the losses of `downstream`, so it brings that family along.
    wanted = set(spec.metrics) | ({"downstream"} if "compute" in spec.metrics else set())
    return [name for name in FAMILIES if name in wanted]


def _measure_lacking(setting: Setting | SetSetting, family: Family) -> None:
    """Raise the error of a family that lacks what it needs; measuring it says what that is."""
    if family == "compute":
        compute.measure(None, ())
    elif isinstance(setting, Setting):
        MEASURES[family](setting)


def _settings_of(setting: Setting | SetSetting, family: Family) -> dict[str, Any]:
    """Return everything in the spec that a family's figures depend on."""
    spec = setting.spec.model_dump(mode="json")
    # Rows are in the spec only if some are chosen: settings of all rows are as before they could be.
    names = [name for name in ("seed", *DEPENDS[family]) if name in spec]
    return {"definitions": _DEFINITIONS} | {name: spec[name] for name in names}


def _settings_digest(setting: Setting | SetSetting, family: Family) -> str:
    """Compute the digest of everything that a family's figures depend on."""
    facts = _settings_of(setting, family)
    facts |= {"family": family, "sae": setting.sha256}
    # The dataset's digest beside the plan's: it is null until the set is sealed, and figures of a part of the
    # dataset are then not taken for figures of all of it.
    facts |= {"plan": setting.dataset.plan.fingerprint, "dataset": setting.dataset.dataset_sha256}
    if family == "stability":
        # By their weights: another SAE may be trained into the same folder.
        facts["others"] = [_card(uri, setting).weights_sha256 for uri in setting.spec.against]
    if family == "probes":
        facts["tasks"] = tasks_identity(setting.spec.tasks)
    return sha256_hex(canonical_json(facts))


def _card(uri: str, setting: Setting | SetSetting) -> SaeCard:
    return read_card(open_store(uri, setting.storage), uri)


def _new_evaluation(setting: Setting | SetSetting) -> Evaluation:
    """Make an evaluation without any family."""
    plan, identity = setting.dataset.plan, setting.identity
    return Evaluation(
        sae=setting.uri,
        sae_sha256=setting.sha256,
        plan_fingerprint=plan.fingerprint,
        dataset_sha256=setting.dataset.dataset_sha256,
        root=setting.dataset.uri,
        subject_model=plan.subject.model,
        subject_weights_sha256=plan.subject.weights_sha256,
        hook=setting.hook,
        reads=setting.reads if isinstance(setting, SetSetting) or len(setting.reads) > 1 else (),
        latents=setting.latents,
        k=setting.k,
        trained_on_this=identity is not None and identity.plan_fingerprint == plan.fingerprint,
    )


def load_evaluation(store: ObjectStore) -> Evaluation | None:
    """Load the evaluation beside an SAE; None if there is none.

    Raises:
        IntegrityError, UnsupportedVersion: It cannot be read.
    """
    try:
        return _parsed(store, store.get(EVALUATION_KEY))
    except MissingObject:
        return None


def _parsed(store: ObjectStore, data: bytes) -> Evaluation:
    return Evaluation.from_json(data, origin=f"{store.uri}/{EVALUATION_KEY}")


def evaluate(
    sae: str | os.PathLike[str],
    config: Config,
    *,
    out: str | os.PathLike[str] | None = None,
    again: bool = False,
    judge_key: str | None = None,
) -> Evaluation:
    """Measure a trained SAE or transcoder set on the windows its dataset held out.

    `evaluation.json` is written beside it after every family, so an evaluation that was stopped resumes, in
    `downstream` with the next windows; what
    was measured of other datasets and with other settings stays in it. `figure(name)` of what comes back
    looks up a figure.

    Args:
        sae: Folder or URI of the SAE or set.
        config: `root` (the dataset), `subject`, `storage` and the section `evaluate` are read. Without
            `subject` it is the one that the dataset's plan names.
        out: Folder or URI of `evaluation.json`; None: beside the SAE.
        again: Measure also what an earlier run finished with the same settings.
        judge_key: The key of the endpoint `evaluate.judge`; it is written nowhere.

    Returns:
        The evaluation of this dataset.

    Raises:
        ConfigError: No dataset there, or a family lacks what it needs.
        SaeMismatch: Another subject, hook or width than the dataset's.
        IntegrityError, StoreError: SAE, data or an earlier evaluation cannot be read.
    """
    setting = open_setting(
        os.fspath(sae),
        config.root,
        config.evaluate,
        subject=config.subject,
        storage=config.storage,
        judge_key=judge_key,
        roots=config.train.roots if config.train is not None else None,
    )
    return evaluate_setting(setting, out=out, again=again)


def evaluate_setting(
    setting: Setting | SetSetting, *, out: str | os.PathLike[str] | None = None, again: bool = False
) -> Evaluation:
    """Measure every chosen family and write `evaluation.json` after each.

    Args:
        setting: What is measured, and how.
        out: Folder or URI of `evaluation.json`; None writes it beside the SAE.
        again: Also repeat what an earlier run finished with the same settings.

    Returns:
        The evaluation of this dataset. Earlier measurements, of other settings and datasets, stay in it.

    Raises:
        ConfigError: A family lacks what it needs.
        Unmeasurable: A family that was named has nothing to measure; raised once the others are measured.
        IntegrityError, StoreError: Data or an earlier evaluation cannot be read.
    """
    store = open_store(out or setting.uri, setting.storage)
    blank = _new_evaluation(setting)
    # All digests before the first measurement: computing them also reads tasks and other SAEs, so that a
    # missing one is an error now and not after hours.
    digests: dict[Family, str] = {
        family: _settings_digest(setting, family) for family in _chosen_families(setting)
    }
    found, unmeasured = resumed(blank, load_evaluation(store)), list[Unmeasurable]()
    for family, digest in digests.items():
        kept: KeptLosses | None = None
        known = [result for result in found.results(family) if result.settings_sha256 == digest]
        if known and not again:
            say(f"{family}: kept from {known[0].finished}")
            result = known[0]
        else:
            # The one family that also resumes within: by far the most of a transcoder set's hours.
            kept = KeptLosses(store, digest) if family == "downstream" else None
            try:
                result = _result(setting, family, digest, found, kept)
            # Whether there is anything to measure shows in the data only; the other families have a right
            # to their figures all the same.
            except Unmeasurable as error:
                unmeasured.append(error)
                say(f"left out: {family}: {error}")
                continue
        # After every family, so that an interruption loses one at most.
        found = _stored_with(store, blank, family, result)
        # Only now: a kill before the figures are stored must find them.
        if kept is not None:
            kept.delete()
    if unmeasured and setting.spec.metrics is not None:
        raise unmeasured[0]
    return found


def _stored_with(store: ObjectStore, blank: Evaluation, family: Family, result: FamilyResult) -> Evaluation:
    """Add a result to what is stored, and return that; other processes may add theirs meanwhile."""
    found = blank

    def change(data: bytes | None) -> bytes:
        nonlocal found
        stored = resumed(blank, None if data is None else _parsed(store, data))
        found = stored.having(family, result)
        return data if data is not None and found == stored else found.to_json()

    store.update(EVALUATION_KEY, change)
    return found


def resumed(blank: Evaluation, stored: Evaluation | None) -> Evaluation:
    """Return what is stored, with the dataset of `blank` as the main one and all others behind it."""
    if stored is None:
        return blank
    mine = next((one for one in stored.each if _same(one, blank)), blank)
    others = tuple(one for one in stored.each if not _same(one, blank))
    return blank.model_copy(update={"families": mine.families, "earlier": mine.earlier, "others": others})


def _same(earlier: Evaluation, now: Evaluation) -> bool:
    # By content, not by address: neither a moved SAE nor a moved dataset is measured again.
    names = ("sae_sha256", "plan_fingerprint", "dataset_sha256", "hook")
    return all(getattr(earlier, name) == getattr(now, name) for name in names)


def _result(
    setting: Setting | SetSetting, family: Family, digest: str, found: Evaluation, kept: KeptLosses | None
) -> FamilyResult:
    began = time.monotonic()
    measured = _measure(setting, family, found.families, kept)
    return FamilyResult(
        settings_sha256=digest,
        settings=_settings_of(setting, family),
        figures=tuple(measured.figures),
        details=measured.details,
        notes=measured.notes,
        seconds=time.monotonic() - began,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _measure(
    setting: Setting | SetSetting,
    family: Family,
    found: dict[Family, FamilyResult],
    kept: KeptLosses | None,
) -> Measured:
    if family == "compute":
        return compute.measure(setting.spec.law, found["downstream"].figures)
    measures = SET_MEASURES if isinstance(setting, SetSetting) else MEASURES
    return measures[family](setting) if kept is None else measures[family](setting, kept)


# ---- tables --------------------------------------------------------------------------------------


def _show_value(figure: Figure | None) -> str:
    """Format a figure's value; empty if there is none."""
    if figure is None:
        return ""
    return "none" if figure.value is None else human_figure(figure.value)


def _show_interval(figure: Figure) -> str:
    """Format an interval as `[low … high]`; empty if there is none."""
    if figure.low is None or figure.high is None:
        return ""
    return f"[{human_figure(figure.low)} … {human_figure(figure.high)}]"


def tabulate(evaluation: Evaluation) -> list[list[str]]:
    """Make the table of one evaluation: definition id, value, interval, sample; without figures of layers."""
    return [
        [figure.id, _show_value(figure), _show_interval(figure), f"{figure.samples:,} {figure.unit}"]
        for family in evaluation.families.values()
        for figure in family.figures
        if _layer_of(figure) is None
    ]


def tabulate_layers(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Make the table of a transcoder set's layers: its header and a line per layer; both empty for an SAE."""
    lines: dict[int, dict[str, str]] = {}
    for family in evaluation.families.values():
        for figure in family.figures:
            if (layer := _layer_of(figure)) is not None:
                name, _, _ = figure.id.rpartition(".")
                lines.setdefault(layer, {})[name] = _show_value(figure)
    names = list(dict.fromkeys(name for line in lines.values() for name in line))
    rows = [[str(layer), *(lines[layer].get(name, "") for name in names)] for layer in sorted(lines)]
    return (["layer", *names] if names else []), rows


def _layer_of(figure: Figure) -> int | None:
    """The layer that a figure of a transcoder set is of; None if it is of all, or of an SAE."""
    last = figure.id.rpartition(".")[2]
    return int(last) if "." in figure.id and last.isdigit() else None


def list_notes(evaluation: Evaluation) -> list[str]:
    """List what a reader of the table must know."""
    lines = [f"{name}: {note}" for name, family in evaluation.families.items() for note in family.notes]
    readings: dict[str, list[str]] = {}
    for name, family in evaluation.families.items():
        if "rows" in family.settings:
            readings.setdefault(RowsSpec.model_validate(family.settings["rows"]).words, []).append(name)
    lines += [f"{', '.join(names)}: of rows with {words} only" for words, names in readings.items()]
    # Figures of one family often share a note, such as how many windows were left out: it is told once.
    same: dict[str, list[str]] = {}
    for family in evaluation.families.values():
        for figure in family.figures:
            same.setdefault(figure.note, []).append(figure.id)
    lines += [f"{', '.join(ids)}: {note}" for note, ids in same.items() if note]
    lines += [
        f"{name}: also measured with {differences(family, newest)}, {family.finished}"
        for name, newest in evaluation.families.items()
        for family in evaluation.earlier.get(name, ())
    ]
    if not evaluation.trained_on_this:
        lines.append(
            "the SAE's card does not name this dataset's plan: whether these windows were held out from it "
            "is not known"
        )
    return lines


def differences(one: FamilyResult, newest: FamilyResult) -> str:
    """Say which settings of a family's result differ from those of its newest, as `field = value`."""
    if not one.settings:
        return "settings that are not known"  # files of version 1.0 have their digest only
    other = [
        f"{name} = {value}" for name, value in one.settings.items() if newest.settings.get(name) != value
    ]
    # Digests differ although all fields agree: the files behind `tasks` or `against` have changed.
    return ", ".join(other) or "other tasks or SAEs"


def find_common_dataset(found: Sequence[Evaluation], uris: Sequence[str]) -> list[Evaluation]:
    """Find each SAE's evaluation on one dataset: the first SAE's newest on which all were evaluated.

    Raises:
        ConfigError: There is no such dataset, the SAEs read different hooks, or a family was measured on
            different rows.
    """
    shared = [one for one in found[0].each if all(other.on(one.plan_fingerprint) for other in found)]
    # If none is shared, the loop below names the first SAE that lacks the first one's dataset.
    plan = shared[0].plan_fingerprint if shared else found[0].plan_fingerprint
    for other, uri in zip(found, uris, strict=True):
        for name in ("plan_fingerprint", "hook", "reads"):
            expected = plan if name == "plan_fingerprint" else getattr(found[0], name)
            got = getattr(other.on(plan) or other, name)
            if got != expected:
                raise ConfigError(
                    f"{uri} was evaluated on another {name.replace('_', ' ')} than {uris[0]}",
                    expected=expected,
                    got=got,
                    fix="Evaluate all of them on the same dataset",
                )
    if any(len(one.each) > 1 for one in found):
        say(f"compared on the dataset {name_of(shared[0])}")
    chosen = [on for one in found if (on := one.on(plan)) is not None]
    _require_same_rows(chosen, uris)
    return chosen


def _require_same_rows(found: Sequence[Evaluation], uris: Sequence[str]) -> None:
    """Raise ConfigError if a family's figures are of other rows in one evaluation than in the first."""
    for other, uri in zip(found[1:], uris[1:], strict=True):
        for family in found[0].families.keys() & other.families.keys():
            if "rows" not in DEPENDS[family]:
                continue
            mine, theirs = (
                RowsSpec.model_validate(one.families[family].settings.get("rows", {})).words
                for one in (found[0], other)
            )
            if mine != theirs:
                raise ConfigError(
                    f"{family} of {uri} was measured on other rows than of {uris[0]}",
                    expected=mine,
                    got=theirs,
                    fix="Evaluate both with the same --rows",
                )


def name_of(evaluation: Evaluation) -> str:
    """Name a dataset for people: its address and the beginning of its plan's fingerprint."""
    plan = f"plan {evaluation.plan_fingerprint[:12]}"
    return plan if evaluation.root is None else f"{evaluation.root} ({plan})"


def tabulate_several(evaluations: Sequence[Evaluation]) -> list[list[str]]:
    """Make the table of several evaluations: a line per definition, a column per SAE."""
    ids = list(dict.fromkeys(row[0] for evaluation in evaluations for row in tabulate(evaluation)))

    def cell(evaluation: Evaluation, id: str) -> str:
        figure = evaluation.figure(id)
        return " ".join(
            part for part in (_show_value(figure), _show_interval(figure) if figure else "") if part
        )

    return [[id, *(cell(evaluation, id) for evaluation in evaluations)] for id in ids]


def require_evaluation(uri: str) -> Evaluation:
    """Load the evaluation in the folder of an SAE, or in one that was named with `--out`.

    Raises:
        NoSae: There is none, and no SAE either.
        ConfigError: The SAE has none yet.
        IntegrityError, UnsupportedVersion: It cannot be read.
    """
    store = open_store(uri)
    evaluation = load_evaluation(store)
    if evaluation is None:
        require_some_sae(store, uri)
        raise ConfigError(
            f"{uri} has no {EVALUATION_KEY}",
            expected="an evaluated SAE",
            got="none",
            fix=f"Run `winnow evaluate {uri}` first",
        )
    return evaluation
