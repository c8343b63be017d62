"""The activations of an SAE: one file each, found by its name; docs/trainer.md says how to add one."""

from __future__ import annotations

import importlib

from winnow.sae.activations.base import Activation, DenseCodes
from winnow.schemas.activations import traits_of

__all__ = ["Activation", "DenseCodes", "activation_of"]


def activation_of(name: str) -> Activation:
    """The activation of a name; raises ValueError if there is none."""
    # by its module's name, not from a table: a new activation is one file
    return importlib.import_module(f"{__name__}.{traits_of(name).name}").ACTIVATION
