"""What a set says of a held prompt: its active latents, what they write, and what they miss of each MLP.

Letters: P positions, D width of the residual stream, S slots of codes, l source layer, m target layer,
n targets of a sweep, F active latents of the prompt, W of them those that write to one layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from winnow.evaluator.circuits.held import Held
from winnow.sae.sets import Codes, TranscoderSet
from winnow.schemas.errors import ConfigError, SaeMismatch

_CACHE_BYTES = 512 << 20
"""Largest size of the written vectors that are kept; larger ones are gathered anew for each sweep."""

_CHECKED = 4096
"""Active latents whose values are checked at a time."""


class _Writers(NamedTuple):
    """The latents that write to one layer's MLP output, position by position."""

    numbers: Tensor
    """int64 [W], ascending."""
    first: list[int]
    """P: the number of a position's first writer; its others follow one by one."""
    ends: list[int]
    """P + 1: where each position's writers begin among the W."""


class Sources:
    """The active latents of a prompt, numbered in the order of position, layer and latent.

    Attributes:
        set: The set.
        codes: Layer -> values [P, S] and latents [P, S].
        layer: int64 [F], on the CPU like all that is numbered.
        position: int64 [F].
        latent: int64 [F].
        activation: [F], in units of the codes.
        errors: Per layer of the subject [P, D]: what the set misses of its MLP output, all of it outside the
            set's range.
    """

    @torch.no_grad()
    def __init__(self, set_: TranscoderSet, held: Held) -> None:
        """Encode a held prompt.

        Args:
            set_: A set of the subject, on its device.
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
        self._number()
        self._check_values(rows)
        self._writers = {target: self._writers_of(target, held.positions) for target in set_.layers}
        self._cached: dict[int, Tensor] = {}
        written = sum(len(writers.numbers) for writers in self._writers.values()) * set_.d_model * 4
        self._keeps = written <= _CACHE_BYTES

    @property
    def count(self) -> int:
        """F."""
        return len(self.layer)

    def _number(self) -> None:
        """Number the active latents: the writers of a layer at a position are then neighbours."""
        places: list[Tensor] = []
        active: list[Tensor] = []
        for layer, (values, latents) in self.codes.items():
            at, slot = values.nonzero(as_tuple=True)
            places.append(torch.stack([at, torch.full_like(at, layer), latents[at, slot]]).cpu())
            active.append(values[at, slot].cpu())
        position, layer, latent = torch.cat(places, 1)
        layers, width = self.set.layers.stop, max(self.set[layer].latents for layer in self.set.layers)
        order = ((position * layers + layer) * width + latent).argsort()
        self.position, self.layer, self.latent = position[order], layer[order], latent[order]
        self.activation = torch.cat(active)[order]

    def _writers_of(self, target: int, positions: int) -> _Writers:
        writes = torch.tensor([target in self.set.targets(layer) for layer in self.set.layers])
        numbers = writes[self.layer - self.set.layers.start].nonzero()[:, 0]
        at = self.position[numbers].contiguous()
        ends = torch.searchsorted(at, torch.arange(positions + 1))
        first = torch.cat([numbers, numbers.new_zeros(1)])[ends[:-1]]
        return _Writers(numbers, first.tolist(), ends.tolist())

    def encoders(self, which: Tensor) -> Tensor:
        """Encoder rows [n, D] of some of the latents, by their numbers, on the set's device."""
        like = self.set[self.set.layers.start].W_enc
        found = like.new_empty(len(which), self.set.d_model)
        for layer in self.set.layers:
            own = self.layer[which] == layer
            if own.any():
                latents = self.latent[which[own]].to(like.device)
                found[own.to(like.device)] = self.set.encoder_rows(layer, latents)
        return found

    def add_effects(self, effects: Tensor, target: int, gradient: Tensor) -> None:
        """Add the effects of all latents that write to a layer's MLP output.

        Args:
            effects: [n or more, F or more], a column per latent.
            target: m.
            gradient: [n, p, D] of the targets by that output, of the first p positions.
        """
        if target not in self._writers:
            return
        writers, written = self._writers[target], self._written(target)
        # Position by position: one may have fifty times as many latents as another, and padding all of them
        # to the longest cost more than everything else.
        for position in range(gradient.shape[1]):
            low, high = writers.ends[position], writers.ends[position + 1]
            if low < high:
                first = writers.first[position]
                into = effects[: len(gradient), first : first + high - low]
                into.addmm_(gradient[:, position], written[low:high].T)

    def _written(self, target: int) -> Tensor:
        """What its writers write to a layer: activation times decoder row [W, D]."""
        if target in self._cached:
            return self._cached[target]
        numbers = self._writers[target].numbers
        layers, values = self.layer[numbers], self.activation[numbers]
        like = self.set[self.set.layers.start].W_dec
        made = like.new_empty(len(numbers), self.set.d_model)
        for layer in self.set.layers:
            own = (layers == layer).nonzero()[:, 0]
            if len(own):
                latents = self.latent[numbers[own]].to(like.device)
                rows = self.set.decoder_rows(layer, latents, target)
                made[own.to(like.device)] = rows * values[own, None].to(rows)
        if self._keeps:
            self._cached[target] = made
        return made

    def skip(self, layer: int) -> Tensor | None:
        """The raw skip path [D, D] from what a layer reads to its own MLP output; None if it has none."""
        sae = self.set[layer]
        if sae.W_skip is None:
            return None
        norm = sae.target_norm if sae.parts.target_normalize == "dataset" else sae.W_dec.new_ones(())
        scale = sae.input_scale if sae.normalize_mode == "dataset" else 1.0
        return sae.W_skip.detach() * norm.reshape(-1, 1).to(sae.W_skip) / scale

    def _check_values(self, rows: dict[int, Tensor]) -> None:
        """Refuse an activation whose values are not the pre-activations: edges would not add up to them."""
        for layer, (values, latents) in self.codes.items():
            sae, x = self.set[layer], self.set[layer].normalise(rows[layer])[0]
            bias = sae.b_enc - sae.W_enc @ sae.b_pre
            at, slot = values.nonzero(as_tuple=True)
            active, own = values[at, slot], latents[at, slot]
            # A position can have thousands of active latents: all of its rows at once would be gigabytes.
            parts = zip(own.split(_CHECKED), at.split(_CHECKED), strict=True)
            found = [(sae.W_enc[these] * x[where]).sum(-1) + bias[these] for these, where in parts]
            worst = float((torch.cat(found) - active).abs().max()) if len(own) else 0.0
            if worst > 1e-3 * max(1e-6, float(values.abs().max())):
                raise ConfigError(
                    f"the activation {sae.parts.activation!r} of layer {layer}",
                    expected="one whose active values are the pre-activations, as of topk or jumprelu",
                    got=f"values that differ by {worst:.1e}",
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
