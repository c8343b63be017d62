"""Several processes that train one SAE: a mesh of two axes, and every collective that crosses it.

Legend: S shards of the latents, P ranks of the data axis, N latents.

A mesh has the axes `data` (the batch is split by lanes) and `latent` (rows of W_enc, W_dec and b_enc are
split; b_pre is replicated). Rank r is at (r // S, r % S), so the shards of one batch are neighbours. A single
process is the mesh 1 x 1, whose collectives do nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from winnow.common.reporter import reporting
from winnow.schemas.errors import ConfigError, WorkerError
from winnow.schemas.training import TrainSpec
from winnow.trainer.mesh.fit import check_mesh

T = TypeVar("T")
# for a rank that hangs: one that dies breaks the connections of the others at once (tests/faults)
SILENCE = timedelta(minutes=15)
"""Collective timeout; on expiry a rank is presumed lost and the others stop."""
# any mesh reads any checkpoint, so the lost machine need not come back
AGAIN = "Start the same command again, on this mesh or another: it resumes from the newest checkpoint"


_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch renamed it


class Launch(NamedTuple):
    """How this process was started; by default, alone."""

    rank: int = 0
    """Of all processes."""
    size: int = 1
    """Processes in all."""
    local_rank: int = 0
    """Of the processes on this machine; selects this one's GPU."""


