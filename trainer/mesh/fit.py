"""Whether a mesh fits a spec and a number of processes. Without torch, since the queue of jobs asks too."""

from __future__ import annotations

from winnow.schemas.errors import ConfigError
from winnow.schemas.training import TrainSpec


def check_mesh(spec: TrainSpec, world_size: int) -> tuple[int, int]:
    """The mesh (data, latent) of a spec for a number of processes.

    Raises:
        ConfigError: Mesh and processes do not match, or the mesh does not fit the rest of the spec.
    """
    latent = spec.mesh.latent
    data = spec.mesh.data or max(1, world_size // latent)
    if data * latent != world_size:
        raise ConfigError(
            f"train.mesh of {data} x {latent} (data x latent)",
            expected=f"{data * latent} processes",
            got=world_size,
            fix=f"Start `torchrun --nproc-per-node {data * latent} -m winnow.trainer CONFIG` "
            f"(`winnow estimate --count {data * latent}`), or set train.mesh",
        )
    # a data rank reads whole lanes of the batch
    if spec.lanes % data:
        raise ConfigError("train.mesh.data", expected=f"a divisor of lanes ({spec.lanes})", got=data)
    if latent > spec.latents:
        raise ConfigError("train.mesh.latent", expected=f"at most latents ({spec.latents})", got=latent)
    shares = data * spec.accumulate
    if spec.accumulate > 1 and spec.traits.selects == "batch" and spec.groups % shares:
        raise ConfigError(
            f"selection_groups: {spec.groups}",
            expected=f"a multiple of data x accumulate ({data} x {spec.accumulate})",
            got=spec.groups,
            fix="Set another accumulate: batchtopk selects in whole groups of a micro-batch",
        )
    # activations that select have a parallel step, the sparse route
    if world_size > 1 and spec.kernels == "eager" and spec.traits.selects:
        raise ConfigError(
            "kernels: eager", expected="one process", got=world_size, fix="Set kernels: auto on a mesh"
        )
    return data, latent
