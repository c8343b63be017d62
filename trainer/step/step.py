"""The state of a run and one training step.

Legend: B rows, D d_model, N latents, K active latents a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from winnow.common.reporter import say
from winnow.sae import metrics
from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError, NonFiniteError
from winnow.schemas.training import SaeParts, TrainSpec
from winnow.trainer.kernels import Backend, choose
from winnow.trainer.mesh.world import World
from winnow.trainer.step import losses
from winnow.trainer.step.accumulate import accumulated_pass
from winnow.trainer.step.dead import DeadCounter
from winnow.trainer.step.fused import Forward, Pass, fused_pass
from winnow.trainer.step.optim import (
    Ema,
    clip_gradients,
    ema_beta,
    lr_at,
    make_adam,
    project_decoder_gradient,
    renormalise_decoder,
)
from winnow.trainer.step.parallel_accumulate import accumulated_parallel_pass
from winnow.trainer.step.parallel_dense import dense_pass
from winnow.trainer.step.parallel_step import Found, Share, parallel_pass
from winnow.trainer.step.spans import mark
from winnow.trainer.step.update import fused_update

TALLIED_ROWS = 256
"""Rows whose squares are summed in float64 at a time."""
LONGEST_DEAD_AFTER = 10_000_000
"""Most rows of silence before a latent is dead, where the spec does not say."""

K_STAGES = 8
"""Stages in which K falls from `k_start` to `k`."""


@dataclass(frozen=True)
class Recipe:
    """The spec, resolved against a dataset: everything a step needs and no step changes."""

    spec: TrainSpec
    steps: int
    """Steps of the whole run."""
    steps_per_epoch: int
    k_aux: int
    dead_after: int
    """Rows of silence after which a latent is dead."""
    sparsity: float = 0.0
    """Weight of the sparsity term of `relu` and `jumprelu`."""

    @classmethod
    def resolve(cls, spec: TrainSpec, d_model: int, steps_per_epoch: int) -> Recipe:
        """Fill the spec's open fields for rows of width D."""
        steps = int(spec.epochs * steps_per_epoch + 1e-9)
        planned = steps * spec.batch_rows
        return cls(
            spec,
            steps,
            steps_per_epoch,
            k_aux=spec.auxk_k if spec.auxk_k is not None else power_of_two_near(d_model / 2),
            dead_after=spec.dead_after_tokens
            if spec.dead_after_tokens is not None
            else dead_after_rows(planned, spec.latents, spec.k),
            sparsity=spec.sparsity_coefficient
            if spec.sparsity_coefficient is not None
            else {"relu": 5 / d_model**0.5, "jumprelu": 1.0}.get(spec.activation, 0.0),
        )

    def sparsity_at(self, step: int) -> float:
        """`sparsity`, rising linearly from 0 over the first steps."""
        warmup = self.spec.sparsity_warmup_fraction * self.steps
        return self.sparsity * (min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0)

    def k_at(self, step: int) -> int:
        """Active latents K a row of step `step` (from 0); in few stages, since a GPU compiles each anew."""
        if self.spec.k_start is None:
            return self.spec.k
        stages = int(K_STAGES * step / (self.spec.k_anneal_fraction * self.steps))
        extra = (self.spec.k_start - self.spec.k) * max(0, K_STAGES - stages)
        return self.spec.k + -(-extra // K_STAGES)

    @property
    def last_epoch_start(self) -> int:
        """The first step of the last `steps_per_epoch` steps."""
        return max(0, self.steps - self.steps_per_epoch)


def choose_kernels(spec: TrainSpec, parts: SaeParts, device: torch.device) -> Backend:
    """The backend of a run; `auto` takes the eager step where a variant has no other, and says so.

    Raises:
        ConfigError: A backend was asked for that this variant does not have; see also `dispatch.choose`.
    """
    if parts.activation in ("topk", "batchtopk") or spec.kernels == "eager":
        return choose(spec.kernels, device)
    if spec.kernels != "auto":
        raise ConfigError(
            f"kernels: {spec.kernels}",
            expected=f"eager or auto, activation {parts.activation} has no other step",
            got=spec.kernels,
            fix="Set kernels: auto",
        )
    say(f"kernels: eager, since activation {parts.activation} has no other step")
    return choose("eager", device)


def dead_after_rows(planned: int, latents: int, k: int) -> int:
    """Rows of silence after which a latent is dead, where the spec does not say; docs/trainer.md says why.

    A fortieth of the run, or longer until the average latent is due to be active 50 times, up to a tenth.

    Args:
        planned: Rows of the whole run.
        latents: N.
        k: K.
    """
    wanted = max(planned // 40, min(planned // 10, 50 * latents // k))
    return max(1, min(LONGEST_DEAD_AFTER, wanted))


def power_of_two_near(size: float) -> int:
    """The power of two nearest `size` on a log scale, at least 1."""
    return 1 << max(0, round(torch.tensor(size, dtype=torch.float64).log2().item()))


@dataclass
class Counts:
    """Numbers a run carries along; all of them are checkpointed."""

    step: int = 0
    """Steps finished."""
    tokens: int = 0
    """Rows of weight above 0 trained on."""
    tokens_before_last_epoch: int = 0
    """`tokens` when the last epoch began."""
    auxk_steps: int = 0
    """Steps on which AuxK was active."""
    auxk_nonfinite: int = 0
    """Steps on which AuxK was not finite and counted as 0."""
    seconds: float = 0.0
    """Wall-clock spent in steps, waiting for data included."""
    seconds_waiting: float = 0.0
    """Of it, waiting for data."""


class Run:
    """Everything that changes while training: weights, Adam, moving average, dead counts, counts.

    Args:
        sae: An initialised SAE.
        recipe: How it is trained.
        loss_constant: From `winnow.sae.init.initialise`.
        world: The mesh; the SAE holds this rank's shard of the latents. Alone where not given.
    """

    def __init__(self, sae: Sae, recipe: Recipe, loss_constant: float, world: World | None = None) -> None:
        self.sae, self.recipe, self.loss_constant = sae, recipe, loss_constant
        self.world = world or World()
        self.kernels: Backend = choose_kernels(recipe.spec, sae.parts, self.device)
        self.adam = make_adam(sae, recipe.spec)
        self.ema = Ema(sae, ema_beta(recipe.spec, recipe.steps)) if recipe.spec.ema else None
        self.dead = DeadCounter(sae.latents, self.device)
        self.counts = Counts()
        self.source: Sae | None = None
        """The SAE that a new run begins from."""

    @property
    def batches(self) -> bool:
        """Whether rows are selected together, and it matters which group of lanes they come from."""
        return self.sae.parts.activation == "batchtopk"

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.sae.W_enc.device

    @property
    def dead_share_of_last_epoch(self) -> float:
        """Share of the latents never active over the last epoch so far; on a mesh, a collective."""
        rows = max(1, self.counts.tokens - self.counts.tokens_before_last_epoch)
        silent = self.world.latent.sum(torch.tensor(len(self.dead.silent(rows))))
        return int(silent) / self.recipe.spec.latents


class Tally:
    """What is known of a step's rows once they are gone, micro-batch by micro-batch.

    Args:
        run: Whose step it is.
    """

    def __init__(self, run: Run) -> None:
        self._dead = run.dead
        self.fvu = metrics.Fvu(run.sae.d_out, run.device)
        self.l0 = metrics.L0()
        self.active = torch.zeros_like(run.dead.since, dtype=torch.uint8)
        """uint8 [N]: 1 where a latent was active."""

    def add(self, batch: losses.Rows, values: Tensor, indices: Tensor, y_hat: Tensor) -> None:
        """Take in a micro-batch, its codes and what they give."""
        self.active |= self._dead.active(values, indices)
        self.l0.add(values, batch.weights)
        parts = (tensor.split(TALLIED_ROWS) for tensor in (batch.y, y_hat, batch.weights))
        for y, y_hat, weights in zip(*parts, strict=True):
            self.fvu.add(y, y_hat, weights)


@dataclass(frozen=True)
class StepReport:
    """What one step found."""

    loss: float
    """The whole loss: reconstruction (over the constant) and AuxK."""
    auxk: float
    grad_norm: float
    """Before clipping, after projection."""
    lr: float
    dead: int
    """Dead latents at the start of the step, of all shards."""
    x: Tensor
    """Normalised rows of weight above 0 as they should be, [B, O]; with the next three, for telemetry."""
    x_hat: Tensor
    values: Tensor
    weights: Tensor
    world: World
    """On a mesh the rows are this rank's, the codes its shard's, and the figures below are collectives."""
    second_rounds: int
    """Rows whose top-k took a second round over the shards."""
    rows: int
    """Rows of weight above 0 in the whole batch."""
    tally: Tally | None = None
    """Of all micro-batches, where there are several: the tensors above are then empty."""

    @property
    def fvu(self) -> float:
        """FVU of the whole batch in the normalised space."""
        if self.tally is not None:
            sums = self.tally.fvu
        else:
            sums = metrics.Fvu(self.x.shape[1], self.x.device)
            sums.add(self.x, self.x_hat, self.weights)
        return (sums.over(self.world.data.sum) if self.world.meshed else sums).value

    @property
    def l0(self) -> float:
        """Active latents a row in the whole batch."""
        if self.tally is not None:
            count = self.tally.l0
        else:
            count = metrics.L0()
            count.add(self.values, self.weights)
        if self.world.meshed:  # every shard counted the rows
            return count.over(self.world.whole.sum).value * self.world.latent.size
        return count.value


def train_step(run: Run, rows: Tensor, weights: Tensor, target: Tensor | None = None) -> StepReport | None:
    """Train on one batch.

    Args:
        run: The state, changed in place.
        rows: Raw activations [B, D], on the SAE's device but where they are split (`accumulate`), whose
            parts are moved there one by one; on a mesh, this rank's share of the batch.
        weights: [B]; rows of weight 0 take part in nothing, whatever they hold.
        target: A transcoder's raw target rows [B, O].

    Returns:
        None where every row has weight 0: nothing but the step number moves.

    Raises:
        NonFiniteError: The loss or the gradient is NaN or infinite; the weights are left as they were.
    """
    spec, counts = run.recipe.spec, run.counts
    if counts.step == run.recipe.last_epoch_start:
        counts.tokens_before_last_epoch = counts.tokens
    run.sae.k = run.recipe.k_at(counts.step)
    try:
        take = _accumulated_step if spec.accumulate > 1 else _whole_step
        return take(run, rows, weights, target)
    finally:
        run.sae.k = spec.k  # between steps it is the spec's


def _whole_step(run: Run, rows: Tensor, weights: Tensor, target: Tensor | None) -> StepReport | None:
    """`train_step` in one piece."""
    sae, spec, step = run.sae, run.recipe.spec, run.counts.step
    batch = prepare(run, rows, weights, target)
    share = Share.of(batch.weights, run.world.data)
    if not share.rows:
        run.counts.step += 1
        return None
    dead = run.dead.silent(run.recipe.dead_after)  # frozen for the whole step
    dead_sizes = run.world.latent.gather(torch.tensor(len(dead))).tolist()
    k_aux, constant = run.recipe.k_aux, run.loss_constant

    if run.world.meshed and run.kernels == "eager":
        sparsity = run.recipe.sparsity_at(step)
        found = dense_pass(sae, spec, batch, dead, k_aux, constant, sparsity, run.world, share, dead_sizes)
    elif run.world.meshed:
        found = parallel_pass(
            sae, spec, batch, dead, k_aux, constant, run.kernels, run.world, share, dead_sizes
        )
    elif run.kernels == "eager":
        found = eager_pass(run, batch, dead)
    else:
        found = fused_pass(sae, spec, batch, dead, k_aux, constant, run.kernels)
    lr, grad_norm = _update(run, found)
    _count(run, found, run.world.data.largest(run.dead.active(found.values, found.indices)), share.rows)
    return StepReport(
        found.loss,
        found.auxk or 0.0,
        grad_norm,
        lr,
        sum(dead_sizes),
        batch.y,
        found.x_hat,
        found.values,
        batch.weights,
        run.world,
        found.second_rounds,
        share.rows,
    )


def _accumulated_step(run: Run, rows: Tensor, weights: Tensor, target: Tensor | None) -> StepReport | None:
    """`train_step` in micro-batches."""
    spec, present, world = run.recipe.spec, weights[weights > 0], run.world
    share = Share.of(present, world.data)
    if not share.rows:
        run.counts.step += 1
        return None
    dead = run.dead.silent(run.recipe.dead_after)
    dead_sizes = world.latent.gather(torch.tensor(len(dead))).tolist()
    parts, tally = micro_batches(run, rows, weights, target), Tally(run)
    k_aux, constant = run.recipe.k_aux, run.loss_constant
    none = rows.new_empty(0)
    if world.meshed:

        def tell(batch: losses.Rows, found: Found) -> None:
            tally.add(batch, *found.codes, found.y_hat)

        found = accumulated_parallel_pass(
            run.sae, spec, parts, dead, k_aux, constant, run.kernels, world, share, dead_sizes, tell
        )
    else:

        def see(batch: losses.Rows, found: Forward) -> None:
            tally.add(batch, found.values, found.indices, found.y_hat)

        weight = present.to(run.sae.W_enc).sum()
        found = accumulated_pass(run.sae, spec, parts, weight, dead, k_aux, constant, run.kernels, see)
        found = Pass(found.loss.item(), found.auxk, found.auxk_finite, found.grad_norm, none, none, none)
    lr, grad_norm = _update(run, found)
    _count(run, found, world.data.largest(tally.active), share.rows)
    return StepReport(
        found.loss,
        found.auxk or 0.0,
        grad_norm,
        lr,
        sum(dead_sizes),
        none,
        none,
        none,
        none,
        world,
        found.second_rounds,
        share.rows,
        tally,
    )


def micro_batches(
    run: Run, rows: Tensor, weights: Tensor, target: Tensor | None
) -> list[Callable[[], losses.Rows]]:
    """The parts of a batch, each prepared on the device when called.

    Those without a row of weight above 0 are left out, but on a mesh, where others may have one.
    """
    count, device = run.recipe.spec.accumulate, run.device

    def ready(rows: Tensor, weights: Tensor, target: Tensor | None) -> losses.Rows:
        return prepare(
            run, rows.to(device), weights.to(device), None if target is None else target.to(device)
        )

    targets = [None] * count if target is None else target.tensor_split(count)
    parts = zip(rows.tensor_split(count), weights.tensor_split(count), targets, strict=True)
    return [partial(ready, *part) for part in parts if run.world.meshed or bool((part[1] > 0).any())]


def _update(run: Run, found: Pass) -> tuple[float, float]:
    """The step from the gradients: learning rate and norm before clipping."""
    spec, step = run.recipe.spec, run.counts.step
    _require_finite("loss", found.loss, step)
    lr = lr_at(step, run.recipe.steps, spec)
    if run.kernels == "eager":
        norm = eager_update(run, lr, found.grad_norm)
    else:
        norm = found.grad_norm
        assert norm is not None, "only the eager step leaves it to the update"
        _require_finite("gradient norm", norm, step)
        fused_update(
            run.sae,
            run.adam,
            run.ema,
            lr=lr,
            grad_norm=norm,
            largest=spec.clip_norm,
            moments=spec.moments,
            step=step,
        )
    mark("update")
    return lr, norm


def _count(run: Run, found: Pass, active: Tensor, rows: int) -> None:
    """Count a step of `rows` rows in which the latents `active` uint8 [N] were."""
    counts = run.counts
    if found.auxk is not None:
        counts.auxk_steps += 1
        counts.auxk_nonfinite += not found.auxk_finite
    run.dead.update(active, rows)
    counts.step += 1
    counts.tokens += rows


@torch.no_grad()
def prepare(run: Run, rows: Tensor, weights: Tensor, target: Tensor | None = None) -> losses.Rows:
    """A batch for one step: normalised, without its rows of weight 0. Arguments as for `train_step`."""
    keep = weights > 0
    share = run.world.data.size * run.recipe.spec.accumulate
    groups = max(1, run.recipe.spec.groups // share)
    sizes = (
        tuple(int(part.sum()) for part in keep.tensor_split(groups)) if run.batches else (int(keep.sum()),)
    )
    if sum(sizes) < len(rows):
        rows, weights = rows[keep], weights[keep]
        target = None if target is None else target[keep]
    x = run.sae.normalise(rows)[0]
    return losses.Rows(x, x if target is None else run.sae.normalise_target(target), weights, sizes)


def eager_pass(run: Run, batch: losses.Rows, dead: Tensor) -> Pass:
    """Loss and gradients, readable: THE SPECIFICATION of `winnow.trainer.step.fused.fused_pass`.

    Args:
        run: Its SAE's `.grad`s are overwritten.
        batch: B >= 1 rows.
        dead: int64 [M], ascending.
    """
    sae, spec, constant = run.sae, run.recipe.spec, run.loss_constant
    if spec.multi_topk:
        values, indices = sae.select(batch.x, min(4 * sae.k, sae.latents))
        loss, y_hat = losses.multi_topk_loss(sae, batch, values, indices, constant)
        values, indices = values[:, : sae.k], indices[:, : sae.k]
    else:
        codes = losses.train_codes(sae, batch, spec.bandwidth)
        values, indices = codes.values, codes.indices
        loss, y_hat = losses.prefix_loss(sae, batch, codes, constant, spec.prefixes)
        if coefficient := run.recipe.sparsity_at(run.counts.step):
            loss = loss + losses.sparsity_loss(sae, codes, batch.weights, constant, coefficient)
    auxk, finite = None, True
    if spec.auxk_coefficient and len(dead):
        aux = losses.auxk_loss(sae, batch.x, batch.y - y_hat, batch.weights, dead, run.recipe.k_aux)
        loss, auxk, finite = loss + spec.auxk_coefficient * aux.loss, aux.loss.item(), aux.finite
    mark("forward")
    run.adam.zero_grad()
    loss.backward()
    mark("backward")
    if indices is None:
        indices = torch.arange(sae.latents, device=values.device).expand_as(values)
    return Pass(loss.item(), auxk, finite, None, y_hat.detach(), values.detach(), indices)


def eager_update(run: Run, lr: float, norm: float | None = None) -> float:
    """Projection, clipping, Adam, renormalisation and moving average; gives the norm before clipping.

    Args:
        run: Changed in place.
        lr: Learning rate of this step.
        norm: Of all shards' gradients, the decoder's already projected; null on one process.

    Raises:
        NonFiniteError: The gradient is NaN or infinite; nothing but `.grad` has changed.
    """
    sae = run.sae
    if norm is None:
        project_decoder_gradient(sae)
    names = [name for name in sae.parameter_names if name != "threshold"]  # its scale is the bandwidth's
    norm = clip_gradients([getattr(sae, name) for name in names], run.recipe.spec.clip_norm, norm)
    _require_finite("gradient norm", norm, run.counts.step)
    for group in run.adam.param_groups:
        group["lr"] = lr
    run.adam.step()
    renormalise_decoder(sae.W_dec)
    if sae.parts.activation == "jumprelu":
        sae.threshold.detach().clamp_(min=0)
    if run.ema is not None:
        run.ema.update(sae)
    return norm


def _require_finite(what: str, value: float, step: int) -> None:
    if not -float("inf") < value < float("inf"):
        raise NonFiniteError(
            f"the {what} of step {step} is not finite",
            expected="a number",
            got=value,
            fix="Lower lr or set clip_norm, and train into another `out`",
        )
