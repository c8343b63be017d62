"""What the Triton kernels share. Importing this module needs Triton, so only a run that chose it does."""
# pyright: reportUnknownParameterType=false, reportMissingParameterType=false

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import triton
from triton.runtime import driver
from triton.runtime.interpreter import InterpretedFunction

from winnow.schemas.errors import DependencyMissing
from winnow.trainer.kernels.cost import heard


@triton.jit
def _probe():
    pass


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on tensors of the CPU."""
    return isinstance(_probe, InterpretedFunction)


def start() -> None:
    """Start Triton's driver, which compiles a C file the first time, unless Triton's cache has the result.

    Raises:
        DependencyMissing: That file cannot be compiled; says what is missing.
    """
    try:
        driver.active  # noqa: B018  an attribute that is made when it is first read
    except (RuntimeError, subprocess.CalledProcessError) as error:
        missing = _missing()
        if not missing and isinstance(error, subprocess.CalledProcessError):
            # libc's headers, for one: the compiler's own message is on stderr
            missing = "the C compiler failed"
        if not missing:
            raise
        headers = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        raise DependencyMissing(
            "kernels: triton",
            expected="a C compiler and Python's headers, with which Triton compiles its driver",
            got=missing,
            fix=f"Install both (Debian, Ubuntu: `apt-get install gcc libc6-dev {headers}`), "
            "or set kernels: eager",
        ) from error


def _missing() -> str | None:
    """What Triton's build looks for and does not find: `$CC`, else gcc or clang; Python.h."""
    cc = os.environ.get("CC")
    if not (shutil.which(cc) if cc else shutil.which("gcc") or shutil.which("clang")):
        return f"no program CC={cc}" if cc else "neither gcc nor clang on the PATH"
    # Debian's own scheme names a folder that Python's headers are not in
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    header = Path(sysconfig.get_paths(scheme)["include"], "Python.h")
    return None if header.exists() else f"no {header}"


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on a grid; while a ledger is kept (`cost.listening`), only tell of it."""
    # in one place, because Triton's own types tell a type checker nothing
    if not heard(kernel, grid, arguments, constants):
        kernel[grid](*arguments, **constants)


def cdiv(size: int, by: int) -> int:
    """`size / by`, rounded up."""
    return -(-size // by)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not less than `size`, at least 1."""
    return 1 << max(0, size - 1).bit_length()


def block_of(size: int, largest: int) -> int:
    """The smallest power of two not less than `size`, but at least 16 and at most `largest`."""
    return min(largest, max(16, power_of_two(size)))
