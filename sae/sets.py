"""Transcoder sets: one transcoder per layer, whose outputs add up to predictions of every layer's MLP.

A per-layer set (PLT) has one target per layer; the transcoder of layer l of a cross-layer one (CLT; Ameisen,
Lindsey et al. 2025, "Circuit Tracing") has the MLP outputs of all layers m >= l as its targets. Both are
ordinary `Sae`s with a target, and one rule joins them: *the predictions of a layer add up*. So that they can,
only layer m's own transcoder holds the bias and mean of target m; for its further targets they are 0.

Legend: B rows, D width of the residual stream, N latents per layer, S slots of codes, l source layer,
m target layer.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from winnow.sae.model import CARD_KEY, Sae, Scale, no_sae, read_set_card
from winnow.schemas.base import sha256_hex
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.layers import SetSpec, layer_folder
from winnow.schemas.sets import SET_KEY, SetCard, SetLayer
from winnow.schemas.training import SaeCard

if TYPE_CHECKING:
    from winnow.store.objects import ObjectStore

Codes = tuple[Tensor, Tensor]
"""Values [B, S] and latents int64 [B, S], as `Sae.encode` returns them."""


class TranscoderSet(nn.Module):
    """One transcoder for every layer of a range; `load` reads a published one.

    Args:
        saes: Layer -> its transcoder.
        of: Layers and hooks, resolved.

    Raises:
        ConfigError: A layer of the range is missing, or the layers differ in width or targets.
    """

    def __init__(self, saes: Mapping[int, Sae], of: SetSpec) -> None:
        super().__init__()
        missing = [layer for layer in of.range if layer not in saes]
        if missing or len(saes) != len(of.range):
            raise ConfigError(
                "the layers of a set",
                expected=f"every layer from {of.range.start} to {of.range.stop - 1}",
                got=f"{sorted(saes)}" + (f", without {missing}" if missing else ""),
            )
        widths = {layer: sae.d_model for layer, sae in saes.items()}
        if len(set(widths.values())) > 1:
            raise ConfigError("the widths D of a set's layers", expected="one width", got=widths)
        for layer, sae in saes.items():
            if sae.d_out != len(of.targets(layer)) * sae.d_model or not sae.has_target:
                raise ConfigError(
                    f"the transcoder of layer {layer}",
                    expected=f"output of {len(of.targets(layer))} x D = {sae.d_model}",
                    got=sae.d_out,
                )
        self.of = of
        self.card: SetCard | None = None
        self._saes = nn.ModuleDict({str(layer): saes[layer] for layer in of.range})

    # ---- what it is made of ----------------------------------------------------------------------

    @property
    def layers(self) -> range:
        """The layers, ascending."""
        return self.of.range

    @property
    def cross(self) -> bool:
        """Whether a layer writes to later layers as well."""
        return self.of.cross

    @property
    def d_model(self) -> int:
        """D."""
        return self[self.layers.start].d_model

    def __getitem__(self, layer: int) -> Sae:
        """The transcoder of a layer."""
        sae = self._saes[str(layer)]
        assert isinstance(sae, Sae)
        return sae

    def targets(self, layer: int) -> range:
        """The layers m whose MLP output a layer's latents write to."""
        return self.of.targets(layer)

    def encoder_rows(self, layer: int, latents: Tensor) -> Tensor:
        """Encoder rows [n, D] of these latents, for *raw* rows: d(pre-activation) / d(raw row)."""
        sae = self[layer]
        scale = sae.input_scale if sae.normalize_mode == "dataset" else 1.0
        return sae.W_enc.detach()[latents] / scale

    def decoder_rows(self, layer: int, latents: Tensor, target: int) -> Tensor:
        """Decoder rows [n, D] of these latents at a target layer, in *raw* units of its MLP output."""
        sae, at = self[layer], self.targets(layer).index(target)
        columns = slice(at * self.d_model, (at + 1) * self.d_model)
        norm = sae.target_norm if sae.parts.target_normalize == "dataset" else torch.ones(())
        rows = sae.W_dec.detach()[latents, columns]
        return rows * (norm[columns] if norm.ndim else norm).to(rows)

    # ---- what users call -------------------------------------------------------------------------

    def encode(self, rows: Mapping[int, Tensor]) -> dict[int, Codes]:
        """Codes of raw rows.

        Args:
            rows: Layer -> raw rows [B, D] of the hook that it reads. Layers may be left out.

        Returns:
            Layer -> values [B, S] and latents [B, S]; see `Sae.encode`.
        """
        return {layer: self[layer].encode(x) for layer, x in rows.items()}

    def decode(
        self,
        codes: Mapping[int, Codes],
        rows: Mapping[int, Tensor] | None = None,
        targets: Iterable[int] | None = None,
    ) -> dict[int, Tensor]:
        """Predict MLP outputs from codes.

        Args:
            codes: Layer -> codes. What a layer that is left out would write is missing from the result.
            rows: The raw rows [B, D] of the codes; only transcoders with `skip` need them.
            targets: Layers m to predict; None takes all of the set.

        Returns:
            Layer m -> raw rows [B, D] of `mlp_out.m`.
        """
        wanted = list(self.layers if targets is None else targets)
        found: dict[int, Tensor] = {}
        for layer, (values, indices) in codes.items():
            if not any(target in self.targets(layer) for target in wanted):
                continue
            given = self._given(layer, values, indices, None if rows is None else rows[layer])
            parts = given.split(self.d_model, dim=1)
            for target, part in zip(self.targets(layer), parts, strict=True):
                if target in wanted:
                    found[target] = found[target] + part if target in found else part
        return {target: found[target] for target in wanted if target in found}

    def _given(self, layer: int, values: Tensor, indices: Tensor, rows: Tensor | None) -> Tensor:
        """What a layer adds to its targets' raw rows [B, O], bias and mean of its own target included."""
        sae = self[layer]
        x = sae.normalise(rows)[0] if rows is not None else None
        # A transcoder's output is restored by its target's constants: the scale of its input is not read.
        return sae.restore(sae.reconstruct(values, indices, x), Scale(sae.input_mean, sae.input_scale))

    def forward(self, rows: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Predicted raw rows [B, D] of every layer's MLP output, for the raw rows that the layers read."""
        return self.decode(self.encode(rows), rows)

    # ---- storage ---------------------------------------------------------------------------------

    def save(self, store: ObjectStore, **facts: Any) -> SetCard:
        """Write every layer to a folder of its own, and then `set.json`, which makes them a set.

        Args:
            store: The folder or prefix that becomes the set's address.
            **facts: `weights`, `identity`, `window`, `spec`, `metrics`, `notes` of `SetCard`; `metrics_of`
                is layer -> the layer's own figures.
        """
        of_layers = facts.pop("metrics_of", {})
        shared = {name: facts[name] for name in ("weights", "identity", "window") if name in facts}
        spec = facts.get("spec")
        cards: dict[int, SaeCard] = {}
        for layer in self.layers:
            own = spec.layer_spec(layer) if spec is not None else None
            cards[layer] = self[layer].save(
                store.child(layer_folder(layer)),
                **hooks_of_layer(self.of, layer),
                **shared,
                spec=own,
                metrics=of_layers.get(layer),
            )
        self.card = put_set_card(store, self.of, cards, **facts)
        return self.card

    @classmethod
    def load(
        cls,
        path_or_uri: str | os.PathLike[str],
        *,
        device: torch.device | str = "cpu",
        storage: StorageSpec | None = None,
    ) -> TranscoderSet:
        """Read a published set: a folder or URI that holds `set.json` and a folder per layer.

        Its attribute `card` is the `SetCard`. Digests are checked before anything is parsed.

        Raises:
            NoSae: No set there.
            IntegrityError: Bytes, shapes or hooks differ from the cards'.
            UnsupportedVersion: Written by a Winnow of another major version.
        """
        from winnow.store.objects import open_store  # not needed to train without storage

        uri = os.fspath(path_or_uri).rstrip("/")
        storage = storage or StorageSpec()
        store = open_store(uri, storage)
        if (card := read_set_card(store)) is None:
            raise no_sae(store, uri, a_set=True)
        saes: dict[int, Sae] = {}
        for entry in card.layers:
            layer_card(store, entry)
            sae = Sae.load(f"{uri}/{entry.folder}", device=device, storage=storage)
            _require_hooks(sae, card.of, entry.layer, f"{uri}/{entry.folder}/{CARD_KEY}")
            saes[entry.layer] = sae
        whole = cls(saes, card.of)
        whole.card = card
        return whole


def hooks_of_layer(of: SetSpec, layer: int) -> dict[str, Any]:
    """`hook`, `target_hook` and `with_targets` of a layer's card, as `Sae.save` takes them."""
    own, *later = of.target_hooks(layer)
    return {"hook": of.read_hook(layer), "target_hook": own, "with_targets": tuple(later)}


def put_set_card(store: ObjectStore, of: SetSpec, cards: Mapping[int, SaeCard], **facts: Any) -> SetCard:
    """Write `set.json` after the layers' own files; arguments as for `TranscoderSet.save`."""
    entries = [
        SetLayer(layer=layer, folder=layer_folder(layer), card_sha256=sha256_hex(cards[layer].to_json()))
        for layer in of.range
    ]
    card = SetCard(layers=tuple(entries), cross=of.cross, reads=of.reads, **facts)
    store.put(SET_KEY, card.to_json())
    return card


def layer_card(store: ObjectStore, entry: SetLayer) -> SaeCard:
    """Read the card of a set's layer.

    Raises:
        MissingObject, IntegrityError: It is missing, or not the file that `set.json` describes.
    """
    key = f"{entry.folder}/{CARD_KEY}"
    data = store.get(key)
    if sha256_hex(data) != entry.card_sha256:
        raise IntegrityError(
            f"{store.uri}/{key} is not the file that {SET_KEY} describes",
            expected=f"sha256 {entry.card_sha256}",
            got=sha256_hex(data),
            fix="Publish or copy the whole set again",
        )
    return SaeCard.from_json(data, origin=f"{store.uri}/{key}")


def _require_hooks(sae: Sae, of: SetSpec, layer: int, origin: str) -> None:
    """IntegrityError unless a layer's card reads and writes what its set says."""
    assert sae.card is not None
    expected = hooks_of_layer(of, layer)
    got = {name: getattr(sae.card, name) for name in expected}
    if got != expected:
        raise IntegrityError(f"the hooks of {origin}", expected=expected, got=got)
