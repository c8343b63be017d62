"""Whether an SAE fits: every kind of misfit is refused in the same form of words."""

from __future__ import annotations

from typing import Any

import pytest

from winnow.schemas.base import sha256_hex
from winnow.schemas.derived import Derivation, DeriveRule
from winnow.schemas.errors import SaeMismatch
from winnow.schemas.fit import (
    check_dataset,
    check_one_subject,
    check_same_place,
    check_subject,
    other_windows,
)
from winnow.schemas.training import SaeCard, SaeIdentity, SaeParts
from winnow.schemas.window import WindowRule
from winnow.store.testing import make_plan

PLAN = make_plan(2, hooks={"resid_post.1": 8, "mlp_out.0": 4})
OTHER = sha256_hex(b"another subject")
FORM = r"^the {what} of {name}: expected .*{expected} \({of}'s\), got .*{got}.*\."


def card(**fields: Any) -> SaeCard:
    base = {"d_model": 8, "latents": 16, "k": 2, "hook": "resid_post.1", "normalize": "none"}
    base |= {"weights": "raw", "weights_sha256": sha256_hex(b"an sae"), "identity": identity()}
    return SaeCard.model_validate(base | fields)


def identity(weights_sha256: str = PLAN.subject.weights_sha256) -> SaeIdentity:
    return SaeIdentity(
        plan_fingerprint=PLAN.fingerprint,
        dataset_sha256=None,
        subject_model="a/model",
        subject_weights_sha256=weights_sha256,
    )


MISFITS = [
    ({"hook": "resid_post.0"}, "hook", "resid_post.1, mlp_out.0", "resid_post.0"),
    ({"hook": "unknown"}, "hook", "resid_post.1, mlp_out.0", "unknown"),
    ({"d_model": 4}, "width D", "8", "4"),
    ({"identity": identity(OTHER)}, "subject", PLAN.subject.weights_sha256, OTHER),
]


@pytest.mark.parametrize(("fields", "what", "expected", "got"), MISFITS, ids=lambda value: str(value)[:20])
def test_a_dataset_that_does_not_fit(fields, what, expected, got):
    form = FORM.format(what=what, name="runs/a", of="the dataset", expected=expected, got=got)
    with pytest.raises(SaeMismatch, match=form):
        check_dataset("runs/a", card(**fields), PLAN)


@pytest.mark.parametrize("fields", [{}, {"identity": None}, {"hook": "mlp_out.0", "d_model": 4}])
def test_a_dataset_that_fits(fields):
    check_dataset("runs/a", card(**fields), PLAN)


def test_a_crosscoder_fits_if_the_dataset_holds_all_its_hooks():
    check_dataset("runs/a", card(with_hooks=("mlp_out.0",), d_model=12, parts=SaeParts(widths=(8, 4))), PLAN)
    wrong = card(with_hooks=("mlp_out.1",), d_model=12, parts=SaeParts(widths=(8, 4)))
    with pytest.raises(SaeMismatch, match=r"the hook of runs/a: .* got mlp_out.1"):
        check_dataset("runs/a", wrong, PLAN)


def rule(**fields: Any) -> DeriveRule:
    return DeriveRule.model_validate(fields)


@pytest.mark.parametrize(
    ("mine", "fits"),
    [
        ((), False),
        ((rule(minus=OTHER, minus_subject=OTHER),), True),
        ((rule(minus=PLAN.fingerprint, minus_subject=OTHER), rule(rows={"special": False})), True),
        ((rule(minus=OTHER, minus_subject=PLAN.fingerprint),), False),
        ((rule(minus=OTHER, minus_subject=OTHER, mean="turn"),), False),
    ],
)
def test_means_and_differences_fit_only_their_like(mine: tuple[DeriveRule, ...], fits: bool):
    """Whatever the corpus, and whichever rows were chosen."""
    made = Derivation(parent=OTHER, rule=rule(minus=OTHER, minus_subject=OTHER), left_out=0)
    plan = PLAN.model_copy(update={"derived": made})
    plan.__dict__.pop("fingerprint", None)
    known = card(identity=identity().model_copy(update={"derived": mine}))
    if fits:
        check_dataset("runs/a", known, plan)
    else:
        with pytest.raises(SaeMismatch, match="the rows of runs/a: expected rows minus"):
            check_dataset("runs/a", known, plan)
    reference = card(identity=identity().model_copy(update={"derived": made.rules}))
    if fits:
        check_same_place("runs/a", known, "runs/b", reference)
    else:
        with pytest.raises(SaeMismatch, match="the rows of runs/a"):
            check_same_place("runs/a", known, "runs/b", reference)


