"""Which implementation runs: chosen by name, once, and never replaced silently.

- `eager`: the dense equivalents of `reference`, and for a training step the plain eager one.
- `cpu`: torch's own sparse primitives, for tensors on the CPU.
- `triton`: Triton kernels, for tensors on a GPU; under its interpreter (tests) also on the CPU.
"""

from __future__ import annotations

import importlib
import logging
import re
from importlib.metadata import requires
from types import ModuleType
from typing import Literal

import torch

from winnow.schemas.errors import ConfigError, DependencyMissing

Backend = Literal["eager", "cpu", "triton"]
_BACKENDS: tuple[Backend, ...] = ("eager", "cpu", "triton")
TRITON = "3.7.1"
"""The version of Triton that torch 2.13's wheels for CUDA ask for, and with which the kernels are tested."""
_ASKED = re.compile(r"triton[=~]=([\w.]+)")
_LOG = logging.getLogger("winnow.trainer")


def choose(kernels: str, device: torch.device) -> Backend:
    """Choose and log the backend of a run.

    Args:
        kernels: `auto` (`cpu` on the CPU, `triton` on a GPU) or a backend's name.
        device: The device of the tensors.

    Raises:
        ConfigError: Unknown name, or a backend that does not run on this device.
        DependencyMissing: Triton is chosen and not installed, or cannot start for want of a C compiler or of
            Python's headers.
    """
    # no fallback to another backend: it would compute the same step, only slower, and nobody would notice
    wanted = ("triton" if device.type == "cuda" else "cpu") if kernels == "auto" else kernels
    for backend in _BACKENDS:
        if backend == wanted:
            _require(backend, device)
            _LOG.info("kernels: %s on %s (asked for: %s)", backend, device, kernels)
            return backend
    raise ConfigError("kernels", expected="auto, eager, cpu or triton", got=repr(kernels))


def _require(backend: Backend, device: torch.device) -> None:
    if backend == "cpu" and device.type != "cpu":
        raise ConfigError(
            "kernels: cpu", expected="tensors on the CPU", got=device, fix="Set kernels: auto, or device: cpu"
        )
    # under Triton's interpreter (TRITON_INTERPRET=1) the tests run the kernels on a CPU
    if backend == "triton" and device.type != "cuda" and not triton_module("support").interpreted():
        raise ConfigError(
            "kernels: triton",
            expected="tensors on a GPU",
            got=device,
            fix="Set kernels: auto, or device: cuda",
        )
    # imported and started now, so that what is missing is an error before the first step
    # (estimates are made for a GPU on machines without one)
    support = triton_module("support") if backend == "triton" else None
    if support and torch.cuda.is_available() and not support.interpreted():
        support.start()


def triton_module(name: str) -> ModuleType:
    """Import the module `winnow.trainer.kernels.<name>_triton`.

    Raises:
        DependencyMissing: Triton is not installed.
    """
    try:
        return importlib.import_module(f"winnow.trainer.kernels.{name}_triton")
    except ModuleNotFoundError as error:
        # only a missing Triton has this remedy; another missing module is a fault of the installation
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise DependencyMissing(
            "kernels: triton",
            expected="the package triton",
            got="it is not installed",
            fix=f"`pip install triton=={_wanted()}`, or a CUDA build of torch, which brings it; "
            "or set kernels: eager",
        ) from error


def _wanted() -> str:
    """The version of Triton that the installed torch asks for; builds for the CPU ask for none."""
    asked = filter(None, map(_ASKED.match, requires("torch") or []))
    return next((match[1] for match in asked), TRITON)


def unknown(backend: str) -> ConfigError:
    """The error of a custom op for an unknown backend."""
    return ConfigError("backend", expected=f"one of {', '.join(_BACKENDS)}", got=repr(backend))
