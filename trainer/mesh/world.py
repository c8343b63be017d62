"""Several processes that train one SAE: a mesh of two axes, and every collective that crosses it.

Legend: S shards of the latents, P ranks of the data axis, N latents.

A mesh has the axes `data` (the batch is split by lanes) and `latent` (rows of W_enc, W_dec and b_enc are
split; b_pre is everywhere). Rank r stands at place (r // S, r % S), so the shards of one batch are
neighbours. A process alone is the mesh 1 x 1, whose collectives do nothing.
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

T = TypeVar("T")
SILENCE = timedelta(minutes=15)
"""Collective timeout; on expiry a rank is presumed lost and the others stop."""
AGAIN = "Start the same command again, on this mesh or another: it resumes from the newest checkpoint"


_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch renamed it


class Launch(NamedTuple):
    """How this process was started; alone where nothing says otherwise."""

    rank: int = 0
    """Of all processes."""
    size: int = 1
    """Processes in all."""
    local_rank: int = 0
    """Of the processes on this machine: which GPU is ours."""


def launch_of(environment: Mapping[str, str]) -> Launch:
    """This process's place among those that torchrun, or the trainer service, has started; else alone.

    Raises:
        ConfigError: Variables that are no such place.
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
    """Progress and the trainer's warnings come from one rank, since each has the same; errors from each.

    The store's warnings come from each, too: a cache that is full is that machine's own.
    """
    if launch.rank == 0:
        yield
        return
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
    """A collective that breaks is a lost rank, in words."""
    try:
        yield
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
        """Block (a GPU: its stream) until the result is there."""
        if self._work is not None:
            with _peers():
                self._work.wait()
        return self._result


