"""`set.json`: a published transcoder set, one artefact made of one transcoder per layer."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from winnow.schemas.base import Artefact, Contract, RelativeKey, Sha256, sha256_hex
from winnow.schemas.layers import Reads, SetSpec
from winnow.schemas.readings import RowsSpec
from winnow.schemas.training import SaeIdentity, TrainSpec
from winnow.schemas.window import WindowRule

CARD_KEY = "sae.json"
"""Where an SAE's card is, in its folder."""
WEIGHTS_KEY = "sae.safetensors"
"""Where its weights are."""
SET_KEY = "set.json"
"""The file that makes a folder a set. Sets hold no `sae.json` themselves: their layers do."""


class SetLayer(Contract):
    """One layer's transcoder, in a folder of its own."""

    layer: int = Field(ge=0)
    """The layer of the subject."""
    folder: RelativeKey
    """Its folder below that of the set, which holds `sae.json` and `sae.safetensors`."""
    card_sha256: Sha256
    """Digest of its `sae.json`, which holds that of the weights."""


class SetCard(Artefact):
    """`set.json`, written after all of its layers: the set exists once this file does."""

    kind: Literal["winnow.set"] = "winnow.set"
    layers: tuple[SetLayer, ...] = Field(min_length=1)
    """Its layers, ascending, none of the range left out."""
    cross: bool
    """Whether a layer's latents write to every later layer as well (a cross-layer transcoder)."""
    reads: Reads
    """The site that every layer reads."""
    weights: Literal["raw", "ema"] = "raw"
    """Which weights are exported, of all layers alike."""
    identity: SaeIdentity | None = None
    """What it was trained on; null if it was imported."""
    window: WindowRule | None = Field(default=None, exclude_if=lambda rule: rule is None)
    """How the windows that it was trained on begin; null if that was not recorded."""
    spec: TrainSpec | None = None
    """The spec that it was trained with; null if it was imported."""
    metrics: dict[str, float] = {}
    """Held-out figures of the whole set by the id of their definition; those of a layer are in its card."""
    notes: tuple[str, ...] = Field(default=(), exclude_if=lambda notes: not notes)
    """Of an import: a sentence for each fact in the other library's files that the set cannot represent."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        numbers = [entry.layer for entry in self.layers]
        # A missing layer's MLP would silently be left out of every graph.
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise ValueError(f"a set has every layer of its range, in ascending order: got {numbers}")
        return self

    @property
    def rows(self) -> RowsSpec:
        """The rows that it was trained on; all of an import."""
        return self.spec.rows if self.spec is not None else RowsSpec()

    @property
    def layers_sha256(self) -> str:
        """The set as graphs name it: a digest of those of its layers' cards.

        Not that of `set.json`, whose bytes change with a new field of the contract.
        """
        return sha256_hex("".join(f"{entry.layer} {entry.card_sha256}\n" for entry in self.layers).encode())

    @property
    def of(self) -> SetSpec:
        """Layers and hooks."""
        ends = self.layers[0].layer, self.layers[-1].layer
        return SetSpec(layers=ends, cross=self.cross, reads=self.reads)
