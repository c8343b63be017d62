"""Family `compute`: the share of the subject's training compute at which the patched loss is reached.

The law of the subject's family, L(C) = floor + (C / scale)^-power, comes from the config; none is assumed.
Two figures, both printed with the law: `compute_equivalent` inverts the patched loss itself, L^-1(patched)
over the subject's compute; `compute_equivalent_anchored` adds delta CE to the loss that the law gives the
subject at its own compute, so that a law fitted on other text remains usable (Gao et al. 2024, section 4.1).
"""

from __future__ import annotations

from collections.abc import Sequence

from winnow.evaluator.setting import Measured
from winnow.schemas.errors import ConfigError
from winnow.schemas.evaluation import ComputeLaw, Figure

_DOUBT_NATS = 0.1
"""If the law misses the subject's own clean loss by more than this, a note says so: it was then fitted on
other text, or is another family's."""


def law_loss(law: ComputeLaw, flop: float) -> float:
    """Compute L(C) in nats per token."""
    return law.floor + (flop / law.scale) ** -law.power


def law_compute(law: ComputeLaw, loss: float) -> float | None:
    """Compute L^-1, the FLOP at which the family has `loss`; None at or below the irreducible loss."""
    reducible = loss - law.floor
    return None if reducible <= 0 else law.scale * reducible ** (-1 / law.power)


def describe(law: ComputeLaw) -> str:
    """Describe the law for the reader of its figures."""
    return (
        f"law used: L(C) = {law.floor:g} + (C / {law.scale:g})^-{law.power:g} nats, the subject trained with "
        f"{law.training_flop:g} FLOP; {law.source}"
    )


def _share(law: ComputeLaw, loss: float | None) -> float | None:
    flop = None if loss is None else law_compute(law, loss)
    return None if flop is None else flop / law.training_flop


def measure(law: ComputeLaw | None, downstream: Sequence[Figure]) -> Measured:
    """Compute both figures from those of family `downstream` and their intervals.

    Raises:
        ConfigError: There is no law.
    """
    if law is None:
        raise ConfigError(
            "evaluate.law",
            expected="the scaling law of the subject's family (floor, scale, power, training_flop, source)",
            got="none",
            fix="Set it in the config, or leave `compute` out of the metrics: no law is guessed",
        )
    found = {figure.id: figure for figure in downstream}
    own = law_loss(law, law.training_flop)
    figures: list[Figure] = []
    for id, source, base in (
        ("compute_equivalent", found["ce_patched"], 0.0),
        ("compute_equivalent_anchored", found["delta_ce"], own),
    ):
        # The ends change places: more loss is less compute. L^-1 is monotonous, so the transformed ends are
        # the interval of the transformed figure, without a bootstrap of its own.
        low, value, high = (
            _share(law, None if edge is None else edge + base)
            for edge in (source.high, source.value, source.low)
        )
        note = source.note
        if value is None and source.value is not None:
            note = "the loss is at or below the law's irreducible loss"
        figures.append(
            Figure(
                id=id, value=value, low=low, high=high, samples=source.samples, unit=source.unit, note=note
            )
        )
    notes = [describe(law)]
    clean = found["ce_clean"].value
    if clean is not None and abs(clean - own) > _DOUBT_NATS:
        notes.append(
            f"the law gives the subject {own:.3f} nats where it has {clean:.3f} on these windows: read the "
            "anchored figure"
        )
    return Measured(figures, {"law_loss_of_subject": own}, tuple(notes))
