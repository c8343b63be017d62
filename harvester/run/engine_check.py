"""Compares the rows of another engine with those of transformers, of every n-th unit before it commits."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from winnow.schemas.errors import ConfigError
from winnow.schemas.subject import SubjectSpec
from winnow.subject.engine import deviation
from winnow.subject.load import Subject

# Of 252 rows of SmolLM2-135M up to layer 9, transformers' own eager and sdpa attention move the farthest by
# 0.09 in bfloat16 and by 5e-6 in float32; a unit has more rows, and an engine more kernels of its own.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 0.25}
"""dtype that the subject runs in -> what `subject.engine_tolerance: null` means."""
# In bfloat16 single rows are rounded as far as a wrong read moves all of them. Of 2,048 rows of SmolLM2-135M,
# eager and sdpa attention differ by 0.11 at most and by 0.015 in the median; the stream without its layer's
# MLP, as of an engine that keeps the two apart, by 0.35 at least and 0.16, and in deeper models by less.
_MEDIAN = 0.2
"""Share of the tolerance within which half of a pass's rows must be."""


class EngineCheck:
    """The comparison of one worker's units.

    Args:
        subject: The subject in transformers.
        spec: Its `engine`, `engine_check_every` and `engine_tolerance` are read.
        first: First position whose row is stored; earlier ones are not compared.

    Attributes:
        farthest: Largest relative difference seen in the unit at hand; None if it is not compared.
    """

    def __init__(self, subject: Subject, spec: SubjectSpec, first: int) -> None:
        self._subject, self._spec, self._first = subject, spec, first
        self.tolerance = spec.engine_tolerance or TOLERANCES[subject.dtype]
        self._passed = 0
        self.farthest: float | None = None

    def begin(self) -> None:
        """Begin a unit, or begin it again."""
        # By what this worker has done, not by the unit's number: each worker has an engine of its own. Only
        # units that passed count, so that after a difference the next one is compared too.
        self.farthest = 0.0 if self._passed % self._spec.engine_check_every == 0 else None

    def end(self) -> None:
        """Note that the unit's rows are complete."""
        self._passed += 1

    def compare(
        self, unit: int, first_window: int, tokens: NDArray[np.uint32], found: dict[str, torch.Tensor]
    ) -> None:
        """Compare one pass of a unit, if the unit is due.

        Args:
            unit: The unit.
            first_window: Number in the unit of the pass's first window.
            tokens: The pass's token ids [W, T].
            found: hook -> the engine's activations [W, T, D].

        Raises:
            ConfigError: A row differs by more than the tolerance, or half of them by more than a fifth of it;
                names unit, hook and place.
        """
        if self.farthest is None:
            return
        reference = self._subject.activations(tokens, list(found))
        for hook, rows in found.items():
            worst = deviation(rows[:, self._first :], reference[hook][:, self._first :])
            self.farthest = max(self.farthest, worst.relative)
            half = self.tolerance * _MEDIAN
            if worst.relative <= self.tolerance and worst.median <= half:
                continue
            window, position = first_window + worst.window, self._first + worst.position
            raise ConfigError(
                f"unit {unit}, hook {hook}: {self._spec.engine} gives other rows than transformers, the "
                f"farthest at window {window} of the unit, position {position}",
                expected=f"at most {self.tolerance:g} of the row's norm apart, and {half:g} half of the rows",
                got=f"{worst.relative:.3g}, the largest difference of one number {worst.absolute:.3g}, and "
                f"{worst.median:.3g}",
                fix="Set subject.engine to transformers and name another root; raise "
                "subject.engine_tolerance only if the difference is rounding",
            )
