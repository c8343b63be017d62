"""Provenance in every result file: machine, versions, date."""

from __future__ import annotations

import datetime
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from winnow.common.cores import usable_cores
from winnow.schemas.errors import DISTRIBUTION


def write_report(name: str, figures: dict[str, Any], path: Path | None) -> dict[str, Any]:
    """Add provenance to a benchmark's figures, write them to `path` if it is given, and return them."""
    report = {
        "benchmark": name,
        **figures,
        "machine": {
            "cpu": _cpu(),
            # A container's quota may leave fewer than the machine has.
            "cores": os.cpu_count(),
            "usable_cores": usable_cores(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "winnow": _winnow(),
        },
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    return report


def _winnow() -> str:
    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:
        return "a copy of the source"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
