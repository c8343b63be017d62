"""The step on a mesh: forward and backward of one shard of the latents and one share of the batch.

Legend: B rows of this rank, D width of the input, O of the output, n latents of this shard, N of all,
w entries a row, M dead latents.

The numbers of `winnow.trainer.step.fused.fused_pass`, that is of the eager specification, from four
exchanges: the global selection and the sum of the shards' reconstructions over `latent`, the gradients and a
few sums over `data`. Everything divides by the weight of the whole batch. What has no latents (b_pre; a
transcoder's b_dec and W_skip) is everywhere: every rank makes the same gradient for it, and the norm counts
it once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from winnow.sae.model import PARAMETERS, Sae
from winnow.schemas.training import TrainSpec
from winnow.trainer.kernels import Backend
from winnow.trainer.kernels.best import sort_pairs
from winnow.trainer.kernels.segment_grad import segments_of
from winnow.trainer.kernels.step_ops import Dead, StepOps
from winnow.trainer.mesh.batchtopk import Groups, best_of_groups
from winnow.trainer.mesh.exchange import Gather, Gradients, Part, dense_bytes, fill, rows_bytes
from winnow.trainer.mesh.topk import Codes, candidates, count_kept, keep
from winnow.trainer.mesh.world import Axis, World
from winnow.trainer.step.fused import BATCH_CANDIDATES, Model, Pass, gradient_buffer, squares, zero_where_cut
from winnow.trainer.step.losses import Rows
from winnow.trainer.step.optim import project_decoder_gradient


class Share(NamedTuple):
    """This rank's share of the batch, rows of weight 0 left out, among the others'."""

    rows: int
    """Of the whole batch."""
    fullest: int
    """Rows of the rank that has most."""
    weight: float
    """Of the whole batch."""

    @classmethod
    def of(cls, weights: Tensor, data: Axis) -> Share:
        """From this rank's weights [B]; a collective."""
        here = torch.tensor(
            [float(len(weights)), weights.sum(dtype=torch.float64).item()], dtype=torch.float64
        )
        counts, sums = data.gather(here).unbind(1)
        return cls(int(counts.sum()), int(counts.max()), sums.sum().item())


class Local(NamedTuple):
    """What every part of the step reads."""

    ops: StepOps
    sae: Sae
    world: World
    share: Share
    W_enc: Tensor
    """As the operations take it, and so the next."""
    W_dec: Tensor

    @classmethod
    def of(cls, sae: Sae, spec: TrainSpec, backend: Backend, world: World, share: Share) -> Local:
        """For one step: the weights must not change meanwhile."""
        ops, _, W_enc, W_dec = Model.of(sae, spec, backend)
        return cls(ops, sae, world, share, W_enc, W_dec)

    def decode(self, codes: Codes) -> Tensor:
        """The output [B, O] without its bias, summed over the shards."""
        if codes.values.numel():
            y_hat = self.ops.decode(codes.values, codes.indices, self.W_dec)
        else:
            y_hat = codes.values.new_zeros(len(codes.values), self.W_dec.shape[1])
        return self.world.latent.sum(y_hat)

    def part(self, codes: Codes, grad: Tensor) -> Part:
        """The codes with their gradient, which is 0 where a negative was cut or a slot is empty."""
        if not codes.values.numel():
            return Part(codes.values, codes.values, codes.indices, grad)
        segments = segments_of(codes.indices, self.sae.latents)
        dots = self.ops.dots(self.ops.low(grad), codes.indices, segments, self.W_dec)
        dz = torch.empty_like(dots).index_copy_(0, segments.order, dots).view(codes.values.shape)
        return Part(codes.values, zero_where_cut(dz, codes.values), codes.indices, grad)


class Found(NamedTuple):
    """What rows give before AuxK."""

    loss: Tensor
    """Of this rank's rows, divided by the whole batch's weight []."""
    whole: list[int]
    """The parts whose gradients are the output's: a first prefix's holds the others'."""
    error: Tensor
    """[B, O]: y_hat - y."""
    y_hat: Tensor
    codes: Codes
    dead: Codes | None
    """The best of the dead latents, where they are wanted."""
    second_rounds: int


