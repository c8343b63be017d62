"""What a set says of a held prompt: its active latents, what they write, and what they miss of each MLP.

Letters: P positions, D width of the residual stream, S slots of codes, l source layer, m target layer,
n targets of a sweep, F active latents of the prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from winnow.evaluator.circuits.held import Held
from winnow.sae.sets import Codes, TranscoderSet
from winnow.schemas.errors import ConfigError, SaeMismatch

_CACHE_BYTES = 512 << 20
"""Largest size of the written vectors that are kept; larger ones are gathered anew for each sweep."""


class Sources:
    """The active latents of a prompt, in the order of layer, position and latent.

    Attributes:
        set: The set.
        codes: Layer -> values [P, S] and latents [P, S].
        layer: int64 [F].
        position: int64 [F].
        latent: int64 [F].
        activation: [F], in units of the codes.
        errors: Per layer of the subject [P, D]: what the set misses of its MLP output, all of it outside the
            set's range.
    """

    def __init__(self, set_: TranscoderSet, held: Held) -> None:
        """Encode a held prompt.

        Args:
            set_: A set of the subject.
            held: The prompt, held with what the set reads.

        Raises:
            ConfigError: The set's latents are not linear in what they read.
        """
        check_linear(set_)
        self.set = set_
        rows = {layer: held.reads[layer] for layer in set_.layers}
        self.codes: dict[int, Codes] = set_.encode(rows)
        told = set_.decode(self.codes, rows)
        self.errors = [
            made - told[layer].to(made) if layer in told else made for layer, made in enumerate(held.mlp_out)
        ]
        self._order(held.positions)
        self._cached: dict[int, Tensor] = {}
        written = sum(
            values.numel() * len(set_.targets(layer)) * set_.d_model * 4
            for layer, (values, _) in self.codes.items()
        )
        self._keeps = written <= _CACHE_BYTES
        self._check_values(rows)

    @property
    def count(self) -> int:
        """F."""
        return len(self.layer)

    def _order(self, positions: int) -> None:
        """Number the active latents; `_ids` maps slots to numbers, and empty slots to F."""
        parts: list[Tensor] = []
        for layer, (values, latents) in self.codes.items():
            at = torch.arange(positions, device=values.device)[:, None].expand_as(values)
            on = values != 0
            own = torch.stack([torch.full_like(at, layer)[on], at[on], latents[on]])
            parts.append(own)
        places = torch.cat(parts, 1)
        width = max(self.set[layer].latents for layer in self.set.layers)
        key = (places[0] * positions + places[1]) * width + places[2]
        order = key.argsort()
        self.layer, self.position, self.latent = places[:, order]
        self.activation = torch.cat([values[values != 0] for values, _ in self.codes.values()])[order]
        number = torch.empty_like(order)
        number[order] = torch.arange(len(order), device=order.device)
        self._ids: dict[int, Tensor] = {}
        low = 0
        for layer, (values, _) in self.codes.items():
            on = values != 0
            ids = torch.full_like(values, len(order), dtype=torch.int64)
            ids[on] = number[low : low + int(on.sum())]
            self._ids[layer] = ids
            low += int(on.sum())

    def encoders(self, which: Tensor) -> Tensor:
        """Encoder rows [n, D] of some of the latents, by their numbers."""
        found = torch.empty(len(which), self.set.d_model, device=which.device, dtype=self.activation.dtype)
        for layer in self.set.layers:
            own = self.layer[which] == layer
            if own.any():
                found[own] = self.set.encoder_rows(layer, self.latent[which][own])
        return found

    def add_effects(self, effects: Tensor, target: int, gradient: Tensor) -> None:
        """Add the effects of all latents that write to a layer's MLP output.

        Args:
            effects: [F + 1, n or more]; the last row takes what empty slots would get.
            target: m.
            gradient: [n, p, D] of the targets by that output, of the first p positions.
        """
        by_position = gradient.permute(1, 2, 0)
        positions, count = gradient.shape[1], gradient.shape[0]
        for layer in self.set.layers:
            if target in self.set.targets(layer):
                found = torch.bmm(self._written(layer, target)[:positions], by_position)
                ids = self._ids[layer][:positions].flatten()
                effects[:, :count].index_add_(0, ids, found.flatten(0, 1))

    def _written(self, layer: int, target: int) -> Tensor:
        """What a layer's slots write to a target: activation times decoder row [P, S, D]."""
        key = layer * 100_000 + target
        if key in self._cached:
            return self._cached[key]
        values, latents = self.codes[layer]
        rows = self.set.decoder_rows(layer, latents.flatten(), target).view(*latents.shape, -1)
        made = rows * values[..., None]
        if self._keeps:
            self._cached[key] = made
        return made

    def skip(self, layer: int) -> Tensor | None:
        """The raw skip path [D, D] from what a layer reads to its own MLP output; None if it has none."""
        sae = self.set[layer]
        if sae.W_skip is None:
            return None
        norm = sae.target_norm if sae.parts.target_normalize == "dataset" else torch.ones(())
        scale = sae.input_scale if sae.normalize_mode == "dataset" else 1.0
        return sae.W_skip.detach() * norm.reshape(-1, 1).to(sae.W_skip) / scale

    def _check_values(self, rows: dict[int, Tensor]) -> None:
        """Refuse an activation whose values are not the pre-activations: edges would not add up to them."""
        for layer, (values, latents) in self.codes.items():
            sae, x = self.set[layer], self.set[layer].normalise(rows[layer])[0]
            bias = sae.b_enc - sae.W_enc @ sae.b_pre
            found = (sae.W_enc[latents] * x[:, None]).sum(-1) + bias[latents]
            lost = ((found - values) * (values != 0)).abs().max()
            if lost > 1e-3 * values.abs().max().clamp_min(1e-6):
                raise ConfigError(
                    f"the activation {sae.parts.activation!r} of layer {layer}",
                    expected="one whose active values are the pre-activations, as of topk or jumprelu",
                    got=f"values that differ by {float(lost):.1e}",
                )


def check_linear(set_: TranscoderSet) -> None:
    """Refuse sets whose latents are not linear in the rows that they read.

    Raises:
        SaeMismatch: A layer normalises each row by itself, or is cross-layer with a skip path.
    """
    for layer in set_.layers:
        sae = set_[layer]
        if sae.normalize_mode == "layer" or sae.parts.centred:
            raise SaeMismatch(
                f"the normalisation of layer {layer}",
                expected="`dataset` or `none`, which are linear in the rows",
                got="centred rows" if sae.parts.centred else "layer",
            )
        if set_.cross and sae.W_skip is not None:
            raise SaeMismatch(f"layer {layer} of a cross-layer set", expected="no skip path", got="one")
