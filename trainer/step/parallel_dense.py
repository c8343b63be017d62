"""ReLU and JumpReLU on a mesh: `winnow.trainer.step.step.eager_pass` of one shard and one share of the batch.

Legend: B rows of this rank, O width of the output, n latents of this shard, N of all, M dead latents.

Their codes are dense [B, n], so there is nothing to select: only the outputs [B, O] are summed over `latent`
and the gradients over `data`. Autograd goes through this shard's own product, pulled by the gradient of the
whole output; what the other shards add is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.sae.model import Sae
from winnow.schemas.training import TrainSpec
from winnow.trainer.mesh.topk import count_kept
from winnow.trainer.mesh.world import World
from winnow.trainer.step.fused import Pass, squares
from winnow.trainer.step.losses import Rows, TrainCodes, train_codes
from winnow.trainer.step.optim import project_decoder_gradient
from winnow.trainer.step.parallel_step import Share, auxk_error, joint_norm


def dense_pass(
    sae: Sae,
    spec: TrainSpec,
    batch: Rows,
    dead: Tensor,
    k_aux: int,
    constant: float,
    sparsity: float,
    world: World,
    share: Share,
    dead_sizes: list[int],
) -> Pass:
    """Fills `.grad` of this shard, the decoder's projected; every rank gets the same loss.

    Args:
        sae: This rank's shard.
        spec: See `eager_pass`.
        batch: This rank's rows, weights above 0; B may be 0.
        dead: int64 [M], ascending: the shard's own dead latents.
        k_aux: Most dead latents a row, of all shards.
        constant: See `losses.reconstruction_loss`.
        sparsity: Weight of `losses.sparsity_loss` at this step.
        world: The mesh.
        share: See `Share.of`.
        dead_sizes: M of every shard.
    """
    codes, own = train_codes(sae, batch, spec.bandwidth), world.part(spec.latents)
    scale, weights = batch.weights / (share.weight * constant), batch.weights
    pulled: list[Tensor] = []  # their gradients are the shard's
    pulls, error, loss = torch.zeros_like(batch.y), batch.y, scale.new_zeros(())
    y_hat = batch.y
    for size in spec.prefixes:
        width = max(0, min(size, own.stop) - own.start)
        mine = codes.values[:, :width] @ sae.W_dec[:width]
        y_hat = sae.add_bias(world.latent.sum(mine.detach().clone()), batch.x).detach()
        error = y_hat - batch.y
        loss += scale @ squares(error) / len(spec.prefixes)
        grad = error * (2 / len(spec.prefixes) * scale)[:, None]
        pulled.append((mine * grad).sum())
        pulls += grad
    common = 0.0
    if sparsity and codes.l0 is None:
        pulled.append(sparsity * (weights @ codes.values.sum(1)) / (share.weight * constant**0.5))
        loss += world.latent.sum(pulled[-1].detach().clone())
    elif sparsity:
        term, common = _l0(codes, weights, sae.k, sparsity, world, share)
        pulled.append(term)
    auxk, finite = None, True
    if spec.auxk_coefficient and sum(dead_sizes):
        mine = _dead_codes(sae, batch.x, dead, k_aux, world, dead_sizes) @ sae.W_dec[dead]
        e_hat = world.latent.sum(mine.detach().clone())
        auxk, grad = auxk_error(e_hat, -error, weights, spec.auxk_coefficient, world, share)
        finite = grad is not None
        if grad is not None:
            pulled.append((mine * grad).sum())
    sae.zero_grad()
    torch.stack(pulled).sum().backward()
    total = world.data.sum(loss.double()).item() + common + spec.auxk_coefficient * (auxk or 0.0)
    ids = torch.arange(sae.latents, device=weights.device).expand_as(codes.values)
    norm = _finish(sae, pulls, batch.x, world)
    return Pass(total, auxk, finite, norm, y_hat, codes.values.detach(), ids)


def _l0(
    codes: TrainCodes, weights: Tensor, k: int, sparsity: float, world: World, share: Share
) -> tuple[Tensor, float]:
    """JumpReLU's term as this shard's part of it that has its gradient, and as the number it is."""
    assert codes.l0 is not None
    active = weights @ codes.l0 / share.weight
    excess = world.data.sum(world.latent.sum(active.detach().clone())).item() / k - 1
    return 2 * sparsity * excess / k * active, sparsity * excess**2


def _dead_codes(sae: Sae, x: Tensor, dead: Tensor, k_aux: int, world: World, dead_sizes: list[int]) -> Tensor:
    """[B, M]: the k_aux best dead latents of each row over all shards, 0 elsewhere."""
    W_enc = sae.W_enc[dead]
    z = torch.addmm(sae.b_enc[dead] - W_enc @ sae.b_pre, x, W_enc.T).relu()
    if k_aux >= sum(dead_sizes):
        return z
    sizes = [min(k_aux, size) for size in dead_sizes]
    best, at = z.detach().sort(dim=1, descending=True, stable=True)
    kept = count_kept(best[:, : sizes[world.latent.rank]], k_aux, sizes, world.latent).kept
    slot = torch.arange(len(dead), device=x.device) < kept[:, None]
    return z * torch.zeros_like(z).scatter(1, at, slot.to(z))


@torch.no_grad()
def _finish(sae: Sae, pulls: Tensor, x: Tensor, world: World) -> float:
    """Sum the gradients over the mesh, project the decoder's, and give their norm, thresholds left out."""
    assert sae.b_pre.grad is not None
    world.latent.sum(sae.b_pre.grad)
    if sae.b_dec is None:
        sae.b_pre.grad += pulls.sum(0)
    else:
        sae.b_dec.grad = pulls.sum(0)
    if sae.W_skip is not None:
        sae.W_skip.grad = pulls.T @ x
    travels = [world.data.sum_start(getattr(sae, name).grad) for name in sae.parameter_names]
    for travel in travels:
        travel.wait()
    project_decoder_gradient(sae)
    return joint_norm(sae, world)
