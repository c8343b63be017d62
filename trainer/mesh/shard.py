"""A shard of an SAE that answers for the whole of it, and a folder that only one rank writes to.

Legend: B rows, D d_model, N latents of all shards, n of this one, S shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from winnow.sae.model import Sae
from winnow.schemas.training import Normalize, SaeCard, SaeParts
from winnow.store.objects import Data, Digest, ObjectStore, Pieces, Ready
from winnow.trainer.mesh.topk import count_kept, keep
from winnow.trainer.mesh.world import World

SENT_BYTES = 64 << 20
"""Rows sent at a time when a whole SAE is put together."""


WITH_LATENTS = {"W_enc", "b_enc", "W_dec", "threshold", "since"}
"""Tensors that have one row for each latent, and Adam's and the average's of these."""


def has_latents(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of `pack` has one row for each latent of the shard."""
    return tensor.ndim > 0 and not WITH_LATENTS.isdisjoint(name.split("."))


class Shard(Sae):
    """The latents of an SAE that this rank holds.

    `select` gives this shard's part of the whole SAE's codes, `reconstruct` the whole reconstruction; both
    are collectives over the latent axis, without gradients.

    Args:
        d_model: Width D.
        latents: N.
        k: Active latents a row, of all shards.
        normalize: See `Sae`.
        parts: See `Sae`.
        world: The mesh.
        device: Where the tensors live.
        dtype: Their type.
    """

    def __init__(
        self,
        d_model: int,
        latents: int,
        k: int,
        normalize: Normalize,
        parts: SaeParts | None,
        world: World,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.world, self.of, self.part = world, latents, world.part(latents)
        super().__init__(d_model, len(self.part), k, normalize, parts, device=device, dtype=dtype)

    def twin(self) -> Shard:
        """See `Sae.twin`."""
        kind: dict[str, Any] = {"device": self.W_enc.device, "dtype": self.W_enc.dtype}
        return Shard(self.d_model, self.of, self.k, self.normalize_mode, self.parts, self.world, **kind)

    @torch.no_grad()
    def select(self, x: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        """This shard's codes of normalised rows [B, D], numbered from its first latent; 0 in empty slots."""
        if k is None and self.parts.activation != "topk":
            return super().select(x)  # a threshold asks no other shard
        k = self.k if k is None else k
        values, indices = super().select(x, min(k, self.latents))
        sizes = [min(k, len(part)) for part in self.world.parts(self.of)]
        kept = count_kept(values, k, sizes, self.world.latent).kept
        return keep(values, indices, kept)

    @torch.no_grad()
    def reconstruct(self, values: Tensor, indices: Tensor | None, x: Tensor | None = None) -> Tensor:
        """Normalised output [B, O] from every shard's codes."""
        if indices is None:
            x_hat = values @ self.W_dec
        else:
            x_hat = F.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum")
        return self.add_bias(self.world.latent.sum(x_hat.contiguous()), x)

    def save(self, store: ObjectStore, **facts: Any) -> SaeCard:
        """See `Sae.save`: the rank that leads takes in the others' rows, block by block, and writes."""
        whole = self._assemble()
        card = whole.save(store, **facts).to_json().decode() if whole is not None else ""
        told = self.world.whole.share(card)[0]
        return SaeCard.from_json(told.encode(), origin="the rank that leads")

    def _assemble(self) -> Sae | None:
        """The whole SAE in the leading rank's memory; null elsewhere."""
        world, mine = self.world, self.tensors()
        whole = Sae(self.d_model, self.of, self.k, self.normalize_mode, self.parts) if world.leads else None
        into = whole.tensors() if whole is not None else {}
        for name, tensor in mine.items():
            rows = len(self.part)
            if not has_latents(name, tensor):
                if whole is not None:
                    into[name].copy_(tensor)
                continue
            step = max(1, SENT_BYTES // tensor[:1].nbytes)
            if whole is not None:
                into[name][: len(self.part)].copy_(tensor)
                for source, part in enumerate(world.parts(self.of)):
                    for first in range(part.start, part.stop, step) if source else ():
                        world.whole.receive(into[name][first : min(first + step, part.stop)], source)
            elif world.data.rank == 0:
                for first in range(0, rows, step):
                    world.whole.send(tensor[first : first + step].cpu().contiguous(), 0)
        return whole


class Witness(ObjectStore):
    """A folder that another rank writes to: reads are as ever, writes do nothing.

    Args:
        store: The folder.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store, self.uri = store, store.uri

    def put_new(
        self, key: str, data: Data | Pieces, ready: Ready | None = None, digest: Digest | None = None
    ) -> bool:
        """Nothing."""
        del key, data, ready, digest
        return True

    def put(self, key: str, data: Data) -> None:
        """Nothing."""
        del key, data

    def delete(self, key: str) -> None:
        """Nothing."""
        del key

    def get(self, key: str, limit: int = 1 << 31) -> bytes:
        """See `ObjectStore.get`."""
        return self._store.get(key, limit)

    def get_range(self, key: str, start: int, end: int) -> bytes | memoryview:
        """See `ObjectStore.get_range`."""
        return self._store.get_range(key, start, end)

    def get_ranges(self, key: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes | memoryview]:
        """See `ObjectStore.get_ranges`."""
        return self._store.get_ranges(key, starts, ends)

    def get_suffix(self, key: str, length: int) -> bytes | memoryview:
        """See `ObjectStore.get_suffix`."""
        return self._store.get_suffix(key, length)

    def size(self, key: str) -> int | None:
        """See `ObjectStore.size`."""
        return self._store.size(key)

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """See `ObjectStore.list`."""
        return self._store.list(prefix)

    def child(self, prefix: str) -> ObjectStore:
        """See `ObjectStore.child`."""
        return Witness(self._store.child(prefix))