def launch_of(environment: Mapping[str, str]) -> Launch:
    """This process's place among those that torchrun or the trainer service has started; otherwise alone.

    Raises:
        ConfigError: The variables are not numbers, or RANK is not below WORLD_SIZE.
    """
    try:
        rank, size, local = (
            int(environment.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
    except ValueError as error:
        raise ConfigError("RANK, WORLD_SIZE, LOCAL_RANK", expected="numbers", got=error) from error
    if not 0 <= rank < size:
        raise ConfigError("RANK", expected=f"0 to WORLD_SIZE - 1 = {size - 1}", got=rank)
    return Launch(rank, size, local)


@contextmanager
def only_the_first_tells(launch: Launch) -> Iterator[None]:
    """Show progress and the trainer's warnings on the first rank only; errors on every rank."""
    if launch.rank == 0:
        yield
        return
    # the trainer's only, whose warnings are the same on every rank; the store's come from each, since a full
    # cache is that machine's own
    log = logging.getLogger("winnow.trainer")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with reporting(None):
            yield
    finally:
        log.setLevel(before)


@contextmanager
def _peers() -> Iterator[None]:
    """Report a collective that breaks as a lost rank."""
    try:
        yield
    # gloo and NCCL raise RuntimeError for a lost connection as for an expired timeout
    except RuntimeError as error:
        lines = str(error).strip().splitlines()
        raise WorkerError(
            "another rank of the mesh is lost", got=lines[0] if lines else error, fix=AGAIN
        ) from error


class Pending:
    """A collective under way; `wait` gives its result."""

    def __init__(self, result: Tensor, work: dist.Work | None = None) -> None:
        self._result, self._work = result, work

    def wait(self) -> Tensor:
        """Block until the result is available; on a GPU, only its stream waits."""
        if self._work is not None:
            with _peers():
                self._work.wait()
        return self._result


class Axis:
    """One axis of the mesh: its collectives, and the bytes they send.

    Args:
        group: The ranks on the axis; None if this rank is alone on it.
        rank: This process's place on the axis.
        size: Places on the axis.

    Collectives take contiguous tensors; every rank of the axis calls the same ones in the same order.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, rank: int = 0, size: int = 1) -> None:
        self._group, self.rank, self.size = group, rank, size
        self.bytes_sent = 0
        """Bytes that this rank has sent, by the arithmetic of a ring: 2 (n-1)/n of the tensor for a sum, n-1
        tensors for a gather, (n-1)/n of it, on average over the ranks, for a broadcast."""

    def sum_start(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending:
        """Start to sum a tensor over the axis, in place; it must not be used before `wait` returns."""
        if self.size == 1:
            return Pending(tensor)
        self.bytes_sent += 2 * (self.size - 1) * tensor.nbytes // self.size
        with _peers():
            work = dist.all_reduce(tensor, op=op, group=self._group, async_op=True)
        return Pending(tensor, work)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the axis, in place."""
        return self.sum_start(tensor).wait()

    def largest(self, tensor: Tensor) -> Tensor:
        """The elementwise largest over the axis, in place."""
        return self.sum_start(tensor, dist.ReduceOp.MAX).wait()

    def joined(self, tensor: Tensor) -> Tensor:
        """The sum over the axis of each rank's tensor, differentiable."""
        return tensor if self.size == 1 else _Joined.apply(tensor, self)  # pyright: ignore[reportReturnType]

    def common(self, tensor: Tensor) -> Tensor:
        """A tensor that is the same on every rank, each using it for its share; sums its gradients."""
        return tensor if self.size == 1 else _Common.apply(tensor, self)  # pyright: ignore[reportReturnType]

    def gather_start(self, tensor: Tensor) -> Pending:
        """Start to gather tensors of one shape: [size, *shape], in the order of the ranks."""
        if self.size == 1:
            return Pending(tensor[None])
        self.bytes_sent += (self.size - 1) * tensor.nbytes
        out = tensor.new_empty(self.size, *tensor.shape)
        # all ranks have the same shape, so either all of them skip the collective or none does
        if not tensor.numel():
            return Pending(out)
        with _peers():
            # flat, since the operation concatenates along the first dimension; a view, as `out` is contiguous
            work = _gather(out.flatten(), tensor.flatten(), group=self._group, async_op=True)
        return Pending(out, work)

    def gather(self, tensor: Tensor) -> Tensor:
        """[size, *shape], in the order of the ranks."""
        return self.gather_start(tensor).wait()

    def spread(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor on all of them, in place."""
        if self.size > 1:
            self.bytes_sent += (self.size - 1) * tensor.nbytes // self.size
            with _peers():
                dist.broadcast(tensor, group=self._group, group_src=0)
        return tensor

    def send(self, tensor: Tensor, to: int) -> None:
        """Send a tensor to one rank of the axis, which receives it."""
        assert self._group is not None
        self.bytes_sent += tensor.nbytes
        with _peers():
            dist.send(tensor, dist.get_global_rank(self._group, to), group=self._group)

    def receive(self, into: Tensor, source: int) -> None:
        """Fill a tensor with what a rank of the axis sends."""
        assert self._group is not None
        with _peers():
            dist.recv(into, dist.get_global_rank(self._group, source), group=self._group)

    def share(self, text: str) -> list[str]:
        """Every rank's text; for causes and digests, not for every step."""
        if self.size == 1:
            return [text]
        found: list[str] = [""] * self.size
        with _peers():
            # torch pickles it, but only the processes of one run see it: nothing is stored or read
            dist.all_gather_object(found, text, group=self._group)
        return found


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:  # noqa: ARG004
        # a copy, since the sum is in place and autograd may still need the tensor
        return axis.sum(tensor.detach().clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        # everything after the sum is the same on every rank, so each summand has the gradient of the sum
        return grads[0], None


class _Common(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # each rank computed the gradient of its own share only
        return ctx.axis.sum(grads[0].clone(memory_format=torch.contiguous_format)), None


class World:
    """This process's place in the mesh.

    Args:
        data: The data axis.
        latent: The latent axis.
        whole: All ranks, on the CPU, for agreements and causes.
        files: All ranks, on the CPU, for the thread that writes checkpoints.
    """

    def __init__(
        self,
        data: Axis | None = None,
        latent: Axis | None = None,
        whole: Axis | None = None,
        files: Axis | None = None,
    ) -> None:
        self.data, self.latent = data or Axis(), latent or Axis()
        # two groups: those of one are matched by their order, and there is none between two threads
        self.whole, self.files = whole or Axis(), files or Axis()
        self.exchange: Literal["auto", "rows", "dense"] = "auto"
        """How gradients cross the data axis; `auto` sends less. See `winnow.trainer.mesh.exchange`."""

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.data.size * self.latent.size

    @property
    def meshed(self) -> bool:
        """Whether there is more than one process."""
        return self.size > 1

    @property
    def leads(self) -> bool:
        """Whether this is the one rank that writes telemetry, summary and the published SAE."""
        return self.data.rank == self.latent.rank == 0

    @cached_property
    def writer(self) -> ThreadPoolExecutor:
        """The one thread that writes checkpoints and uses `files`; every rank writes in the same order."""
        return ThreadPoolExecutor(1, thread_name_prefix="winnow-checkpoint")

    def close(self) -> None:
        """Wait for the writer to finish and stop it."""
        self.writer.shutdown()

    def parts(self, latents: int) -> list[range]:
        """The latents of N that each shard holds; their sizes differ by one unless S divides N."""
        size = self.latent.size
        return [range(place * latents // size, (place + 1) * latents // size) for place in range(size)]

    def each(self, items: Iterator[T]) -> Iterator[T]:
        """The items, equally many on every rank; see `together` for failures."""
        while True:
            with self.together():
                item = next(items, None)
            if item is None:
                return
            yield item

    def part(self, latents: int) -> range:
        """The latents of N that this rank holds."""
        return self.parts(latents)[self.latent.rank]

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank."""
        if self.size == 1:
            return list(flags)
        # bytes on the CPU: an agreement must not wait for work that a GPU has queued
        return [bool(flag) for flag in self.whole.largest(torch.tensor(flags, dtype=torch.uint8)).tolist()]

    @contextmanager
    def together(self) -> Iterator[None]:
        """If one rank fails inside, fail on all of them, with its cause. Must not contain a collective.

        Raises:
            WorkerError: Another rank failed; the rank that failed raises its own error.
        """
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:  # an interrupt, too, must not leave the others waiting
            error = caught
        if self.any(error is not None)[0]:
            # texts are exchanged only after a failure; without one, a step costs a single flag
            causes = self.whole.share(f"{type(error).__name__}: {error}" if error else "")
            if error is None:
                rank, cause = next((rank, cause) for rank, cause in enumerate(causes) if cause)
                raise WorkerError(
                    f"rank {rank} of the mesh failed, so all of them stop", got=cause.rstrip(".")
                )
        # only after both exchanges, in which the others wait for this rank
        if error is not None:
            raise error


@contextmanager
def open_world(spec: TrainSpec, device: torch.device, launch: Launch) -> Iterator[World]:
    """Connect to the other processes and arrange them as a mesh; a single process connects to none.

    Args:
        spec: Its `mesh` is read.
        device: This rank's device; tensors on a GPU travel by NCCL, those on the CPU by gloo.
        launch: This process's place among all. The address to meet at is in torchrun's environment.

    Raises:
        ConfigError: See `check_mesh`.
        WorkerError: The others cannot be reached.
    """
    data, latent = check_mesh(spec, launch.size)
    if launch.size == 1:
        with closing(World()) as alone:
            yield alone
        return
    # flags and causes are on the CPU on a machine with GPUs, too
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        # before the group exists: otherwise NCCL would take GPU 0 for every rank
        torch.cuda.set_device(device)
    with _peers():
        dist.init_process_group(backend, rank=launch.rank, world_size=launch.size, timeout=SILENCE)
    try:
        with _peers():
            world = lay_mesh(device.type, data, latent)
        # the writer ends first, since its last checkpoint needs the group
        with closing(world):
            yield world
    finally:
        dist.destroy_process_group()


def lay_mesh(device_type: str, data: int, latent: int) -> World:
    """Arrange all ranks of the default process group as a mesh."""
    mesh = init_device_mesh(device_type, (data, latent), mesh_dim_names=("data", "latent"))
    return World(
        Axis(mesh.get_group("data"), mesh.get_local_rank("data"), data),
        Axis(mesh.get_group("latent"), mesh.get_local_rank("latent"), latent),
        # torch requires every rank to create groups in the same order: `whole`, then `files`
        _everyone(),
        _everyone(),
    )


def _everyone() -> Axis:
    """All ranks, on the CPU, in a new group."""
    group = dist.new_group(backend="gloo", timeout=SILENCE)
    assert isinstance(group, dist.ProcessGroup), "every rank is a member"
    return Axis(group, dist.get_rank(), dist.get_world_size())
