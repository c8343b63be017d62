"""Checks that an SAE fits what it is used with: a dataset, another SAE, a subject; one error, one wording."""

from __future__ import annotations

from collections.abc import Sequence

from winnow.schemas.derived import DeriveRule, same_kind, words_of
from winnow.schemas.errors import SaeMismatch
from winnow.schemas.harvest import HarvestPlan, row_bytes
from winnow.schemas.joined import JoinedPlan
from winnow.schemas.sets import SetCard
from winnow.schemas.subject import SubjectIdentity, parse_hook, reads_stream
from winnow.schemas.training import SaeCard, SaeIdentity
from winnow.schemas.window import WindowRule

TRAINED_ON = "Give the dataset that it was trained on, or one of the same subject and hook"


def mismatch(
    what: str, name: object, *, expected: object, of: str, got: object, fix: str | None = None
) -> SaeMismatch:
    """Make the error `the WHAT of NAME: expected EXPECTED (OF's), got GOT. FIX.`.

    Args:
        what: What does not fit.
        name: The SAE, as the user named it.
        expected: What would fit.
        of: What the SAE should fit: `the dataset`, or another SAE's name.
        got: What was found.
        fix: What the reader can do about it.
    """
    return SaeMismatch(f"the {what} of {name}", expected=f"{expected} ({of}'s)", got=got, fix=fix)


def check_dataset(name: str, card: SaeCard, plan: HarvestPlan, *, targets: bool = False) -> None:
    """Check that a dataset contains the rows that an SAE reads.

    Args:
        name: The SAE, as the user named it.
        card: The SAE's card.
        plan: The dataset's plan.
        targets: Also check those that a transcoder predicts.

    Raises:
        SaeMismatch: The SAE reads a hook that the dataset lacks, or of another width or subject, or was
            trained on rows that were made otherwise (`winnow derive`).
    """
    for hook, held_width in zip(card.input_hooks, card.parts.widths or (card.d_model,), strict=True):
        if hook not in plan.spec.hooks:
            held = f"one of {', '.join(plan.spec.hooks)}"
            raise mismatch("hook", name, expected=held, of="the dataset", got=hook, fix=TRAINED_ON)
        # After the hook: a plan has no width at a hook that it lacks, and would raise a less helpful error.
        width = plan.d_model(hook)
        if held_width != width:
            raise mismatch("width D", name, expected=width, of="the dataset", got=held_width, fix=TRAINED_ON)
    if targets and card.target_hooks:
        _check_targets(name, card, plan)
    _check_identity(name, card.identity, plan)


def check_set(name: str, card: SetCard, width: int, plan: HarvestPlan) -> None:
    """Check that a dataset contains the rows that the layers of a transcoder set read and predict.

    Args:
        name: The set, as the user named it.
        card: The set's card.
        width: Its width D.
        plan: The dataset's plan.

    Raises:
        SaeMismatch: The dataset is of another subject, or lacks a hook, or has another width there.
    """
    check_reads(name, card, plan, targets=True)
    for hook in card.of.hooks:
        if plan.d_model(hook) != width:
            what, expected = f"width D at {hook}", plan.d_model(hook)
            raise mismatch(what, name, expected=expected, of="the dataset", got=width, fix=TRAINED_ON)


def check_reads(name: str, card: SetCard, plan: HarvestPlan, *, targets: bool = False) -> None:
    """Check that a dataset holds the hooks that the layers of a set read; with `targets`, also the others.

    Raises:
        SaeMismatch: The dataset is of another subject, or lacks a hook.
    """
    # The subject first: another one has other layers, and the hooks would be named as missing.
    _check_identity(name, card.identity, plan)
    reads = [card.of.read_hook(layer) for layer in card.of.range]
    require_hooks(name, card.of.hooks if targets else reads, plan)


