"""What `winnow info` and `winnow plan` say of a dataset."""

from __future__ import annotations

from winnow.store.check.info import hook_rows


def test_layers_of_one_site_and_width_are_one_range() -> None:
    widths = {f"mlp_in.{layer}": 8 for layer in range(3)} | {f"mlp_out.{layer}": 8 for layer in range(2)}
    assert hook_rows(widths) == [("hooks", "mlp_in.0-2, mlp_out.0-1 (D = 8)")]
    assert hook_rows(widths | {"model.norm": 4}) == [
        ("hooks", "mlp_in.0-2, mlp_out.0-1 (D = 8)"),
        ("", "model.norm (D = 4)"),
    ]
