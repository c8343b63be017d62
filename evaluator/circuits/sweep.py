"""Rows of the adjacency: what every source adds to some targets, by one sweep from the last layer down.

Letters: n targets, P positions, p of them the first ones, D width, L layers, F active latents.

A target is a vector at a place that latents read, or at what the unembedding reads. Its gradient goes down
block by block: at each MLP output it is multiplied with what sources write there, and it goes past the MLP,
whose output is given. Targets of several layers share a sweep: each joins it at its own layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from winnow.evaluator.circuits.held import Held, Pieces
from winnow.evaluator.circuits.sources import Sources

_ROWS = 4096
"""Gradient rows, of n targets times positions, that a sweep moves at a time: enough to fill the cores."""
_PREFIXES = 8
"""A target at a position needs no later ones: sweeps run over one of so many lengths of the prompt."""


class Targets(NamedTuple):
    """Vectors at places."""

    layer: Tensor
    """int64 [n], on the CPU; L for a logit."""
    position: Tensor
    """int64 [n], on the CPU."""
    vector: Tensor
    """[n, D], on the subject's device."""


class Sweeper:
    """Computes rows; columns are the F latents, then the errors (layer, position), then the embeddings."""

    def __init__(self, held: Held, sources: Sources) -> None:
        self._held, self._sources = held, sources
        self.columns = sources.count + (held.layers + 1) * held.positions

    def rows(self, targets: Targets) -> Tensor:
        """The direct effects [n, columns] of every source on the targets, on the CPU."""
        found = torch.zeros(len(targets.layer), self.columns, dtype=targets.vector.dtype)
        # By position, so that short sweeps stay short.
        order = targets.position.argsort(stable=True)
        step = max(1, -(-self._held.positions // _PREFIXES))
        low = 0
        while low < len(order):
            # The last one decides: positions ascend, so the number of targets shrinks as they do.
            count = max(1, _ROWS // min(self._held.positions, int(targets.position[order[low]]) + step))
            part = order[low : low + count]
            length = -(-(int(targets.position[part[-1]]) + 1) // step) * step
            length = min(length, self._held.positions)
            by_layer = part[targets.layer[part].argsort(descending=True, stable=True)]
            vectors = targets.vector[by_layer.to(targets.vector.device)]
            some = Targets(targets.layer[by_layer], targets.position[by_layer], vectors)
            found[by_layer] = self._sweep(some, length).cpu()
            low += count
        return found

    def _sweep(self, targets: Targets, positions: int) -> Tensor:
        """Rows of targets whose layers descend and whose positions are below `positions`."""
        held, sources, pieces = self._held, self._sources, self._held.pieces(positions)
        effects = targets.vector.new_zeros(len(targets.layer), self.columns)
        # Views: [n, L + 1, P] of the errors and embeddings.
        rest = effects[:, sources.count :].unflatten(1, (held.layers + 1, held.positions))
        gradient = _pulled(
            pieces.outputs[-1], pieces.inputs[-1], self._seeds(targets, held.layers, positions)
        )
        for layer in reversed(range(held.layers)):
            seeds = self._seeds(targets, layer, positions)
            if len(gradient):
                sources.add_effects(effects, layer, gradient)
                missed = sources.errors[layer][:positions]
                rest[: len(gradient), layer, :positions] = _met(gradient, missed)
            gradient = self._past(pieces, layer, gradient, seeds)
        rest[:, -1, :positions] = _met(gradient, held.stream[0][:positions])
        return effects

    def _past(self, pieces: Pieces, layer: int, gradient: Tensor, seeds: Tensor) -> Tensor:
        """The gradient by a block's input, of the targets above it and then of those that read in it."""
        skip = self._sources.skip(layer) if layer in self._sources.set.layers else None
        above = _pulled(pieces.outputs[layer], pieces.inputs[layer], gradient)
        if skip is not None and len(gradient):
            above = above + _pulled(pieces.reads[layer], pieces.inputs[layer], gradient @ skip)
        return torch.cat([above, _pulled(pieces.reads[layer], pieces.inputs[layer], seeds)])

    def _seeds(self, targets: Targets, layer: int, positions: int) -> Tensor:
        """Gradients [n', p, D] of the targets of one layer, where they are read."""
        own = (targets.layer == layer).nonzero()[:, 0]
        # Layers descend, so the targets of one are neighbours.
        low, high = (int(own[0]), int(own[-1]) + 1) if len(own) else (0, 0)
        vectors, at = targets.vector[low:high], targets.position[low:high].to(targets.vector.device)
        found = vectors.new_zeros(high - low, positions, vectors.shape[1])
        found[torch.arange(high - low, device=at.device), at] = vectors
        return found


def _met(gradient: Tensor, written: Tensor) -> Tensor:
    """What one writer per position [p, D] adds to each target [n, p]."""
    return torch.einsum("npd,pd->np", gradient, written)


def _pulled(output: Tensor, leaf: Tensor, gradients: Tensor) -> Tensor:
    """Gradients [n, p, D] by a leaf, of n gradients by what it became."""
    if not len(gradients) or output is leaf:
        return gradients
    (found,) = torch.autograd.grad(output, leaf, gradients, retain_graph=True, is_grads_batched=True)
    return found
