"""Transcoders made by hand, for tests of what is read at one hook and written at others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.evaluated import D_MODEL, save_sae
from winnow.sae import Sae
from winnow.schemas.config import Config
from winnow.schemas.training import SaeParts

READ, TARGET, LATER = "resid_pre.0", "mlp_out.0", "mlp_out.1"


@torch.no_grad()
def random_transcoder(targets: int = 1, *, skip: bool = False, seed: int = 0) -> Sae:
    """Random directions, dataset constants that matter."""
    draw = torch.Generator().manual_seed(seed)
    parts = SaeParts(
        d_out=targets * D_MODEL,
        target_widths=(D_MODEL,) * targets if targets > 1 else (),
        target_normalize="dataset",
        skip=skip,
    )
    sae = Sae(D_MODEL, 48, 6, "dataset", parts)
    tensors = {n: 0.3 * torch.randn(t.shape, generator=draw) for n, t in sae.tensors().items()}
    for name in ("input_scale", "target_scale"):
        tensors[name] = tensors[name].abs() + 0.7
    sae.fill(tensors)
    return sae.requires_grad_(False)


def save_transcoder(config: Config, folder: Path, sae: Sae, hook: str = READ, **hooks: Any) -> str:
    """Save one as trained on the config's dataset, from READ to TARGET unless told otherwise."""
    hooks = {"target_hook": TARGET} | hooks
    return save_sae(config, folder, sae, hook=hook, **hooks)
