"""Device, threads and determinism of a run."""

from __future__ import annotations

import ctypes
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

from winnow.common.cores import usable_cores
from winnow.schemas.errors import ConfigError
from winnow.schemas.training import TrainSpec

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """Resolve `auto`, `cpu`, `cuda` or `cuda:1` to a device that exists.

    Args:
        name: The spec's `device`.
        local_rank: This process's rank on its machine: `auto` and `cuda` become the GPU of this number.

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
    except RuntimeError:  # not a device's name: refused below, like other kinds
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
    """Return the spec's threads; for 0, the cores this process may use."""
    if spec.threads:
        return spec.threads
    return usable_cores()


def keep_memory() -> bool:
    """Let the allocator keep freed memory for as long as the process lives.

    Returns:
        Whether this C library has the setting.
    """
    # A step allocates the same tensors as the one before. glibc returns the top of its heap to the system
    # after each, and every page then costs a fault: 14,000 per step of B=4096, D=576 with a tenth of 16,384
    # latents dead.
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    # 32 MiB is the most that glibc allows; larger tensors are still mapped anew.
    return bool(mallopt(_MMAP_THRESHOLD, 32 << 20)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))


@contextmanager
def torch_settings(device: torch.device, threads: int) -> Generator[None]:
    """Set threads for the duration of a run; also deterministic kernels on a GPU, `keep_memory` on a CPU."""
    threads_before = torch.get_num_threads()
    deterministic_before = torch.are_deterministic_algorithms_enabled()
    filling: Any = torch.utils.deterministic
    fill_before = filling.fill_uninitialized_memory
    torch.set_num_threads(threads)
    # On a CPU every operation that the trainer uses is deterministic at a fixed number of threads.
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True)
        # Deterministic mode fills every `torch.empty`; nothing here reads what it has not set.
        filling.fill_uninitialized_memory = False
    else:
        keep_memory()
    try:
        yield
    finally:
        filling.fill_uninitialized_memory = fill_before
        torch.set_num_threads(threads_before)
        torch.use_deterministic_algorithms(deterministic_before)
