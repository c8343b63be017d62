"""Beginning from an SAE that exists: all of it, or the latents of it that contribute most.

Legend: B rows of the sample, D d_model, O width of the output, N latents of the new SAE, M >= N of the old.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.sae.init import CHUNK_ROWS, counted_rows, loss_constant
from winnow.sae.model import Sae
from winnow.schemas.config import StorageSpec
from winnow.schemas.fit import mismatch
from winnow.trainer.mesh.shard import has_latents


def load_source(uri: str, sae: Sae, storage: StorageSpec) -> Sae:
    """The SAE that another shall begin from, whole, on its device.

    Raises:
        SaeMismatch: It has fewer latents, or is made of other parts.
        MissingObject, IntegrityError: None is there, or a damaged one.
    """
    source = Sae.load(uri, device=sae.W_enc.device, storage=storage)
    wanted, found = _facts(sae), _facts(source)
    differing = [name for name in wanted if wanted[name] != found[name]]
    latents = getattr(sae, "of", sae.latents)
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
    parts = sae.parts  # by name: a dump leaves `centred` out where it is false
    return facts | {name: getattr(parts, name) for name in type(parts).model_fields if name != "matryoshka"}


@torch.no_grad()
def warm_start(sae: Sae, source: Sae, sample: Tensor, weights: Tensor, target: Tensor | None = None) -> float:
    """Fill a new SAE from `source`, dataset constants and thresholds included.

    Args:
        sae: On a mesh, a rank's shard.
        source: As `load_source` gives it.
        sample: Raw training rows [B, D].
        weights: Their weights [B].
        target: A transcoder's raw target rows [B, O].

    Returns:
        The loss constant; see `winnow.sae.init.initialise`.

    Raises:
        ConfigError, NonFiniteError: As `initialise`.
    """
    sample, weights, target = counted_rows(sae, sample, weights, target)
    part: range = getattr(sae, "part", range(sae.latents))
    keep = most_useful(source, sample, weights, getattr(sae, "of", sae.latents))[part.start : part.stop]
    theirs = source.tensors()
    for name, tensor in sae.tensors().items():
        of_latents = has_latents(name, theirs[name])
        tensor.copy_(theirs[name][keep] if of_latents else theirs[name])
    y = sae.normalise(sample)[0] if target is None else sae.normalise_target(target)
    return loss_constant(y, weights)


def most_useful(source: Sae, sample: Tensor, weights: Tensor, count: int) -> Tensor:
    """The `count` latents, ascending, of the most energy: the sum over rows of |z_n d_n|^2.

    Args:
        source: M latents.
        sample: Raw rows [B, D].
        weights: [B].
        count: At most M; all of them are taken without a look.
    """
    if count == source.latents:
        return torch.arange(count, device=source.W_enc.device)
    energy = torch.zeros(source.latents, dtype=torch.float64, device=source.W_enc.device)
    for rows, w in zip(sample.split(CHUNK_ROWS), weights.split(CHUNK_ROWS), strict=True):
        values, indices = source.select(source.normalise(rows)[0])
        found = values.double().square() * w.to(values.device)[:, None]
        energy.index_add_(0, indices.flatten(), found.flatten())
    energy *= source.W_dec.double().square().sum(1)
    return energy.argsort(descending=True, stable=True)[:count].sort().values
