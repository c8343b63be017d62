"""docs/evaluation.md defines every figure and every family, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from winnow.evaluator.report import DEPENDS, MEASURES
from winnow.schemas.evaluation import FAMILIES, EvaluateSpec

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
SOURCES = "\n".join(
    path.read_text(encoding="utf-8")
    for path in (ROOT / "evaluator").rglob("*.py")
    if path.parent.name != "recovery"
)


def test_every_id_in_the_tables_is_measured_and_every_measured_one_is_defined():
    defined = {
        id
        for line in TEXT.splitlines()
        if line.startswith("| `")
        for id in re.findall(r"`([a-z0-9_]+)`", line.split("|")[1])
    }
    made = set(re.findall(r'(?:mean_figure|figure)\(\s*"([a-z0-9_]+)"', SOURCES))
    made |= set(re.findall(r'\bid="([a-z0-9_]+)"', SOURCES))
    made |= {"fvu_normalised", "fvu_raw", "loss_recovered_zero", "loss_recovered_mean"}
    made |= {"compute_equivalent", "compute_equivalent_anchored"}
    made |= {"probe_loss_mean", "probe_loss_max", "probe_loss_bag_of_words"}
    assert made <= defined
    assert all(id in SOURCES or id.startswith("loss_recovered_") for id in defined)


def test_every_family_has_a_section_and_its_settings_exist():
    sections = re.findall(r"^## (\w+)$", TEXT, re.MULTILINE)
    assert sections == list(FAMILIES) == [name for name in FAMILIES if name in DEPENDS]
    assert set(MEASURES) | {"compute"} == set(FAMILIES)
    for fields in DEPENDS.values():
        assert set(fields) <= set(EvaluateSpec.model_fields)