@torch.no_grad()
def parallel_pass(
    sae: Sae,
    spec: TrainSpec,
    batch: Rows,
    dead: Tensor,
    k_aux: int,
    constant: float,
    backend: Backend,
    world: World,
    share: Share,
    dead_sizes: list[int],
) -> Pass:
    """`trainer.step.fused.fused_pass` on a mesh: fills `.grad` of this shard; every rank gets the same loss.

    Args:
        sae: This rank's shard; its K is the step's.
        spec: See `fused_pass`.
        batch: This rank's rows, weights above 0; B may be 0.
        dead: int64 [M], ascending: the shard's own dead latents.
        k_aux: Most dead latents a row, of all shards.
        constant: See `losses.reconstruction_loss`.
        backend: `cpu` or `triton`.
        world: The mesh.
        share: See `Share.of`.
        dead_sizes: M of every shard.
    """
    weights = batch.weights
    shard = Local.of(sae, spec, backend, world, share)
    k_dead = min(k_aux, sum(dead_sizes)) if spec.auxk_coefficient else 0
    centred = batch.x - sae.b_pre.detach()
    gather = _start_gather(shard, centred, _widths(sae, spec, k_dead))
    parts: list[Part] = []

    def add(codes: Codes, grad: Tensor) -> None:
        parts.append(shard.part(codes, grad))
        if gather is not None:
            gather.add(parts[-1])

    found = forward(shard, spec, batch, centred, dead, k_dead, dead_sizes, constant, spec.groups, add)
    auxk, finite = None, True
    if found.dead is not None:
        e_hat, e = shard.decode(found.dead), found.error.neg_()
        auxk, grad = auxk_error(e_hat, e, weights, spec.auxk_coefficient, world, share)
        finite = grad is not None
        if grad is not None:
            add(found.dead, grad)
    sums = torch.stack([found.loss.double(), found.loss.new_tensor(found.second_rounds, dtype=torch.float64)])
    total, second_rounds = world.data.sum(sums).tolist()
    norm = _gradients(shard, batch.x, centred, parts, found.whole, gather)
    return Pass(
        total + spec.auxk_coefficient * (auxk or 0.0),
        auxk,
        finite,
        norm,
        found.y_hat,
        found.codes.values,
        found.codes.indices,
        int(second_rounds),
    )


def _widths(sae: Sae, spec: TrainSpec, k_dead: int) -> list[int]:
    """About how many entries a row each part of a step has, over all shards."""
    k = 2 * sae.k if sae.parts.activation == "batchtopk" else sae.k  # a fuller row of a batch has twice k
    wide = [min(4 * sae.k, spec.latents)] if spec.multi_topk else []
    return [k] * len(spec.prefixes) + wide + ([k_dead] if k_dead else [])