def _check_identity(name: str, identity: SaeIdentity | None, plan: HarvestPlan) -> None:
    """Check that what was trained on another dataset has the subject of this one."""
    # By the digest of the weights, not by name: a folder that has moved is the same subject, and imported
    # SAEs have no identity to compare.
    planned = plan.subject
    if identity and identity.subject_weights_sha256 != planned.weights_sha256:
        raise mismatch(
            "subject",
            name,
            expected=_subject(planned.model, planned.weights_sha256),
            of="the dataset",
            got=_subject_of(identity),
            fix=TRAINED_ON,
        )
    _check_kind(name, identity, plan)


def _check_kind(name: str, identity: SaeIdentity | None, plan: HarvestPlan) -> None:
    """Check that a dataset's rows are activations, means or differences, as those of the training were."""
    # The same plan first: cards of before do not say how rows were made.
    if identity is None or identity.plan_fingerprint == plan.fingerprint:
        return
    if isinstance(plan, JoinedPlan):
        for part in plan.parts.keys() & identity.roots.keys():
            _check_kind(f"{name}, of {part}", identity.roots[part], plan.parts[part])
        return
    planned = () if plan.derived is None else plan.derived.rules
    if not same_kind(identity.derived, planned):
        got = _made(identity.derived)
        raise mismatch("rows", name, expected=_made(planned), of="the dataset", got=got, fix=TRAINED_ON)


def require_own_rows(name: str, identity: SaeIdentity | None) -> None:
    """Check that what was trained reads rows that a subject itself gives, before it is run on one.

    Raises:
        SaeMismatch: It was trained on means of rows, or on differences.
    """
    for one in () if identity is None else (identity, *identity.roots.values()):
        if any(rule.remakes for rule in one.derived):
            raise mismatch(
                "rows", name, expected=_made(()), of="the subject", got=_made(one.derived),
                fix="Evaluate and index it on the dataset that it was trained on, which holds such rows",
            )  # fmt: skip


def _made(rules: Sequence[DeriveRule]) -> str:
    """What rows are that were made by these rules."""
    remade = [rule for rule in rules if rule.remakes]
    return f"rows {words_of(remade)}" if remade else "the subject's own rows"


def other_windows(name: str, card: SaeCard | SetCard, plan: HarvestPlan) -> str | None:
    """Return a warning if an SAE was trained on windows that begin differently from a dataset's, or None."""
    # A warning only: the SAE still reads rows of its hook, and older cards do not record how windows began.
    here = WindowRule.of(plan)
    if card.window is None or card.window.bos == here.bos:
        return None
    return (
        f"{name} was trained on a dataset in which {card.window.words}; in this one {here.words}: its "
        "activations differ"
    )


def _check_targets(name: str, card: SaeCard, plan: HarvestPlan) -> None:
    """Check that a dataset holds the rows of a transcoder's targets, in their widths."""
    require_hooks(name, (card.hook, *card.target_hooks), plan)
    widths = card.parts.target_widths or (card.parts.d_out,)
    for hook, width in zip(card.target_hooks, widths, strict=True):
        if width != plan.d_model(hook):
            raise mismatch(
                f"width of target {hook}",
                name,
                expected=plan.d_model(hook),
                of="the dataset",
                got=width,
                fix=TRAINED_ON,
            )


def require_hooks(name: str, hooks: Sequence[str], plan: HarvestPlan, *, instead: str = "") -> None:
    """Check that a dataset holds all hooks that something reads.

    Args:
        name: What reads them, as the user named it.
        hooks: The hooks.
        plan: The dataset's plan.
        instead: What helps without another harvest: a sentence and a space, or empty.

    Raises:
        SaeMismatch: Some are missing; the message says what to harvest, and the bytes that it would take for
            this plan's rows.
    """
    missing = [hook for hook in hooks if hook not in plan.spec.hooks]
    if not missing:
        return
    size = harvest_bytes(plan, hooks)
    takes = (
        "" if size is None else f": {size:,} bytes as {plan.spec.dtype} for this plan's {plan.rows:,} rows"
    )
    raise mismatch(
        "hooks",
        name,
        expected=f"hooks among {', '.join(ranges(plan.spec.hooks))}",
        of="the dataset",
        got=f"also {', '.join(ranges(missing))}",
        fix=f"{instead}Harvest into another root with plan.hooks = [{', '.join(ranges(hooks))}]{takes}",
    )


