"""N-grams of an evaluation as sentences."""

from __future__ import annotations

from winnow.explorer.site.explained import from_evaluation
from winnow.schemas.evaluation import Evaluation

ENTRY = {
    "latent": 3,
    "precision": 0.75,
    "patterns": [
        {"tokens": [" rare"], "value": 1.0, "examples": 1},
        {"tokens": [" am", None, " not"], "value": 0.5, "examples": 9},
    ],
}


def evaluation(entries, judged=()) -> Evaluation:
    family = {
        "settings_sha256": "0" * 64,
        "figures": (),
        "details": {"latents": entries},
        "seconds": 1.0,
        "finished": "now",
    }
    families = {"n2g": family, "judge": family | {"details": {"latents": list(judged)}}}
    return Evaluation.model_validate(
        {
            "sae": "x", "sae_sha256": "0" * 64, "plan_fingerprint": "0" * 64, "dataset_sha256": None,
            "subject_model": "m", "subject_weights_sha256": "0" * 64, "hook": "resid_post.1", "latents": 8,
            "k": 2, "trained_on_this": True, "families": families,
        }
    )  # fmt: skip


def test_the_most_frequent_n_grams_come_first():
    (found,) = from_evaluation(evaluation([ENTRY]))
    assert found.latent == 3
    assert found.text == "fires at the end of “ am… not” or “ rare”"
    assert found.score == 0.75


def test_entries_of_another_form_are_left_out():
    broken = [{"latent": 1}, 7, ENTRY | {"latent": 8}, ENTRY | {"latent": -1}, ENTRY | {"precision": None}]
    (found,) = from_evaluation(evaluation(broken))
    assert (found.latent, found.score) == (3, None)
    assert from_evaluation(evaluation([])) == []


def test_a_judges_sentence_stands_beside_the_n_grams():
    judged = [
        {"latent": 3, "text": "old verbs", "detection": 0.8126, "fuzzing": None},
        {"latent": 4, "text": "never quizzed", "detection": None, "fuzzing": None},
        {"latent": 5},
    ]
    first, second, third = from_evaluation(evaluation([ENTRY], judged))
    assert (first.latent, first.text, first.source, first.score) == (
        3,
        "old verbs",
        "judge, detection",
        0.813,
    )
    assert (second.latent, second.score) == (4, None)
    assert third.source == "n2g, precision"
