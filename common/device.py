"""Where a run computes, and how it is stopped: device, threads, determinism, signals."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.utils.deterministic

from winnow.common.cores import usable_cores
from winnow.schemas.errors import ConfigError
from winnow.schemas.training import TrainSpec

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:1` as a device that is there.

    Args:
        name: The spec's `device`.
        local_rank: Of several processes on this machine: `auto` and `cuda` become the GPU of this number.

    Raises:
        ConfigError: Another name, or a GPU that torch does not see.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if gpus else "cpu"
    if name == "cuda" and local_rank is not None:
        name = f"cuda:{local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError("device", expected="auto, cpu, cuda or cuda:N", got=repr(name))
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(
            f"device {name!r}",
            expected="a GPU that torch sees",
            got=f"{gpus} of them (torch {torch.__version__})",
            fix="Install a torch build for this GPU's driver, or set device: cpu",
        )
    return device


def cpu_threads(spec: TrainSpec) -> int:
    """The spec's threads; for 0, the cores this process may use."""
    if spec.threads:
        return spec.threads
    return usable_cores()


def keep_memory() -> bool:
    """Let the allocator keep what it is given back, for as long as the process lives.

    A step asks for the same tensors as the one before. glibc returns the top of its heap to the system after
    each, whose every page then costs a fault to get again: 14,000 a step of B=4096, D=576 with a tenth of
    16,384 latents dead. Tensors above 32 MiB, the most that glibc allows, are still mapped anew.

    Returns:
        Whether this C library has the setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 32 << 20)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))


@contextmanager
def torch_settings(device: torch.device, threads: int) -> Generator[None]:
    """Threads, and on a GPU deterministic kernels, for the length of a run; on a CPU `keep_memory`.

    Every CPU operation the trainer uses is deterministic at a fixed number of threads.
    """
    threads_before = torch.get_num_threads()
    deterministic_before = torch.are_deterministic_algorithms_enabled()
    filling: Any = torch.utils.deterministic
    fill_before = filling.fill_uninitialized_memory
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True)
        filling.fill_uninitialized_memory = False  # nothing here reads what it has not set
    else:
        keep_memory()
    try:
        yield
    finally:
        filling.fill_uninitialized_memory = fill_before
        torch.set_num_threads(threads_before)
        torch.use_deterministic_algorithms(deterministic_before)


@contextmanager
def stop_on_signals(stopping: threading.Event) -> Generator[None]:
    """The first SIGINT or SIGTERM sets an event; a second one acts as usual.

    Outside the main thread signals are not ours, and the event stays unset.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        stopping.set()
        restore()

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        restore()