def transcoder(target: str = "mlp_out.0", width: int = 4) -> SaeCard:
    return card(target_hook=target, parts=SaeParts(d_out=width, target_normalize="none"))


def test_a_transcoder_fits_if_the_dataset_holds_its_target_too():
    check_dataset("runs/a", transcoder(), PLAN, targets=True)
    form = r"the width of target mlp_out.0 of runs/a: expected 4 \(the dataset's\), got 8"
    with pytest.raises(SaeMismatch, match=form):
        check_dataset("runs/a", transcoder(width=8), PLAN, targets=True)
    missing = transcoder("mlp_out.1")
    check_dataset("runs/a", missing, PLAN)  # its codes need only what it reads
    size = f"{2 * PLAN.rows * 8 * 2:,} bytes as bfloat16"
    with pytest.raises(
        SaeMismatch, match=rf"got also mlp_out.1\. Harvest .*= \[mlp_out.1, resid_post.1\]: {size}"
    ):
        check_dataset("runs/a", missing, PLAN, targets=True)


@pytest.mark.parametrize(
    ("fields", "what", "expected", "got"),
    [
        ({"hook": "resid_post.0"}, "hook", "resid_post.1", "resid_post.0"),
        ({"d_model": 4}, "width D", "8", "4"),
        ({"identity": identity(OTHER)}, "subject", PLAN.subject.weights_sha256, OTHER),
    ],
    ids=["hook", "width", "subject"],
)
def test_two_saes_that_do_not_read_the_same_place(fields, what, expected, got):
    form = FORM.format(what=what, name="runs/b", of="runs/a", expected=expected, got=got)
    with pytest.raises(SaeMismatch, match=form):
        check_same_place("runs/b", card(**fields), "runs/a", card())
    check_same_place("runs/b", card(identity=None), "runs/a", card())
    with pytest.raises(
        SaeMismatch, match=r"the targets of runs/b: expected none \(runs/a's\), got mlp_out.0"
    ):
        check_same_place("runs/b", transcoder(), "runs/a", card())


def test_another_subject_than_the_datasets_and_saes_of_two_subjects():
    planned = PLAN.subject
    found = planned.model_copy(update={"weights_sha256": OTHER})
    names = {"expected": planned.weights_sha256, "got": OTHER}
    form = FORM.format(what="weights", name=f"subject '{planned.model}'", of="the dataset", **names)
    with pytest.raises(SaeMismatch, match=form):
        check_subject(found, planned)
    form = FORM.format(what="subject", name="runs/b", of="runs/a", **names)
    with pytest.raises(SaeMismatch, match=form):
        check_one_subject(["runs/a", "runs/b"], [planned, found])
    check_subject(planned, planned)
    check_one_subject(["runs/a", "runs/b"], [planned, planned])


def test_windows_that_begin_otherwise_are_a_warning():
    here = WindowRule.of(PLAN)
    other = WindowRule(bos=not here.bos)
    assert other_windows("runs/a", card(), PLAN) is None
    assert other_windows("runs/a", card(window=here), PLAN) is None
    warning = other_windows("runs/a", card(window=other), PLAN)
    assert warning is not None
    assert f"runs/a was trained on a dataset in which {other.words}; in this one {here.words}" in warning
