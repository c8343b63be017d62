"""One step of a cross-layer transcoder: all layers of a set take it together, on the same rows.

Legend: B rows of this rank, D width of a layer, L layers, n latents of this shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from winnow.sae.model import Sae
from winnow.trainer.step import cross, cross_spec
from winnow.trainer.step.context import StepContext, Taken
from winnow.trainer.step.losses import Rows
from winnow.trainer.step.optim import lr_at
from winnow.trainer.step.report import StepReport, Tally
from winnow.trainer.step.state import Run
from winnow.trainer.step.train import count, group_sizes, report_of, require_finite, update, update_early
from winnow.trainer.step.widen import widened

Step = cross.CrossStep | cross_spec.CrossSpecStep


def train_cross(
    runs: Sequence[Run], inputs: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor
) -> list[StepReport] | None:
    """Train on one batch; see `winnow.trainer.step.train.train_step`.

    Args:
        runs: One per layer, ascending, all of one spec; changed in place. Layer l's SAE has the targets of
            layers l to the last, and only the bias of its own.
        inputs: Raw rows [B, D] that each layer reads.
        targets: Raw rows [B, D] of each layer's own target.
        weights: [B]; rows of weight 0 take part in nothing, whatever they hold.

    Returns:
        A report per layer, of its own target and codes; losses add up to the whole, the gradient's norm is
        that of all layers. None if every row has weight 0: nothing but the step number changes.

    Raises:
        NonFiniteError: The loss or the gradient is NaN or infinite; all weights are left as they were.
    """
    for run in runs:
        # before the step, whose rows belong to the last epoch
        if run.counts.step == run.recipe.last_epoch_start:
            run.counts.tokens_before_last_epoch = run.counts.tokens
    weights = weights.cpu()
    layers = StepContext.of_layers(runs, weights)
    # every sum would be divided by a weight of 0
    if not layers[0].rows:
        for run in runs:
            run.counts.step += 1
        return None
    pieces = _micro_batches(runs, inputs, targets, weights)
    route = cross_spec if layers[0].kernels == "eager" else cross
    step = route.begin(layers, len(pieces))
    width = runs[0].sae.d_model
    if layers[0].spec.accumulate == 1:
        # in one piece the rows stay for telemetry, which reads them on logged steps only
        (batches,) = (piece() for piece in pieces)
        taken = step.take(batches)
        tallies = list[Tally | None]([None] * len(runs))
        active = [run.dead.active(one.values, one.indices) for run, one in zip(runs, taken, strict=True)]
    else:
        told = [Tally(run, width) for run in runs]
        for piece in pieces:
            _take(step, piece(), told)
        tallies = list[Tally | None](told)
        active = [tally.active for tally in told]
        empty = weights.new_empty(0)
        batches, taken = [Rows(empty, empty, empty, ())] * len(runs), [Taken(empty, empty, empty)] * len(runs)
    found = step.end()
    # of all layers before any of them changes, so that weights, moments and averages stay as they were
    require_finite(found[0]._replace(loss=sum(outcome.loss for outcome in found)), layers[0].step)
    # filled, not copied: a number that the host copies to a GPU waits for its queue
    loss, norm = (layers[0].total.new_full((), n) for n in (found[0].loss, found[0].grad_norm))
    # one collective for all layers
    joined = runs[0].world.data.largest(torch.cat(active)).split([len(one) for one in active])
    reports: list[StepReport] = []
    for run, ctx, outcome, batch, one, tally, seen in zip(
        runs, layers, found, batches, taken, tallies, joined, strict=True
    ):
        lr = lr_at(ctx.step, run.recipe.steps, ctx.spec)
        update(run, ctx, outcome.grad_norm, lr, update_early(run, ctx, loss, norm, lr))
        count(run, ctx, outcome)
        run.dead.update(seen, ctx.rows)
        reports.append(report_of(ctx, outcome, lr, batch.y, one.y_hat, one.values, batch.weights, tally))
    return reports


def _take(step: Step, batches: list[Rows], tallies: list[Tally]) -> None:
    # a function, so that a micro-batch's tensors are freed before the next one is prepared
    for tally, batch, taken in zip(tallies, batches, step.take(batches), strict=True):
        tally.add(batch, taken)


def _micro_batches(
    runs: Sequence[Run], inputs: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor
) -> list[Callable[[], list[Rows]]]:
    """The parts of a batch, each prepared on the device when called; see `train.micro_batches`."""
    pieces = runs[0].recipe.spec.accumulate
    parts = zip(*(rows.tensor_split(pieces) for rows in (weights, *inputs, *targets)), strict=True)
    # on a mesh other ranks may have rows in it, and all must make the same number of collectives
    return [partial(_prepare, runs, *part) for part in parts if _wanted(runs[0], part[0])]


def _wanted(run: Run, weights: Tensor) -> bool:
    return run.world.meshed or bool((weights > 0).any())


@torch.no_grad()
def _prepare(runs: Sequence[Run], weights: Tensor, *rows: Tensor) -> list[Rows]:
    """A micro-batch of every layer normalised, without its rows of weight 0: inputs, then targets."""
    device, keep = runs[0].device, weights > 0
    # before rows are dropped: groups are fixed lanes of the batch, and rows of weight 0 have no quota
    sizes = group_sizes(runs[0], keep)
    some = sum(sizes) < len(weights)
    kept = [(part[keep] if some else part).to(device) for part in (weights, *rows)]
    weights, inputs, targets = kept[0], kept[1 : len(runs) + 1], kept[len(runs) + 1 :]
    return [
        Rows(run.sae.normalise(widened(x))[0], normalise_own(run.sae, widened(y)), weights, sizes)
        for run, x, y in zip(runs, inputs, targets, strict=True)
    ]


def normalise_own(sae: Sae, y: Tensor) -> Tensor:
    """Raw rows [B, D] of a layer's own target, normalised; its SAE holds the constants of several."""
    y = y.to(sae.W_enc.dtype)
    if sae.parts.target_normalize != "dataset":
        return y
    return (y - sae.target_mean[: y.shape[1]]) / sae.target_scale.view(-1)[0]
