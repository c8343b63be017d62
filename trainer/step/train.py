"""One training step, top to bottom: what is dead, the gradients of every micro-batch, the update.

Legend: B rows of this rank, D d_model, O width of the output, n latents of this shard.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from winnow.schemas.errors import NonFiniteError
from winnow.trainer.kernels.step_ops import step_ops
from winnow.trainer.step import sparse, spec
from winnow.trainer.step.context import Outcome, StepContext, takes
from winnow.trainer.step.losses import Rows
from winnow.trainer.step.optim import lr_at
from winnow.trainer.step.report import StepReport, Tally
from winnow.trainer.step.spans import mark
from winnow.trainer.step.state import Run
from winnow.trainer.step.update import fused_update, plain_update, update_matrices
from winnow.trainer.step.widen import widened

Step = sparse.SparseStep | spec.SpecStep
"""A step that is under way: `take` per micro-batch, then `end`."""


def train_step(run: Run, rows: Tensor, weights: Tensor, target: Tensor | None = None) -> StepReport | None:
    """Train on one batch.

    Args:
        run: The state, changed in place.
        rows: Raw activations [B, D], or as they are stored (`widened`), on the SAE's device unless they are
            split (`accumulate`): its parts are moved there one by one. On a mesh, this rank's share of the
            batch.
        weights: [B], better on the host: their number decides shapes. Rows of weight 0 take part in nothing,
            whatever they hold.
        target: A transcoder's raw target rows [B, O].

    Returns:
        None if every row has weight 0: nothing but the step number changes.

    Raises:
        NonFiniteError: The loss or the gradient is NaN or infinite; the weights are left as they were.
    """
    counts = run.counts
    # before the step, whose rows belong to the last epoch
    if counts.step == run.recipe.last_epoch_start:
        counts.tokens_before_last_epoch = counts.tokens
    # on the host, where their number decides shapes: a GPU would be waited for
    weights = weights.cpu()
    ctx = StepContext.of(run, weights)
    # every sum would be divided by a weight of 0
    if not ctx.rows:
        counts.step += 1
        return None
    pieces = micro_batches(run, rows, weights, target)
    route = spec if ctx.kernels == "eager" else sparse
    step = route.begin(ctx, len(pieces))
    if run.recipe.spec.accumulate == 1:
        # in one piece the rows stay for telemetry, which reads them on logged steps only
        (batch,) = (piece() for piece in pieces)
        taken, tally = step.take(batch), None
        active = run.dead.active(taken.values, taken.indices)
        x, x_hat, values, weights = batch.y, taken.y_hat, taken.values, batch.weights
    else:
        # rows of micro-batches are gone afterwards, so they are tallied on every step
        tally = _take_all(run, step, pieces)
        active, x = tally.active, rows.new_empty(0)
        x_hat = values = weights = x
    ending = step.end()
    # active on any rank's rows is active
    since = run.dead.after(run.world.data.largest(active), ctx.rows)
    # the next step's number of dead latents comes with this step's numbers, in the one wait for the device
    ending.send((since >= run.recipe.dead_after).sum())
    # given to the device before the wait, so that it has work meanwhile
    lr = lr_at(ctx.step, run.recipe.steps, ctx.spec)
    early = update_early(run, ctx, ending.loss, ending.norm, lr)
    found, (silent,) = ending.read()
    require_finite(found, ctx.step)
    update(run, ctx, found.grad_norm, lr, early)
    count(run, ctx, found)
    run.dead.settle(since, silent, run.recipe.dead_after)
    return report_of(ctx, found, lr, x, x_hat, values, weights, tally)


def _take_all(run: Run, step: Step, pieces: list[Callable[[], Rows]]) -> Tally:
    """Take every micro-batch, one in memory at a time."""
    tally = Tally(run, run.sae.d_out)

    # a function, so that a micro-batch's tensors are freed before the next one is prepared
    def take(batch: Rows) -> None:
        tally.add(batch, step.take(batch))

    for piece in pieces:
        take(piece())
    return tally


def micro_batches(run: Run, rows: Tensor, weights: Tensor, target: Tensor | None) -> list[Callable[[], Rows]]:
    """The parts of a batch, each prepared on the device when called.

    Those without a row of weight above 0 are left out, except on a mesh.
    """
    count, device = run.recipe.spec.accumulate, run.device

    def ready(rows: Tensor, weights: Tensor, target: Tensor | None) -> Rows:
        moved = None if target is None else target.to(device)
        return prepare(run, rows.to(device), weights, moved)

    targets = [None] * count if target is None else target.tensor_split(count)
    parts = zip(rows.tensor_split(count), weights.tensor_split(count), targets, strict=True)
    # on a mesh other ranks may have rows in it, and all must make the same number of collectives
    return [partial(ready, *part) for part in parts if run.world.meshed or bool((part[1] > 0).any())]


@torch.no_grad()
def prepare(run: Run, rows: Tensor, weights: Tensor, target: Tensor | None = None) -> Rows:
    """A micro-batch normalised, without its rows of weight 0. Arguments as for `train_step`.

    `weights` are on the host.
    """
    keep = weights > 0
    # before rows are dropped: groups are fixed lanes of the batch, and rows of weight 0 have no quota
    sizes = group_sizes(run, keep)
    if sum(sizes) < len(rows):
        places = keep.nonzero().flatten()
        weights, places = weights[places], places.to(rows.device, non_blocking=True)
        rows = rows[places]
        target = None if target is None else target[places]
    # dropped first, since garbage in a row of weight 0 would survive the weight: 0 * inf is NaN
    x, weights = run.sae.normalise(widened(rows))[0], weights.to(rows.device, non_blocking=True)
    return Rows(x, x if target is None else run.sae.normalise_target(widened(target)), weights, sizes)


def group_sizes(run: Run, keep: Tensor) -> tuple[int, ...]:
    """Rows to keep, bool [B], of each group of a micro-batch that BatchTopK selects in."""
    # with fewer groups than shares, a group spans several ranks (see `selection.JoinedGroups`)
    share = run.world.data.size * run.recipe.spec.accumulate
    groups = max(1, run.recipe.spec.groups // share) if run.batches else 1
    return tuple(int(part.sum()) for part in keep.tensor_split(groups))


def update_early(run: Run, ctx: StepContext, loss: Tensor, norm: Tensor, lr: float) -> dict[str, int]:
    """Update on a GPU what its kernels can before the host knows the step's numbers; see `update_matrices`.

    Where loss or norm is not finite, they leave the weights as they are.
    """
    fused = None if ctx.kernels == "eager" else step_ops(ctx.kernels, ctx.spec.compute_dtype).fused
    if fused is None or not takes(run.sae):
        return {}
    return update_matrices(fused, run, loss, norm, lr=lr, spec=ctx.spec, step=ctx.step)


def update(run: Run, ctx: StepContext, grad_norm: float, lr: float, early: dict[str, int]) -> None:
    """Change the weights by the gradients, whose joint norm is given; `early` ones are changed already."""
    largest = ctx.spec.clip_norm
    if ctx.kernels == "eager":
        plain_update(run.sae, run.adam, run.ema, lr=lr, grad_norm=grad_norm, largest=largest)
    else:
        fused_update(
            run.sae,
            run.adam,
            run.ema,
            lr=lr,
            grad_norm=grad_norm,
            largest=largest,
            moments=ctx.spec.moments,
            step=ctx.step,
            early=early,
        )
        for name, number in early.items():
            run.adam_steps.tell(name, run.adam.state[getattr(run.sae, name)]["step"], number)
    mark("update")


def count(run: Run, ctx: StepContext, found: Outcome) -> None:
    """Count a step; its active latents are counted apart."""
    counts = run.counts
    if found.auxk is not None:
        counts.auxk_steps += 1
        counts.auxk_nonfinite += not found.auxk_finite
    counts.step += 1
    counts.tokens += ctx.rows


def report_of(
    ctx: StepContext,
    found: Outcome,
    lr: float,
    x: Tensor,
    x_hat: Tensor,
    values: Tensor,
    weights: Tensor,
    tally: Tally | None,
) -> StepReport:
    """The report of a step; tensors as there."""
    return StepReport(
        found.loss,
        found.auxk or 0.0,
        found.grad_norm,
        lr,
        sum(ctx.dead_of_shards),
        x,
        x_hat,
        values,
        weights,
        ctx.world,
        found.second_rounds,
        ctx.rows,
        tally,
    )


def require_finite(found: Outcome, step: int) -> None:
    """NonFiniteError unless loss and gradient are finite: before anything changes."""
    for what, value in (("loss", found.loss), ("gradient norm", found.grad_norm)):
        # NaN fails every comparison, so one test covers both
        if not -float("inf") < value < float("inf"):
            raise NonFiniteError(
                f"the {what} of step {step} is not finite",
                expected="a number",
                got=value,
                fix="Lower lr or set clip_norm, and train into another `out`",
            )