def forward(
    shard: Local,
    spec: TrainSpec,
    batch: Rows,
    centred: Tensor,
    dead: Tensor,
    k_dead: int,
    dead_sizes: list[int],
    constant: float,
    groups: int,
    add: Callable[[Codes, Tensor], None],
) -> Found:
    """Codes, reconstruction and loss of this rank's rows.

    Args:
        shard: Whose latents; see `parallel_pass` for what is not said here.
        spec: How it is trained.
        batch: B rows.
        centred: The encoder's input [B, D].
        dead: int64 [M].
        k_dead: Dead latents kept a row, of all shards; 0 for none.
        dead_sizes: M of every shard.
        constant: The loss constant.
        groups: BatchTopK's, of these rows on all ranks.
        add: Given codes and the gradient [B, O] of what they reconstruct, part by part.
    """
    ops, sae, world = shard.ops, shard.sae, shard.world
    batched = sae.parts.activation == "batchtopk"
    sizes = [len(part) for part in world.parts(spec.latents)]
    k_wide = min(4 * sae.k, spec.latents) if spec.multi_topk else sae.k
    wanted = BATCH_CANDIDATES * sae.k if batched else k_wide
    best, best_dead = _encode(shard, centred, min(wanted, sae.latents), dead, k_dead)
    second_rounds = 0

    def select(found: Codes, k: int, sizes: list[int]) -> Codes:
        nonlocal second_rounds
        counts = count_kept(found.values, k, [min(k, size) for size in sizes], world.latent)
        second_rounds += counts.second_rounds
        return keep(*found, counts.kept)

    if batched:
        held = Groups.of(batch.groups, sae.k, groups, world, centred.device)
        rows, b_enc = ops.low(centred), sae.b_enc.detach()
        codes, second_rounds = best_of_groups(ops, best, rows, shard.W_enc, b_enc, held)
    else:
        codes = select(Codes(best.values[:, : sae.k], best.indices), sae.k, sizes)
    scale = batch.weights / (shard.share.weight * constant)
    prefixes, y_hat, error, loss = _prefixes(shard, batch, codes, spec, scale)
    for some, grad in prefixes:
        add(some, grad)
    whole = [0]
    if spec.multi_topk:
        wide = select(best, k_wide, sizes)
        error_wide = sae.add_bias(shard.decode(wide), batch.x).sub_(batch.y)
        loss += scale @ squares(error_wide) / 8
        whole.append(len(prefixes))
        add(wide, error_wide.mul_((scale / 4)[:, None]))
    dead_codes = select(best_dead, k_dead, dead_sizes) if k_dead else None
    return Found(loss, whole, error, y_hat, codes, dead_codes, second_rounds)


def _prefixes(
    shard: Local, batch: Rows, codes: Codes, spec: TrainSpec, scale: Tensor
) -> tuple[list[tuple[Codes, Tensor]], Tensor, Tensor, Tensor]:
    """`fused._prefixes` over the shards: parts with their gradients, output, its error, loss.

    A prefix that ends before this shard's latents, or begins behind them, has no codes here.
    """
    sizes = spec.prefixes
    own, share = shard.world.part(spec.latents), (2 / len(sizes) * scale)[:, None]
    y_hat = error = batch.y
    loss = scale.new_zeros(())
    parts: list[tuple[Codes, Tensor]] = []
    for number, (first, stop) in enumerate(pairwise((0, *sizes))):
        low, high = max(first, own.start) - own.start, min(stop, own.stop) - own.start
        if low >= high:
            some = Codes(codes.values[:, :0], codes.indices[:, :0])
        elif high - low == len(own):
            some = codes
        else:
            inside = (codes.indices >= low) & (codes.indices < high)
            some = Codes(torch.where(inside, codes.values, 0.0), codes.indices)
        decoded = shard.decode(some)
        y_hat = y_hat + decoded if number else shard.sae.add_bias(decoded, batch.x)
        error = y_hat - batch.y
        loss += scale @ squares(error) / len(sizes)
        parts.append((some, error * share))
    for (_, later), (_, grad) in pairwise(reversed(parts)):
        grad.add_(later)  # a latent's code reaches every prefix it lies in
    return parts, y_hat, error, loss


def _encode(shard: Local, centred: Tensor, m: int, dead: Tensor, k_dead: int) -> tuple[Codes, Codes]:
    """This shard's best m latents a row, and its best dead ones, in order."""
    kind = centred.dtype
    k_dead = min(k_dead, len(dead))
    if not len(centred):
        empty = centred.new_empty(0, m, dtype=kind), dead.new_empty(0, m)
        empty_dead = centred.new_empty(0, k_dead, dtype=kind), dead.new_empty(0, k_dead)
        return Codes(*empty), Codes(*empty_dead)
    wanted = Dead(dead, k_dead, dense=False) if k_dead else None
    rows, b_enc = shard.ops.low(centred), shard.sae.b_enc.detach()
    values, indices, found = shard.ops.encode(rows, shard.W_enc, b_enc, m, wanted)
    if wanted is None or not isinstance(found, tuple):
        return Codes(values, indices), Codes(values[:, :0], indices[:, :0])
    best, at = sort_pairs(*found)
    return Codes(values, indices), Codes(best, dead[at])


