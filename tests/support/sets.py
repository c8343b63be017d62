"""Transcoder sets with random weights, for tests that need no training."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from winnow.sae.model import Sae
from winnow.sae.sets import TranscoderSet
from winnow.schemas.config import Config
from winnow.schemas.layers import Reads, SetSpec
from winnow.schemas.training import SaeIdentity, SaeParts
from winnow.store import ActivationStore
from winnow.store.objects import open_store


def random_set(
    layers: int | tuple[int, int] = 3,
    *,
    cross: bool = False,
    reads: Reads = "resid_mid",
    d_model: int = 16,
    latents: int = 32,
    k: int = 4,
    activation: str = "topk",
    scaled: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> TranscoderSet:
    """A set over `layers`: random directions, biases and, if `scaled`, dataset constants."""
    ends = (0, layers - 1) if isinstance(layers, int) else layers
    of = SetSpec(layers=ends, cross=cross, reads=reads)
    draws = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64).to(dtype)

    saes: dict[int, Sae] = {}
    for layer in of.range:
        targets = len(of.targets(layer))
        parts = SaeParts(
            activation=activation,
            d_out=targets * d_model,
            target_widths=(d_model,) * targets if targets > 1 else (),
            target_normalize="dataset" if scaled else "none",
        )
        sae = Sae(d_model, latents, k, "dataset" if scaled else "none", parts, dtype=dtype)
        own = slice(0, d_model)
        with torch.no_grad():
            sae.W_enc.copy_(normal(latents, d_model) / d_model**0.5)
            sae.W_dec.copy_(F.normalize(normal(latents, sae.d_out), dim=1))
            sae.b_enc.copy_(normal(latents) / 10)
            sae.b_pre.copy_(normal(d_model) / 10)
            assert sae.b_dec is not None
            # Only the layer's own target has a bias and a mean here: predictions of layers add up.
            sae.b_dec[own] = normal(d_model) / 10
            if scaled:
                sae.input_mean.copy_(normal(d_model) / 10)
                sae.input_scale.fill_(1.5)
                sae.target_mean[own] = normal(d_model) / 10
                scales = torch.tensor([1.0 + target / 4 for target in of.targets(layer)], dtype=dtype)
                sae.target_scale.copy_(scales if targets > 1 else scales[0])
            if sae.parts.traits.threshold is not None:
                sae.threshold.fill_(0.5)
        saes[layer] = sae.requires_grad_(False)
    return TranscoderSet(saes, of)


def _identity(config: Config, weights: str | None) -> SaeIdentity:
    plan = ActivationStore.open(config.root).plan
    return SaeIdentity(
        plan_fingerprint=plan.fingerprint,
        dataset_sha256=None,
        subject_model=plan.subject.model,
        subject_weights_sha256=weights or plan.subject.weights_sha256,
    )


def publish_set(
    config: Config,
    folder: Path,
    *,
    cross: bool = False,
    layers: int = 3,
    weights: str | None = None,
    d_model: int = 16,
    reads: Reads = "resid_mid",
) -> str:
    """Publish a random set as one that was trained on the config's dataset; returns its address."""
    whole = random_set(layers, cross=cross, d_model=d_model, reads=reads)
    whole.save(open_store(str(folder)), identity=_identity(config, weights))
    return str(folder)
