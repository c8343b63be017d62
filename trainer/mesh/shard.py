"""The latents of an SAE that one rank holds, and their output together with those of other ranks.

Legend: B rows, D d_model, O width of the output, N latents of all shards, n of this one, S shards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.sae.init import Place
from winnow.sae.model import Sae
from winnow.schemas.training import SaeCard
from winnow.store.objects import ObjectStore
from winnow.trainer.mesh.topk import count_kept
from winnow.trainer.mesh.world import World

# bounds the copy on the host of a tensor that is on a GPU
SENT_BYTES = 64 << 20
"""Bytes of rows sent at a time when a whole SAE is assembled."""
WITH_LATENTS = {"W_enc", "b_enc", "W_dec", "threshold", "since"}
"""Tensors with one row per latent; the same words are in the names of their moments and averages."""


def has_latents(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of an SAE or a checkpoint has one row per latent of the shard."""
    # BatchTopK has one threshold for all latents, a scalar; JumpReLU one per latent
    return tensor.ndim > 0 and not WITH_LATENTS.isdisjoint(name.split("."))


@dataclass(frozen=True)
class Shard:
    """An SAE of this rank's latents, and their place in the whole; on one process, the whole.

    `select` gives this shard's part of the whole SAE's codes, `reconstruct` the whole reconstruction. Both
    are collectives over the latent axis, and differentiable.
    """

    sae: Sae
    """n latents; everything else as in the whole."""
    world: World
    latents: int
    """N."""

    @classmethod
    def alone(cls, sae: Sae) -> Shard:
        """A whole SAE as the only shard."""
        return cls(sae, World(), sae.latents)

    @property
    def part(self) -> range:
        """The latents of N that this rank holds."""
        return self.world.part(self.latents)

    @property
    def place(self) -> Place:
        """For `winnow.sae.init`."""
        return Place(self.latents, self.part, self.output)

    def having(self, tensors: Mapping[str, Tensor]) -> Shard:
        """Another shard at the same place, with these tensors."""
        sae = self.sae.twin()
        sae.fill(tensors)
        return Shard(sae, self.world, self.latents)

    def select(self, x: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        """Codes of normalised rows [B, D], numbered from this shard's first latent; 0 in empty slots."""
        if k is None and self.sae.parts.traits.selects != "row":
            # a threshold decides for each latent alone, so no other shard is asked
            return self.sae.select(x)
        k = self.sae.k if k is None else k
        return self.cut(*self.sae.select(x, min(k, self.sae.latents)), k)

    def cut(self, values: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """This shard's best min(k, n) [B, w], descending, cut to those among the best k of all shards."""
        if self.world.latent.size == 1:
            return values, indices
        sizes = [min(k, len(part)) for part in self.world.parts(self.latents)]
        # the choice has no gradient; it flows through the values that are kept
        kept = count_kept(values.detach(), k, sizes, self.world.latent).kept
        slot = torch.arange(values.shape[1], device=values.device)
        return torch.where(slot < kept[:, None], values, 0.0), indices

    def reconstruct(self, values: Tensor, indices: Tensor | None, x: Tensor | None = None) -> Tensor:
        """Normalised output [B, O] from every shard's codes; see `Sae.reconstruct`."""
        sae, latent = self.sae, self.world.latent
        if latent.size == 1:
            return sae.reconstruct(values, indices, x)
        if indices is None:
            return sae.add_bias(latent.joined(values @ sae.W_dec), x)
        # bias and linear path are replicated, so they are added once, after the sum
        x_hat = F.embedding_bag(indices, sae.W_dec, per_sample_weights=values, mode="sum")
        return sae.add_bias(latent.joined(x_hat), x)

    def output(self, x: Tensor, k: int | None = None) -> Tensor:
        """The whole SAE's output [B, O] of normalised rows [B, D]."""
        return self.reconstruct(*self.select(x, k), x)

    # ---- storage ---------------------------------------------------------------------------------

    def save(self, store: ObjectStore, **facts: Any) -> SaeCard:
        """See `Sae.save`: the leading rank receives the others' rows, block by block, and writes."""
        whole = self._assemble()
        card = whole.save(store, **facts).to_json().decode() if whole is not None else ""
        # also keeps every rank here until the file is written
        told = self.world.whole.share(card)[0]
        return SaeCard.from_json(told.encode(), origin="the rank that leads")

    def _assemble(self) -> Sae | None:
        """The whole SAE in the leading rank's memory; None on all others."""
        world, sae, rows = self.world, self.sae, len(self.part)
        if world.latent.size == 1:
            return sae if world.leads else None
        whole = Sae(sae.d_model, self.latents, sae.k, sae.normalize_mode, sae.parts) if world.leads else None
        into = whole.tensors() if whole is not None else {}
        for name, tensor in sae.tensors().items():
            if not has_latents(name, tensor):
                if whole is not None:
                    into[name].copy_(tensor)
                continue
            # both sides compute the same cuts, since each send needs its receive
            step = max(1, SENT_BYTES // tensor[:1].nbytes)
            if whole is not None:
                into[name][:rows].copy_(tensor)
                for source, part in enumerate(world.parts(self.latents)):
                    for first in range(part.start, part.stop, step) if source else ():
                        world.whole.receive(into[name][first : min(first + step, part.stop)], source)
            # data ranks hold copies of the same shards, so only the first of each sends
            elif world.data.rank == 0:
                for first in range(0, rows, step):
                    world.whole.send(tensor[first : first + step].cpu().contiguous(), 0)
        return whole
