"""Compile every Triton kernel for GPUs that are not there, and say what each takes of one.

    python -m benchmarks.gpu_compile [--targets sm_90] [--dtypes bfloat16] [--kernels REGEX] [--json OUT]

Prints a Markdown table: registers of a thread / bytes spilled / shared memory of a block / blocks that a
multiprocessor takes at a time. Kernels are found by module (`trainer/kernels/*_triton.py`). Each module's
examples call its launchers on tensors of the device `meta`; the launches are caught with their arguments.
Triton's own binder turns these into a specialisation, and its own pipeline compiles that to a cubin or hsaco;
ptxas and the metadata of AMD's code say what it takes. Nothing is launched. Exits with 1 if a kernel does not
compile, passes a limit of the target, multiplies float32 in TF32, or spills registers on an NVIDIA target.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from winnow.trainer import kernels
from winnow.trainer.kernels.examples import EXAMPLES, Shape

BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


class Limits(NamedTuple):
    """What one multiprocessor (compute unit) has."""

    shared: int
    """Bytes of shared memory that a block may ask for."""
    shared_all: int
    """Bytes of shared memory of all its blocks."""
    registers: int
    """Most registers of a thread."""
    threads: int
    """Most threads at a time."""


# CUDA C++ Programming Guide, compute capabilities; AMD's CDNA 3 and 4 whitepapers
TARGETS = {
    "sm_80": Limits(166_912, 167_936, 255, 2048),
    "sm_89": Limits(101_376, 102_400, 255, 1536),
    "sm_90": Limits(232_448, 233_472, 255, 2048),
    "sm_100": Limits(232_448, 233_472, 255, 2048),
    "sm_120": Limits(101_376, 102_400, 255, 1536),
    "gfx942": Limits(65_536, 65_536, 512, 2048),
    "gfx950": Limits(163_840, 163_840, 512, 2048),
}


class Launch(NamedTuple):
    """A kernel and what it is launched with."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    use: str = ""
    """What the example says it is of, if it says so."""


class Absent:
    """The driver of a GPU that is not there: all that Triton's binder and compiler ask of one."""

    def __init__(self, target: str) -> None:
        amd = target.startswith("gfx")
        self.target = GPUTarget("hip", target, 64) if amd else GPUTarget("cuda", int(target[3:]), 32)

    def get_current_target(self) -> GPUTarget:  # noqa: D102
        return self.target

    def get_current_device(self) -> int:  # noqa: D102
        return 0

    def get_current_stream(self, _device: int) -> int:  # noqa: D102
        return 0

    def get_active_torch_device(self) -> torch.device:  # noqa: D102
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:  # noqa: D102
        return kind


def modules() -> list[ModuleType]:
    """Every module of Triton kernels."""
    names = sorted(path.stem for path in Path(kernels.__path__[0]).glob("*_triton.py"))
    return [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]


def entries(module: ModuleType) -> set[str]:
    """Names of a module's kernels: of its own jitted functions those that no other one calls."""
    tree = ast.parse(inspect.getsource(module))
    jitted = {
        node.name: {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)} - {node.name}
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and isinstance(getattr(module, node.name), JITFunction)
    }
    called = {name for names in jitted.values() for name in names}
    # those without an underscore are called by other modules' kernels
    return {name for name in jitted if name not in called and name.startswith("_") and name != "_probe"}


def caught(call: Callable[[], object]) -> list[Launch]:
    """The launches that a call makes, none of which runs."""
    found: list[Launch] = []

    def catch(kernel: Any, _grid: object, *arguments: Any, **constants: Any) -> None:
        found.append(Launch(kernel, arguments, constants))

    launchers = [module for module in modules() if hasattr(module, "launch")]
    before = [module.launch for module in launchers]
    try:
        for module in launchers:
            module.__dict__["launch"] = catch
        call()
    finally:
        for module, launch in zip(launchers, before, strict=True):
            module.__dict__["launch"] = launch
    return found


def specialised(launches: list[Launch], target: str) -> dict[tuple[str, str], Launch]:
    """One launch for each binary that they need on this target."""
    absent: Any = Absent(target)
    driver.set_active(absent)
    found: dict[tuple[str, str], Launch] = {}
    for launch in launches:
        launch.kernel.device_caches.clear()
        binder = launch.kernel.create_binder()[4]
        _, specialization, options = binder(*launch.arguments, **launch.constants)
        key = (launch.kernel.fn.__name__, str((specialization, sorted(options.items()))))
        found.setdefault(key, launch)
    return found