class Axis:
    """One direction of the mesh: its collectives, and the bytes they send.

    Args:
        group: The ranks that meet here; None where this rank is alone.
        rank: This process's place on the axis.
        size: Places on the axis.

    Collectives take contiguous tensors; every rank of the axis calls the same ones in the same order.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, rank: int = 0, size: int = 1) -> None:
        self._group, self.rank, self.size = group, rank, size
        self.bytes_sent = 0
        """Bytes that this rank has put on the wire, by the arithmetic of a ring: 2 (n-1)/n of the tensor
        for a sum, n-1 tensors for a gather, (n-1)/n of it, taken over the ranks, where one spreads it."""

    def sum_start(self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Pending:
        """Begin to sum a tensor over the axis, in place; it must not be touched until waited for."""
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
        """The sum over the axis of what each rank adds, differentiable.

        What comes after it is the same on every rank, so each rank's share has the gradient of the sum.
        """
        return tensor if self.size == 1 else _Joined.apply(tensor, self)  # pyright: ignore[reportReturnType]

    def common(self, tensor: Tensor) -> Tensor:
        """A tensor that every rank has alike and uses for its own share; gradients are summed backward."""
        return tensor if self.size == 1 else _Common.apply(tensor, self)  # pyright: ignore[reportReturnType]

    def gather_start(self, tensor: Tensor) -> Pending:
        """Begin to gather tensors of one shape: [size, *shape], in the order of the ranks."""
        if self.size == 1:
            return Pending(tensor[None])
        self.bytes_sent += (self.size - 1) * tensor.nbytes
        out = tensor.new_empty(self.size, *tensor.shape)
        if not tensor.numel():
            return Pending(out)
        with _peers():
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
        """Every rank's text; for causes and digests, not for the hot path."""
        if self.size == 1:
            return [text]
        found: list[str] = [""] * self.size
        with _peers():
            dist.all_gather_object(found, text, group=self._group)
        return found


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:  # noqa: ARG004
        return axis.sum(tensor.detach().clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grads[0], None


class _Common(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.axis.sum(grads[0].clone(memory_format=torch.contiguous_format)), None


class World:
    """This process's place in the mesh.

    Args:
        data: The data axis.
        latent: The latent axis.
        whole: All ranks, on the CPU: agreements and causes.
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
        self.whole, self.files = whole or Axis(), files or Axis()
        self.exchange: Literal["auto", "rows", "dense"] = "auto"
        """How gradients cross the data axis; `auto` sends less. See `winnow.trainer.mesh.exchange`."""

    @property
    def size(self) -> int:
        """Processes in all."""
        return self.data.size * self.latent.size

    @property
    def meshed(self) -> bool:
        """Whether there is anybody else."""
        return self.size > 1

    @property
    def leads(self) -> bool:
        """Whether this is the one rank that writes telemetry, summary and the published SAE."""
        return self.data.rank == self.latent.rank == 0

    @cached_property
    def writer(self) -> ThreadPoolExecutor:
        """The one thread that writes checkpoints: `files` is its, and every rank writes in the same order."""
        return ThreadPoolExecutor(1, thread_name_prefix="winnow-checkpoint")

    def close(self) -> None:
        """Wait for the writer and let it go."""
        self.writer.shutdown()

    def parts(self, latents: int) -> list[range]:
        """The latents of N that each shard holds; shards differ by one where S does not divide N."""
        size = self.latent.size
        return [range(place * latents // size, (place + 1) * latents // size) for place in range(size)]

    def each(self, items: Iterator[T]) -> Iterator[T]:
        """The items, of which every rank has as many; see `together` for what fails."""
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
        return [bool(flag) for flag in self.whole.largest(torch.tensor(flags, dtype=torch.uint8)).tolist()]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails inside on one rank fails on all of them, with its cause. No collective inside.

        Raises:
            WorkerError: Another rank failed; the one that did raises its own error.
        """
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:  # an interrupt, too, must not leave the others waiting
            error = caught
        if self.any(error is not None)[0]:
            causes = self.whole.share(f"{type(error).__name__}: {error}" if error else "")
            if error is None:
                rank, cause = next((rank, cause) for rank, cause in enumerate(causes) if cause)
                raise WorkerError(
                    f"rank {rank} of the mesh failed, so all of them stop", got=cause.rstrip(".")
                )
        if error is not None:
            raise error


def check_mesh(spec: TrainSpec, world_size: int) -> tuple[int, int]:
    """The mesh (data, latent) of a spec for a number of processes.

    Raises:
        ConfigError: They do not fit each other, the lanes, the latents or the kernels.
    """
    latent = spec.mesh.latent
    data = spec.mesh.data or max(1, world_size // latent)
    if data * latent != world_size:
        raise ConfigError(
            f"train.mesh of {data} x {latent} (data x latent)",
            expected=f"{data * latent} processes",
            got=world_size,
            fix=f"Start `torchrun --nproc-per-node {data * latent} -m winnow.trainer CONFIG` "
            f"(`winnow estimate --count {data * latent}`), or set train.mesh",
        )
    if spec.lanes % data:
        raise ConfigError("train.mesh.data", expected=f"a divisor of lanes ({spec.lanes})", got=data)
    if latent > spec.latents:
        raise ConfigError("train.mesh.latent", expected=f"at most latents ({spec.latents})", got=latent)
    shares = data * spec.accumulate
    if spec.accumulate > 1 and spec.traits.selects == "batch" and spec.groups % shares:
        raise ConfigError(
            f"selection_groups: {spec.groups}",
            expected=f"a multiple of data x accumulate ({data} x {spec.accumulate})",
            got=spec.groups,
            fix="Set another accumulate: batchtopk selects in whole groups of a micro-batch",
        )
    if world_size > 1 and spec.kernels == "eager" and spec.traits.selects:
        raise ConfigError(
            "kernels: eager", expected="one process", got=world_size, fix="Set kernels: auto on a mesh"
        )
    return data, latent


@contextmanager
def open_world(spec: TrainSpec, device: torch.device, launch: Launch) -> Iterator[World]:
    """Meet the other processes and lay the mesh over them; one process meets nobody.

    Args:
        spec: Its `mesh` is read.
        device: This rank's device; tensors on a GPU travel by NCCL, those on the CPU by gloo.
        launch: How many processes there are. Where they meet stands in the environment of torchrun.

    Raises:
        ConfigError: See `check_mesh`.
        WorkerError: The others cannot be reached.
    """
    data, latent = check_mesh(spec, launch.size)
    if launch.size == 1:
        with closing(World()) as alone:
            yield alone
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _peers():
        dist.init_process_group(backend, rank=launch.rank, world_size=launch.size, timeout=SILENCE)
    try:
        with _peers():
            world = lay_mesh(device.type, data, latent)
        with closing(world):
            yield world
    finally:
        dist.destroy_process_group()


def lay_mesh(device_type: str, data: int, latent: int) -> World:
    """The mesh over all ranks of the default process group."""
    mesh = init_device_mesh(device_type, (data, latent), mesh_dim_names=("data", "latent"))
    return World(
        Axis(mesh.get_group("data"), mesh.get_local_rank("data"), data),
        Axis(mesh.get_group("latent"), mesh.get_local_rank("latent"), latent),
        _everyone(),
        _everyone(),
    )


def _everyone() -> Axis:
    """All ranks, on the CPU, in a group of its own."""
    group = dist.new_group(backend="gloo", timeout=SILENCE)
    assert isinstance(group, dist.ProcessGroup), "every rank is a member"
    return Axis(group, dist.get_rank(), dist.get_world_size())