def auxk_error(
    e_hat: Tensor, e: Tensor, weights: Tensor, coefficient: float, world: World, share: Share
) -> tuple[float, Tensor | None]:
    """The term of `losses.auxk_loss`, and its gradient by e_hat times `coefficient`; else 0 and None."""
    mean = world.data.sum(weights @ e) / share.weight
    error = e_hat.sub_(e)
    spread = weights @ squares(e - mean)
    left, spread = world.data.sum(torch.stack([weights @ squares(error), spread])).unbind()
    loss = (left / spread).item()
    if not math.isfinite(loss):
        return 0.0, None
    return loss, error.mul_((2 * coefficient / spread * weights)[:, None])


def _start_gather(shard: Local, centred: Tensor, ks: list[int]) -> Gather | None:
    """Begin to gather rows over `data` where that sends less than summing dense gradients."""
    data, latents, widths = shard.world.data, shard.sae.latents, (shard.sae.d_model, shard.sae.d_out)
    if data.size == 1 or shard.world.exchange == "dense":
        return None
    entries = [min(latents, candidates(k, shard.world.latent.size)) for k in ks]
    size = centred.element_size()
    by_rows = rows_bytes(data.size, shard.share.fullest, *widths, entries, size)
    if shard.world.exchange == "auto" and by_rows >= dense_bytes(data.size, latents, *widths, size):
        return None
    return Gather(data, centred, shard.share.fullest)


def _gradients(
    shard: Local, x: Tensor, centred: Tensor, parts: list[Part], whole: list[int], gather: Gather | None
) -> float:
    """Fill every `.grad` of this shard, the decoder's projected, and give the norm over all shards.

    The gradients of the parts `whole` make up that of the output.
    """
    sae, world = shard.sae, shard.world
    W_enc, b_enc, W_dec, _ = (gradient_buffer(getattr(sae, name)) for name in PARAMETERS)
    skip = None
    if sae.W_skip is not None:
        pulls = torch.stack([parts[number].grad for number in whole]).sum(0)
        torch.mm(pulls.T, x, out=gradient_buffer(sae.W_skip))
        skip = world.data.sum_start(gradient_buffer(sae.W_skip))
    if gather is not None:
        centred, parts = gather.result()
    pulls = torch.stack([parts[number].grad.sum(0) for number in whole]).sum(0)
    over = None if gather is not None or world.data.size == 1 else world.data
    if over is not None:
        over.sum(pulls)
    fill(shard.ops, Gradients(W_dec, W_enc, b_enc), centred, parts, over)
    if skip is not None:
        skip.wait()
    return finish(sae, world, pulls)


def finish(sae: Sae, world: World, pulls: Tensor) -> float:
    """Gradients of the biases on every rank, the decoder's projected, and the norm over all shards.

    Args:
        sae: Its latents' gradients are those of the whole batch.
        world: The mesh.
        pulls: Gradient of the output's bias [O], of the whole batch.
    """
    b_pre = gradient_buffer(sae.b_pre)
    torch.neg(world.latent.sum(gradient_buffer(sae.b_enc) @ sae.W_enc), out=b_pre)
    if sae.b_dec is None:
        b_pre += pulls
    else:
        gradient_buffer(sae.b_dec).copy_(pulls)
    project_decoder_gradient(sae)
    return joint_norm(sae, world)


def joint_norm(sae: Sae, world: World) -> float:
    """The norm of all gradients over all shards, those of thresholds left out (see `step.eager_update`)."""
    squared = {
        name: getattr(sae, name).grad.double().square().sum()
        for name in sae.parameter_names
        if name != "threshold"
    }
    own = torch.stack([squared.pop(name) for name in ("W_enc", "b_enc", "W_dec")]).sum()
    return (world.latent.sum(own) + torch.stack([*squared.values()]).sum()).sqrt().item()
