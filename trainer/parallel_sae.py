"""A shard of an SAE that answers for the whole of it, and a folder that only one rank writes to.

Legend: B rows, D d_model, N latents of all shards, n of this one, S shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from schemas.training import Normalize
from store.objects import Data, ObjectStore, Pieces
from trainer.parallel import World
from trainer.parallel_topk import count_kept, keep
from trainer.sae import Sae


class Shard(Sae):
    """The latents of a TopK SAE that this rank holds.

    `select` gives this shard's part of the whole SAE's codes, `reconstruct` the whole reconstruction; both
    are collectives over the latent axis, without gradients.

    Args:
        d_model: Width D.
        latents: N.
        k: Active latents a row, of all shards.
        normalize: See `Sae`.
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
        world: World,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.world, self.of, self.part = world, latents, world.part(latents)
        super().__init__(d_model, len(self.part), k, normalize, device=device, dtype=dtype)

    def twin(self) -> Shard:
        """See `Sae.twin`."""
        device, dtype = self.W_enc.device, self.W_enc.dtype
        return Shard(
            self.d_model, self.of, self.k, self.normalize_mode, self.world, device=device, dtype=dtype
        )

    @torch.no_grad()
    def select(self, x: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        """This shard's codes of normalised rows [B, D], numbered from its first latent; 0 in empty slots."""
        k = self.k if k is None else k
        values, indices = super().select(x, min(k, self.latents))
        sizes = [min(k, len(part)) for part in self.world.parts(self.of)]
        kept = count_kept(values, k, sizes, self.world.latent).kept
        return keep(values, indices, kept)

    @torch.no_grad()
    def reconstruct(self, values: Tensor, indices: Tensor, x: Tensor | None = None) -> Tensor:
        """Normalised rows [B, D] from every shard's codes."""
        x_hat = F.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum")
        return self.add_bias(self.world.latent.sum(x_hat.detach()), x)


class Witness(ObjectStore):
    """A folder that another rank writes to: reads are as ever, writes do nothing.

    Args:
        store: The folder.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store, self.uri = store, store.uri

    def put_new(self, key: str, data: Data | Pieces) -> bool:  # noqa: ARG002
        """Nothing."""
        return True

    def put(self, key: str, data: Data) -> None:
        """Nothing."""

    def delete(self, key: str) -> None:
        """Nothing."""

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
