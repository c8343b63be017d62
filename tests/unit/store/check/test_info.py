"""What `winnow info` and `winnow plan` say of a dataset."""

from __future__ import annotations

from winnow.schemas.labels import ROLES, PlannedLabels
from winnow.store.check.info import hook_rows, label_rows


def test_layers_of_one_site_and_width_are_one_range() -> None:
    widths = {f"mlp_in.{layer}": 8 for layer in range(3)} | {f"mlp_out.{layer}": 8 for layer in range(2)}
    assert hook_rows(widths) == [("hooks", "mlp_in.0-2, mlp_out.0-1 (D = 8)")]
    assert hook_rows(widths | {"model.norm": 4}) == [
        ("hooks", "mlp_in.0-2, mlp_out.0-1 (D = 8)"),
        ("", "model.norm (D = 4)"),
    ]


def test_tokens_are_counted_beside_the_source_and_the_turn_that_they_are_of() -> None:
    labels = PlannedLabels(
        roles=ROLES,
        tokens_by_role=(7,) + (0,) * (len(ROLES) - 1),
        tokens_by_source=(4000, 3),
        tokens_by_turn=(5, 2),
        special=1,
        sha256="0" * 64,
    )
    assert label_rows(labels, ["a.jsonl", "b.jsonl"])[1:] == [
        ("tokens by source", "a.jsonl 4,000"),
        ("", "b.jsonl 3"),
        ("tokens by turn", "turn 0: 5, turn 1: 2"),
    ]
