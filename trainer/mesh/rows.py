"""One read of the store for all shards of a data rank: the first of them reads, the others are sent its rows.

Ranks that hold different latents train on the same rows. If each of them read the store, a mesh of S shards
would read, check, shuffle and hold everything S times.

Legend: B rows of a rank, D width of a hook, S shards.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping

import torch

from winnow.common.closing import Closing
from winnow.store.read.torch_stream import Batch, Stream
from winnow.trainer.mesh.world import World

# long enough to cost nothing, short enough that a stop or a lost rank is noticed while a harvest is slow
IDLE_SECONDS = 1.0
"""Seconds between two calls of `idle`."""


class SharedRows(Closing):
    """An iterator of a data rank's batches, the same on all its shards; every rank takes equally many.

    Args:
        open_stream: Opens the stream; called only on the ranks that read.
        like: Of each hook an empty tensor [0, W] with the type and the width W of its rows.
        rows: B.
        first: Step of the first batch.
        device: Where batches are put if they are sent; a lone reader's stay in host memory.
        world: The mesh. Data that one rank cannot read stops all of them.
        idle: For a dataset that is followed: called every second, on every rank, while rows are awaited. An
            exception ends the wait. It may contain a collective.
    """

    def __init__(
        self,
        open_stream: Callable[[], Stream],
        like: Mapping[str, torch.Tensor],
        rows: int,
        first: int,
        device: torch.device,
        world: World,
        idle: Callable[[], None] | None = None,
    ) -> None:
        self._like, self._rows, self._step = dict(like), rows, first
        self._device, self._world, self._idle = device, world, idle
        self._seen: deque[Batch] = deque()
        self._stream: Stream | None = None
        # a store that one rank cannot open stops all of them; the others would wait for its first batch
        with world.together():
            if world.latent.rank == 0:
                self._stream = open_stream()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._seen.popleft() if self._seen else self._take()

    def peek(self, count: int) -> list[Batch]:
        """The next batches, which the iterator will still return."""
        while len(self._seen) < count:
            self._seen.append(self._take())
        return list(self._seen)[:count]

    def _take(self) -> Batch:
        # before `next`, which blocks until the harvest has written more: no rank could then notice a stop
        while self._idle is not None and self._awaited():
            self._idle()
        with self._world.together():
            batch = next(self._stream) if self._stream is not None else None
        self._step += 1
        if self._world.latent.size == 1:
            assert batch is not None
            return batch
        device, spread = self._device, self._world.latent.spread
        if batch is None:
            # of the shapes that the reader sends; a broadcast fills it in place
            rows = {n: a.new_empty(self._rows, a.shape[1], device=device) for n, a in self._like.items()}
            batch = Batch(rows, torch.empty(self._rows, device=device), self._step - 1)
        rows = {hook: spread(batch.rows[hook].to(device)) for hook in self._like}
        return Batch(rows, spread(batch.weights.to(device)), batch.step)

    def _awaited(self) -> bool:
        """Whether any rank still awaits its rows, after waiting for up to `IDLE_SECONDS`."""
        with self._world.together():
            ready = self._stream is None or self._stream.ready(IDLE_SECONDS)
        # all ranks leave the wait in the same round, since `idle` may contain a collective
        return self._world.any(not ready)[0]

    @property
    def bytes_read(self) -> int:
        """Bytes that this rank has read from storage so far."""
        return self._stream.bytes_read if self._stream is not None else 0

    @property
    def memory_bytes(self) -> int:
        """Memory of this rank's buffers, in bytes."""
        return self._stream.memory_bytes if self._stream is not None else 0

    def close(self) -> None:
        """Stop reading and free the buffers."""
        if self._stream is not None:
            self._stream.close()
