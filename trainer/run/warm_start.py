"""Starting from an existing SAE: with all of its latents, or those that contribute most.

Legend: B rows of the sample, D d_model, O width of the output, N latents of the new SAE, M >= N of the old.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.sae.init import CHUNK_ROWS, Place, counted_rows, loss_constant
from winnow.sae.model import Sae
from winnow.schemas.config import StorageSpec
from winnow.schemas.fit import mismatch
from winnow.trainer.mesh.shard import has_latents


def load_source(uri: str, sae: Sae, storage: StorageSpec, latents: int | None = None) -> Sae:
    """Load the SAE that `sae` starts from, whole, to the device of `sae`.

    Args:
        uri: Where the source is.
        sae: The SAE that starts from it.
        storage: How to reach it.
        latents: Latents of the whole dictionary if `sae` holds a part of it.

    Raises:
        SaeMismatch: It has fewer latents or other parts.
        MissingObject, IntegrityError: There is none at `uri`, or it is damaged.
    """
    # whole on every rank of a mesh: which latents are kept is decided over all of them
    source = Sae.load(uri, device=sae.W_enc.device, storage=storage)
    wanted, found = _facts(sae), _facts(source)
    differing = [name for name in wanted if wanted[name] != found[name]]
    latents = latents or sae.latents
    fix = "Set train.init_from to an SAE that fits, or the fields of train to those of this one"
    if differing:
        raise mismatch(
            "parts",
            uri,
            expected=", ".join(f"{name} {wanted[name]}" for name in differing),
            of="the new SAE",
            got=", ".join(f"{name} {found[name]}" for name in differing),
            fix=fix,
        )
    if source.latents < latents:
        more = f"{latents} or more"
        raise mismatch("latents", uri, expected=more, of="the new SAE", got=source.latents, fix=fix)
    return source


def _facts(sae: Sae) -> dict[str, object]:
    facts = {"d_model": sae.d_model, "output width": sae.d_out, "normalize": sae.normalize_mode}
    # field by field, because a dump omits `centred` if it is false
    parts = sae.parts
    # prefixes are no property of the weights: an SAE may start from one with other prefixes, or none
    return facts | {name: getattr(parts, name) for name in type(parts).model_fields if name != "matryoshka"}


@torch.no_grad()
def warm_start(
    sae: Sae,
    source: Sae,
    sample: Tensor,
    weights: Tensor,
    target: Tensor | None = None,
    *,
    place: Place | None = None,
) -> float:
    """Fill a new SAE from `source`, dataset constants and thresholds included.

    Args:
        sae: The new SAE; on a mesh, a rank's shard.
        source: The SAE returned by `load_source`.
        sample: Raw training rows [B, D].
        weights: Their weights [B].
        target: A transcoder's raw target rows [B, O].
        place: See `winnow.sae.init.initialise`.

    Returns:
        The loss constant; see `winnow.sae.init.initialise`.

    Raises:
        ConfigError, NonFiniteError: See `initialise`.
    """
    sample, weights, target = counted_rows(sae, sample, weights, target)
    # every rank computes the same choice and takes its range of it: no collective, and the same on any mesh
    latents, part, _ = place or Place.whole(sae)
    keep = most_useful(source, sample, weights, latents)[part.start : part.stop]
    theirs = source.tensors()
    for name, tensor in sae.tensors().items():
        of_latents = has_latents(name, theirs[name])
        tensor.copy_(theirs[name][keep] if of_latents else theirs[name])
    y = sae.normalise(sample)[0] if target is None else sae.normalise_target(target)
    return loss_constant(y, weights)


def most_useful(source: Sae, sample: Tensor, weights: Tensor, count: int) -> Tensor:
    """The `count` latents of the largest energy, the sum over rows of |z_n d_n|^2, in ascending order.

    Args:
        source: An SAE of M latents.
        sample: Raw rows [B, D].
        weights: [B].
        count: At most M; if it is M, all are taken and no energy is computed.
    """
    if count == source.latents:
        return torch.arange(count, device=source.W_enc.device)
    # float64: sums over many rows of values that differ by orders of magnitude
    energy = torch.zeros(source.latents, dtype=torch.float64, device=source.W_enc.device)
    for rows, w in zip(sample.split(CHUNK_ROWS), weights.split(CHUNK_ROWS), strict=True):
        values, indices = source.select(source.normalise(rows)[0])
        found = values.double().square() * w.to(values.device)[:, None]
        energy.index_add_(0, indices.flatten(), found.flatten())
    energy *= source.W_dec.double().square().sum(1)
    # stable, so that equal energies give the same latents on every rank; ascending, so that what stood first
    # in the source (a Matryoshka prefix) stands first here
    return energy.argsort(descending=True, stable=True)[:count].sort().values