def compiled(launch: Launch, target: str) -> dict[str, Any]:
    """Compile one specialisation; returns what it takes, and the limits it passes as `faults`."""
    started = time.perf_counter()
    launch.kernel.device_caches.clear()
    binary = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.constants)
    warps, shared = binary.metadata.num_warps, binary.metadata.shared
    threads = warps * binary.metadata.target.warp_size
    if target.startswith("gfx"):
        code = binary.asm["amdgcn"]
        registers, spilled = (
            _number(rf"\.{key}:\s*(\d+)", code) for key in ("vgpr_count", "vgpr_spill_count")
        )
        # each of a unit's four parts has 512 for each of a wave's lanes, given out by 8
        by_registers = 4 * (512 // (-(-max(1, registers) // 8) * 8)) // warps
    else:
        code = binary.asm["ptx"]
        registers, spilled = ptxas(code, target)
        # of 65,536, given out to a warp by 256
        by_registers = 65_536 // (-(-max(1, registers) * 32 // 256) * 256 * warps)
    limits = TARGETS[target]
    reserved = 1024 if target.startswith("sm") else 0
    by_shared = limits.shared_all // (shared + reserved) if shared else 32
    faults = {
        "shared memory": shared > limits.shared,
        "registers": registers > limits.registers or not by_registers,
        "TF32": bool(re.search(r"mma\S*\.tf32", code)),
        "spills": bool(spilled) and target.startswith("sm"),
    }
    return {
        "kernel": launch.kernel.fn.__name__,
        "use": launch.use,
        "target": target,
        "registers": registers,
        "spilled": spilled,
        "shared": shared,
        "blocks": min(by_registers, by_shared, limits.threads // threads, 32),
        "warps": warps,
        "seconds": round(time.perf_counter() - started, 1),
        "faults": [name for name, wrong in faults.items() if wrong],
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def ptxas(code: str, target: str) -> tuple[int, int]:
    """Registers of a thread and bytes it spills, from the assembler's own report."""
    # the newer of the two in Triton's wheel knows Blackwell, the other one some that it does not
    names = ("ptxas-blackwell", "ptxas") if int(target[3:]) >= 100 else ("ptxas", "ptxas-blackwell")
    suffix = "a" if int(target[3:]) >= 90 else ""
    said = ""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(code)
        file.flush()
        for name in names:
            command = [str(BIN / name), "-v", f"--gpu-name={target}{suffix}", file.name, "-o", "/dev/null"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                spilled = sum(
                    _number(rf"(\d+) bytes spill {way}", done.stderr) for way in ("stores", "loads")
                )
                return _number(r"Used (\d+) registers", done.stderr), spilled
            said += done.stderr
    raise RuntimeError(f"no ptxas takes the code for {target}: {said[:500]}")


def tables(targets: list[str], dtypes: list[str], only: str) -> list[dict[str, Any]]:
    """Compile all specialisations of the examples, for each target and type of operands."""
    rows: list[dict[str, Any]] = []
    for dtype in dtypes:
        shape = Shape(dtype=getattr(torch, dtype))
        launches = [launch for module in modules() for launch in examples_of(module, shape)]
        for target in targets:
            for (name, _), launch in specialised(launches, target).items():
                if re.search(only, name):
                    rows.append({"dtype": dtype, **compiled(launch, target)})
                    print(rows[-1], file=sys.stderr, flush=True)
    return rows


def examples_of(module: ModuleType, shape: Shape) -> list[Launch]:
    """The launches of a module's examples at a shape."""
    found: list[Launch] = []
    for example in EXAMPLES.get(module.__name__, []):
        use = (example.__doc__ or "").rstrip(".").lower()
        found += [launch._replace(use=use) for launch in caught(partial(example, shape))]
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/kernels.md: of a kernel's forms for the same use, the one that takes most."""
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = ["| kernel | operands | " + " | ".join(targets) + " |", "|---" * (len(targets) + 2) + "|"]
    most: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        name = f"`{row['kernel']}`" + (f" {row['use']}" if row["use"] else "")
        found = most.setdefault((name, row["dtype"]), {})
        found[row["target"]] = max(found.get(row["target"], row), row, key=_takes)
    for (name, dtype), found in most.items():
        cells = [
            f"{row['registers']} / {row['spilled']} / {row['shared'] / 1024:.3g} K / {row['blocks']}"
            for row in (found[target] for target in targets)
        ]
        lines.append(f"| {name} | {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _takes(row: dict[str, Any]) -> tuple[int, int, int]:
    return row["spilled"], -row["blocks"], row["registers"]


def main() -> None:
    """Compile, print the table, and exit with 1 if something is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--kernels", default="", help="only those whose name it matches")
    parser.add_argument("--json", type=Path, help="where to write the rows")
    args = parser.parse_args()
    rows = tables(args.targets.split(","), args.dtypes.split(","), args.kernels)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(markdown(rows))
    wrong = [row for row in rows if row["faults"]]
    for row in wrong:
        print(
            f"benchmarks.gpu_compile: {row['kernel']} {row['dtype']} {row['target']}: {row['faults']}",
            file=sys.stderr,
        )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
