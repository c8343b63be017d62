"""A mesh whose ranks are threads of one process, for tests of what crosses it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from winnow.trainer.mesh.world import Axis, Pending, World

PATIENCE = 60
"""Seconds after which a rank that waits in vain fails."""


class Meeting(Axis):
    """An axis of threads that meet at a barrier and lay what they bring on a table."""

    def __init__(self, rank: int, barrier: threading.Barrier, table: list[Any]) -> None:
        super().__init__(None, rank, len(table))
        self.barrier, self.table, self.gathers = barrier, table, 0

    def _all(self, mine: Any) -> list[Any]:
        self.table[self.rank] = mine
        self.barrier.wait(PATIENCE)
        found = list(self.table)
        self.barrier.wait(PATIENCE)
        return found

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        self.gathers += 1
        return torch.stack(self._all(tensor.clone()))

    def gather_start(self, tensor: torch.Tensor) -> Pending:
        return Pending(self.gather(tensor))

    def sum_start(self, tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> Pending:
        return Pending(self.sum(tensor) if op == dist.ReduceOp.SUM else self.largest(tensor))

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.stack(self._all(tensor.clone())).sum(0))

    def largest(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.stack(self._all(tensor.clone())).amax(0))

    def spread(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(self._all(tensor.clone())[0])

    def share(self, text: str) -> list[str]:
        return self._all(text)


def meet(data: int, latent: int, work: Callable[[World], Any]) -> list[list[Any]]:
    """What `work(world)` gives, or the error that it raises, on every rank of a mesh: [data][latent]."""

    def lines(count: int, size: int) -> list[tuple[threading.Barrier, list[Any]]]:
        return [(threading.Barrier(size), [None] * size) for _ in range(count)]

    rows, columns, (whole, files) = lines(data, latent), lines(latent, data), lines(2, data * latent)
    found: list[list[Any]] = [[None] * latent for _ in range(data)]

    def run(place: int, shard: int) -> None:
        rank = place * latent + shard
        axes = Meeting(place, *columns[shard]), Meeting(shard, *rows[place])
        world = World(*axes, Meeting(rank, *whole), Meeting(rank, *files))
        try:
            found[place][shard] = work(world)
        except Exception as error:
            found[place][shard] = error

    threads = [threading.Thread(target=run, args=(d, s)) for d in range(data) for s in range(latent)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
