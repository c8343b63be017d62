"""A step's ledger: what each operation of a training step moves, multiplies, launches, allocates, waits for.

Inside `Ledger.kept` tensors of the device are fakes, which have shapes and no contents, so a step of
full size takes about half a millisecond per operation on any machine and needs no GPU. Operations on the host
are real. Every operation of torch on a fake is entered with its account (`aten`), every launch of a Triton
kernel with the kernel's own (`winnow.trainer.kernels.cost`). Where the code asks the device for a number, a
synchronisation is counted and `Answers` gives what it is in a usual step.

Memory is that of torch's allocator without its rounding: libraries' own temporaries (CUB, cuBLAS's workspace)
are not seen.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from winnow.trainer.kernels.cost import COSTS, Cost, Launch, listening
from winnow.trainer.plan.answers import Answers
from winnow.trainer.plan.aten import FRESH, VIEWS, aten
from winnow.trainer.step.spans import telling

_PASSED = (
    __name__.rpartition(".")[0],
    "winnow.trainer.kernels.cost",
    "winnow.trainer.kernels.support_triton",
)
"""Modules that only pass a call on: an entry names who made it."""
_REST = "count"
"""The part after the last mark of a step."""


class Site(NamedTuple):
    """Where an entry comes from."""

    part: str
    """Of the step, by its mark."""
    place: str
    """The innermost line of the package, `module.function:line`."""
    what: str
    """The operation or the kernel."""


@dataclass
class Entry:
    """What one site does in a step, added up."""

    operations: int = 0
    launches: int = 0
    syncs: int = 0
    """Times that the host waits for the device."""
    allocations: int = 0
    streamed: int = 0
    """Bytes."""
    gathered: int = 0
    """Bytes."""
    flops: dict[tuple[str, bool], float] = field(default_factory=dict[tuple[str, bool], float])
    """(type of the operands or precision, whether by one of the project's kernels) -> FLOP."""

    def add(self, cost: Cost, kind: str, own: bool, launches: int) -> None:
        """Enter one operation."""
        self.operations += 1
        self.launches += launches
        self.streamed += cost.streamed
        self.gathered += cost.gathered
        if cost.flops:
            self.flops[kind, own] = self.flops.get((kind, own), 0.0) + cost.flops


class Ledger(TorchDispatchMode):
    """Counts while it is entered (`kept`).

    Args:
        answers: What the device says when it is asked.
        device: Whose fakes are counted.
    """

    def __init__(self, answers: Answers, device: torch.device) -> None:
        super().__init__()
        self._device = device.type
        self.entries: dict[Site, Entry] = {}
        self.live = 0
        """Bytes of the device's tensors that are alive."""
        self.peak = 0
        self.peak_at = ""
        self._answers = answers
        self._held: dict[int, weakref.finalize[..., Any]] = {}
        self._unmarked: list[Site] = []

    @contextmanager
    def kept(self) -> Iterator[Ledger]:
        """Count everything inside."""
        with ExitStack() as stack:
            # beneath this mode, so that operations of the host can pass it by
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            stack.enter_context(_constants_by_the_host())
            stack.enter_context(_hosts_generator())
            stack.enter_context(self._lists())
            stack.enter_context(listening(self._launched))
            stack.enter_context(telling(self))
            stack.enter_context(self)
            yield self

    def restart(self) -> None:
        """Forget all entries and the peak, but not what is alive."""
        self.entries, self._unmarked = {}, []
        self.peak, self.peak_at = self.live, ""

    def mark(self, name: str) -> None:
        """See `winnow.trainer.step.spans.Marks`."""
        for site in self._unmarked:
            found = self.entries.pop(site)
            into = self.entries.setdefault(site._replace(part=name), Entry())
            _merge(into, found)
        self._unmarked = []

    def end(self) -> None:
        """What came after the last mark is the rest of the step."""
        self.mark(_REST)

    # ---- entries ---------------------------------------------------------------------------------

    def _entry(self, what: str, frame: FrameType | None) -> Entry:
        site = Site("", _place(frame), what)
        if site not in self.entries:
            self._unmarked.append(site)
        return self.entries.setdefault(site, Entry())

    def _launched(self, launch: Launch) -> None:
        account = COSTS.get(launch.kernel)
        if account is None:
            raise NotImplementedError(
                f"the kernel {launch.kernel} has no account: register one by `winnow.trainer.kernels.cost`"
            )
        kind = _precision(launch)
        self._entry(launch.kernel, _caller(2)).add(account(launch.given), kind, own=True, launches=1)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = kwargs.get("device")
        made_there = device is not None and torch.device(device).type == self._device
        if not made_there and not any(isinstance(tensor, FakeTensor) for tensor in given):
            with _disable_current_modes():
                return func(*args, **kwargs)
        packet = func.overloadpacket.__name__
        name = packet if packet == "_to_copy" else packet.rstrip("_")
        there = [tensor for tensor in given if self._counted(tensor)]
        frame = _caller(2)
        if there:
            asked = self._ask(name, args, kwargs, there, frame)
            if asked is not None:
                return asked
        out = None if name == "_fused_adam" else _unread(func, name, args, kwargs)
        made = [leaf for leaf in tree_leaves(out) if self._counted(leaf)]
        self._answers.note(name, given, made)
        if name in VIEWS or not (there or made):
            return out
        entry = self._entry(name, frame)
        entry.allocations += self._hold(made, frame)
        if name not in FRESH:
            found = aten(name, given, made)
            kind = str(given[-1].dtype).removeprefix("torch.") if given else ""
            entry.add(found.cost, kind, own=False, launches=found.launches)
        return out

    def _ask(self, name: str, args: Any, kwargs: Any, there: list[Tensor], frame: FrameType | None) -> Any:
        """What an operation that makes the host wait gives; None if it does not wait."""
        if name == "_local_scalar_dense":
            return self._numbers(there[0], frame)[0]
        goes = kwargs.get("device") if name == "_to_copy" else None
        if goes is not None and goes.type == "cpu" != self._device:
            with _disable_current_modes():
                return self._on_host(there[0], frame)
        made = self._answers.made(name, args, kwargs, frame)
        if made is not None:
            entry = self._entry(name, frame)
            # `bincount` asks for the least and the largest of its input
            entry.syncs += 2 if name == "bincount" else 1
            entry.allocations += self._hold([made], frame)
            found = aten(name, there, [made])
            entry.add(found.cost, "", own=False, launches=found.launches)
        return made

    def _numbers(self, asked: Tensor, frame: FrameType | None) -> list[Any]:
        """The numbers of a tensor, flat, for which the host waits."""
        self._entry("to the host", frame).syncs += 1
        numbers = self._answers.numbers(asked, frame)
        if numbers is None:
            raise NotImplementedError(
                f"`winnow.trainer.plan.answers` has no usual answer for what {_place(frame)} asks of the "
                f"device, {list(asked.shape)} of {asked.dtype}"
            )
        return numbers

    def _on_host(self, asked: Tensor, frame: FrameType | None) -> Tensor:
        return torch.tensor(self._numbers(asked, frame), dtype=asked.dtype).view(asked.shape)

    @contextmanager
    def _lists(self) -> Iterator[None]:
        """Inside, `tolist` of a fake is one answer: its own asks for every number alone."""
        before = FakeTensor.tolist

        def tolist(fake: FakeTensor) -> Any:
            if not self._counted(fake):
                return before(fake)
            with _disable_current_modes():
                return self._on_host(fake, _caller(2)).tolist()

        FakeTensor.tolist = tolist  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            FakeTensor.tolist = before

    def _counted(self, leaf: object) -> bool:
        return isinstance(leaf, FakeTensor) and leaf.device.type == self._device

    # ---- memory ----------------------------------------------------------------------------------

    def _hold(self, made: list[Tensor], frame: FrameType | None) -> int:
        """Count new storages as alive until they are freed; how many there were."""
        new = 0
        for tensor in made:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._held:
                continue
            size = storage.nbytes()
            new += 1
            self.live += size
            if self.live > self.peak:
                self.peak, self.peak_at = self.live, _place(frame)

            def free(size: int = size, key: int = key) -> None:
                self.live -= size
                self._held.pop(key, None)

            self._held[key] = weakref.finalize(storage, free)
        return new


def _unread(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    # a generator of the host cannot draw for a fake; the draws are not there anyway
    if name == "random":
        return args[0]
    return func(*args, **kwargs)


def _merge(into: Entry, more: Entry) -> None:
    for name in ("operations", "launches", "syncs", "allocations", "streamed", "gathered"):
        setattr(into, name, getattr(into, name) + getattr(more, name))
    for key, flops in more.flops.items():
        into.flops[key] = into.flops.get(key, 0.0) + flops


def _precision(launch: Launch) -> str:
    """How a kernel multiplies: a precision among its constants, else the type of its first numbers."""
    for value in launch.given.values():
        if isinstance(value, str) and value.startswith(("tf32", "bf16")):
            return value
    numbers = (v for v in launch.given.values() if isinstance(v, Tensor) and v.is_floating_point())
    first = next(numbers, None)
    return "" if first is None else str(first.dtype).removeprefix("torch.")


def _caller(depth: int) -> FrameType | None:
    """The innermost frame of the package outside this room."""
    frame: FrameType | None = sys._getframe(depth)
    while frame is not None:
        name = str(frame.f_globals.get("__name__"))
        if name.startswith("winnow.") and not name.startswith(_PASSED):
            return frame
        frame = frame.f_back
    return None


def _place(frame: FrameType | None) -> str:
    if frame is None:
        return "?"
    name = str(frame.f_globals.get("__name__")).removeprefix("winnow.")
    return f"{name}.{frame.f_code.co_name}:{frame.f_lineno}"


@contextmanager
def _constants_by_the_host() -> Iterator[None]:
    """Inside, `torch.tensor` for a GPU makes a tensor on the host, and then sends it."""
    # what FakeTensorMode does by itself only where there is no GPU
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)


@contextmanager
def _hosts_generator() -> Iterator[None]:
    """Inside, a generator for a GPU is one of the host: without a GPU torch makes no other."""
    real = torch.Generator

    def generator(device: Any = "cpu") -> torch.Generator:
        return real("cpu" if torch.device(device).type == "cuda" else device)

    torch.Generator = generator  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        torch.Generator = real
