"""The step of a transcoder set: every layer's, one after the other, or all joined for a cross-layer one.

Legend: B rows of this rank, D width of the residual stream, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from winnow.schemas.layers import SetSpec
from winnow.trainer.mesh.world import World
from winnow.trainer.step.cross_train import train_cross
from winnow.trainer.step.recipe import Recipe
from winnow.trainer.step.report import StepReport
from winnow.trainer.step.state import Counts, Run
from winnow.trainer.step.train import train_step


class SetRun:
    """The runs of a set's layers, which take their steps together.

    Args:
        recipe: Of the whole set; a layer's own names its hooks.
        layers: Layer -> its run, in ascending order.
    """

    def __init__(self, recipe: Recipe, layers: Mapping[int, Run]) -> None:
        self.recipe, self.layers = recipe, dict(layers)
        self._first = next(iter(self.layers.values()))

    @property
    def of(self) -> SetSpec:
        """Layers and hooks."""
        assert self.recipe.spec.set is not None
        return self.recipe.spec.set

    @property
    def parts(self) -> dict[str, Run]:
        """Prefix of the names in a checkpoint -> the run of a layer."""
        return {f"layer.{layer}.": run for layer, run in self.layers.items()}

    @property
    def counts(self) -> Counts:
        """The first layer's: steps, rows and seconds are the same for all."""
        return self._first.counts

    @property
    def latents(self) -> int:
        """Latents of all layers together."""
        return len(self.layers) * self.recipe.spec.latents

    @property
    def world(self) -> World:
        """The mesh."""
        return self._first.world

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._first.device

    @property
    def batches(self) -> bool:
        """Whether rows are selected together."""
        return self._first.batches


@dataclass(frozen=True)
class SetReport:
    """The results of one step of a set; figures are means over its layers unless they say otherwise."""

    layers: dict[int, StepReport]
    cross: bool

    @property
    def _first(self) -> StepReport:
        return next(iter(self.layers.values()))

    @property
    def loss(self) -> float:
        """Mean loss of a layer."""
        return sum(report.loss for report in self.layers.values()) / len(self.layers)

    @property
    def auxk(self) -> float:
        """Mean AuxK term of a layer."""
        return sum(report.auxk for report in self.layers.values()) / len(self.layers)

    @property
    def grad_norm(self) -> float:
        """Joint norm of all layers' gradients, before clipping."""
        # of a cross-layer step each report has the joint norm already
        if self.cross:
            return self._first.grad_norm
        return sum(report.grad_norm**2 for report in self.layers.values()) ** 0.5

    @property
    def lr(self) -> float:
        """The learning rate of all layers."""
        return self._first.lr

    @property
    def dead(self) -> int:
        """Dead latents of all layers together, at the start of the step."""
        return sum(report.dead for report in self.layers.values())

    @cached_property
    def fvu_of(self) -> dict[int, float]:
        """Layer -> FVU of its target in the whole batch; on a mesh, collectives."""
        return {layer: report.fvu for layer, report in self.layers.items()}

    @property
    def fvu(self) -> float:
        """Mean FVU of a layer's target."""
        return sum(self.fvu_of.values()) / len(self.fvu_of)

    @property
    def l0(self) -> float:
        """Active latents per row and layer."""
        return sum(report.l0 for report in self.layers.values()) / len(self.layers)

    @property
    def second_rounds(self) -> int:
        """Rows whose selection took a second round, of all layers."""
        return sum(report.second_rounds for report in self.layers.values())

    @property
    def rows(self) -> int:
        """Rows of weight above 0 in the whole batch."""
        return self._first.rows


def train_set(run: SetRun, rows: Mapping[str, Tensor], weights: Tensor) -> SetReport | None:
    """Train every layer on one batch.

    Args:
        run: The state, changed in place.
        rows: Hook -> raw rows [B, D], of every hook of the set.
        weights: [B]; rows of weight 0 take part in nothing.

    Returns:
        None if every row has weight 0.

    Raises:
        NonFiniteError: Loss or gradient of a layer is NaN or infinite. Of a per-layer set the layers before
            it have taken the step: the set goes back to its last checkpoint as a whole.
    """
    inputs = [rows[run.of.read_hook(layer)] for layer in run.layers]
    targets = [rows[run.of.target_hooks(layer)[0]] for layer in run.layers]
    runs = list(run.layers.values())
    if run.of.cross:
        reports = train_cross(runs, inputs, targets, weights)
    else:
        parts = zip(runs, inputs, targets, strict=True)
        found = [train_step(one, x, weights, y) for one, x, y in parts]
        reports = [report for report in found if report is not None]
    return SetReport(dict(zip(run.layers, reports, strict=True)), run.of.cross) if reports else None