def harvest_bytes(plan: HarvestPlan, hooks: Sequence[str]) -> int | None:
    """Bytes of the rows of `hooks` for all of a plan's rows, uncompressed; None if a width is not known."""
    widths = {site.name: site.d_model for site in plan.sites}
    stream = next((width for hook, width in widths.items() if reads_stream(hook)), None)
    found = [widths.get(hook, stream if reads_stream(hook) else None) for hook in dict.fromkeys(hooks)]
    known = [width for width in found if width is not None]
    if len(known) < len(found):
        return None
    return sum(plan.rows * row_bytes(plan.spec.dtype, width) for width in known)


def ranges(hooks: Sequence[str]) -> list[str]:
    """Hooks as a plan may name them, neighbouring layers of a site as one: `mlp_in.0-5`."""
    runs: list[list[tuple[str, int]]] = []
    rest = [hook for hook in dict.fromkeys(hooks) if parse_hook(hook) is None]
    for site, layer in sorted(named for hook in dict.fromkeys(hooks) if (named := parse_hook(hook))):
        if runs and runs[-1][-1] == (site, layer - 1):
            runs[-1].append((site, layer))
        else:
            runs.append([(site, layer)])
    listed = [f"{run[0][0]}.{run[0][1]}" + (f"-{run[-1][1]}" if len(run) > 1 else "") for run in runs]
    return listed + rest


def check_same_place(name: str, card: SaeCard, other: str, reference: SaeCard) -> None:
    """Check that two SAEs read and predict the same hooks of the same subject, as far as both cards say.

    Raises:
        SaeMismatch: A hook, the width or the subject differs from that of `other`, whose card is `reference`.
    """
    if card.hook != reference.hook:
        raise mismatch("hook", name, expected=reference.hook, of=other, got=card.hook)
    if card.d_model != reference.d_model:
        raise mismatch("width D", name, expected=reference.d_model, of=other, got=card.d_model)
    if card.target_hooks != reference.target_hooks:
        mine, theirs = (", ".join(one.target_hooks) or "none" for one in (card, reference))
        raise mismatch("targets", name, expected=theirs, of=other, got=mine)
    # An imported SAE has no identity: its subject cannot be compared, and it is not refused for that.
    mine, theirs = card.identity, reference.identity
    if mine and theirs and mine.subject_weights_sha256 != theirs.subject_weights_sha256:
        raise mismatch("subject", name, expected=_subject_of(theirs), of=other, got=_subject_of(mine))
    if mine and theirs and not same_kind(mine.derived, theirs.derived):
        raise mismatch("rows", name, expected=_made(theirs.derived), of=other, got=_made(mine.derived))


def check_subject(found: SubjectIdentity, planned: SubjectIdentity) -> None:
    """Check that a loaded subject is the one that a dataset was harvested from.

    Raises:
        SaeMismatch: Its weights differ.
    """
    if found.weights_sha256 != planned.weights_sha256:
        raise mismatch(
            "weights",
            f"subject {found.model!r}",
            expected=planned.weights_sha256,
            of="the dataset",
            got=found.weights_sha256,
            fix="Set subject.model and subject.revision to what the dataset was harvested from",
        )


def check_one_subject(names: list[str], subjects: list[SubjectIdentity]) -> None:
    """Check that several SAEs have the same subject as the first.

    Raises:
        SaeMismatch: One has another subject.
    """
    for name, subject in zip(names, subjects, strict=True):
        if subject.weights_sha256 != subjects[0].weights_sha256:
            raise mismatch(
                "subject",
                name,
                expected=_subject(subjects[0].model, subjects[0].weights_sha256),
                of=names[0],
                got=_subject(subject.model, subject.weights_sha256),
                fix="Use SAEs of one subject at a time",
            )


def _subject(model: str, weights_sha256: str) -> str:
    return f"{model} with weights {weights_sha256}"


def _subject_of(identity: SaeIdentity) -> str:
    return _subject(identity.subject_model, identity.subject_weights_sha256)
