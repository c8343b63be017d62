"""Which layers a transcoder set has, and which hooks each of them reads and writes."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from winnow.schemas.base import Contract
from winnow.schemas.errors import ConfigError

Reads = Literal["resid_mid", "mlp_in"]

WRITES = "mlp_out"
"""Site that every layer of a set predicts."""


def layer_folder(layer: int) -> str:
    """Return the folder of a layer's transcoder below that of its set."""
    return f"layer_{layer}"


class SetSpec(Contract):
    """A transcoder set: one dictionary for every layer of a range (Ameisen, Lindsey et al. 2025).

    Layer l's latents read `<reads>.l`. Of a per-layer set (PLT) they predict `mlp_out.l`; of a cross-layer
    one (CLT) they contribute to the prediction of `mlp_out.m` for every m >= l of the range.
    """

    layers: Literal["all"] | tuple[int, int] = "all"
    """The first and the last layer, both included. `all`, the default, takes every layer of the subject."""
    cross: bool = False
    """Whether a layer's latents write to every later layer as well: a cross-layer transcoder."""
    reads: Reads = "resid_mid"
    """What a layer reads: `resid_mid`, the residual stream before the MLP's norm, or `mlp_in`, what the MLP
    is given after it."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if self.layers != "all" and not 0 <= self.layers[0] <= self.layers[1]:
            raise ValueError(f"layers are [first, last], both included, got {list(self.layers)}")
        return self

    @property
    def first(self) -> int:
        """The first layer."""
        return 0 if self.layers == "all" else self.layers[0]

    def of(self, subject_layers: int) -> SetSpec:
        """The same set with `all` resolved for a subject of so many layers.

        Raises:
            ConfigError: The range ends after the subject's last layer.
        """
        if self.layers == "all":
            return self.model_copy(update={"layers": (0, subject_layers - 1)})
        if self.layers[1] >= subject_layers:
            raise ConfigError(
                "train.set.layers",
                expected=f"layers from 0 to {subject_layers - 1}, which the subject has",
                got=list(self.layers),
            )
        return self

    @property
    def range(self) -> range:
        """The layers of a resolved set.

        Raises:
            ValueError: `layers` is still `all`.
        """
        if self.layers == "all":
            raise ValueError("`all` layers are known once the subject is")
        return range(self.layers[0], self.layers[1] + 1)

    def read_hook(self, layer: int) -> str:
        """The hook that a layer's latents read."""
        return f"{self.reads}.{layer}"

    def targets(self, layer: int) -> range:
        """The layers whose MLP output a layer's latents predict; of a resolved set."""
        return range(layer, self.range.stop) if self.cross else range(layer, layer + 1)

    def target_hooks(self, layer: int) -> tuple[str, ...]:
        """The hooks of `targets`, the layer's own first."""
        return tuple(f"{WRITES}.{target}" for target in self.targets(layer))

    @property
    def hooks(self) -> tuple[str, ...]:
        """Every hook that a resolved set reads or predicts, layer by layer: 2 L of them."""
        return tuple(hook for layer in self.range for hook in (self.read_hook(layer), f"{WRITES}.{layer}"))
