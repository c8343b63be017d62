"""TensorBoard and Weights & Biases: telemetry lines are also sent there if a spec asks for it.

`metrics.jsonl` stays the record; these are copies to look at, so one that fails is dropped with a warning
and the run continues. Both libraries are extras, `tensorboard` and `wandb`.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import PurePath
from typing import Any, Protocol

from winnow.schemas.errors import DependencyMissing, Extra, install_command
from winnow.schemas.training import TrainSpec
from winnow.store.objects import ObjectStore

log = logging.getLogger("winnow.trainer")

_WANDB_KEY = "wandb.json"
"""Holds the run's id, so that a resumed run continues the same curves."""
_SELF_DESCRIBING = {"step", "time"}


class _Logger(Protocol):
    """Takes telemetry lines."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take a line; its `step` is greater than that of the last one."""
        ...

    def close(self) -> None:
        """Send the remaining lines."""
        ...


class TensorBoard:
    """Scalars in a folder of event files, one folder below `folder` per run.

    Args:
        folder: `train.tensorboard`.
        name: The run's name.
        step: Steps finished; what an interrupted run wrote past them is hidden.
    """

    def __init__(self, folder: str, name: str, step: int) -> None:
        _require("tensorboard", "train.tensorboard")
        # after the check: without the package this import would raise torch's error, which names no extra
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(PurePath(folder) / name), purge_step=step + 1)

    def log(self, record: Mapping[str, Any]) -> None:
        """Write a line's figures."""
        for key, value in record.items():
            if key not in _SELF_DESCRIBING:
                self._writer.add_scalar(f"train/{key}", value, record["step"], record["time"])

    def close(self) -> None:
        """Write the remaining scalars."""
        self._writer.close()


class WandB:
    """A run of Weights & Biases. The library's own environment variables apply: WANDB_MODE=offline, ...

    Args:
        project: `train.wandb`.
        name: The run's name.
        spec: Shown as the run's config.
        out: The run's folder, which holds the id.
    """

    def __init__(self, project: str, name: str, spec: TrainSpec, out: ObjectStore) -> None:
        wandb = _require("wandb", "train.wandb")
        # an id of our own, stored before it is used: a run killed in between resumes under the same one
        if out.size(_WANDB_KEY) is None:
            out.put(_WANDB_KEY, json.dumps({"id": secrets.token_hex(8)}).encode())
        known = json.loads(out.get(_WANDB_KEY))["id"]
        config = spec.model_dump(mode="json")
        # it ignores steps that it already has; a resumed run sends those past its checkpoint again, with the
        # same figures
        self._run = wandb.init(project=project, name=name, id=known, resume="allow", config=config)

    def log(self, record: Mapping[str, Any]) -> None:
        """Send a line's figures."""
        figures = {key: value for key, value in record.items() if key not in _SELF_DESCRIBING}
        self._run.log(figures, step=record["step"])

    def close(self) -> None:
        """Send the remaining lines."""
        self._run.finish()


class Loggers:
    """The loggers that a spec asks for, none of which can stop the run.

    Args:
        spec: Its `tensorboard` and `wandb` are read.
        out: The run's folder.
        step: Steps finished.

    Raises:
        DependencyMissing: The library that the spec asks for is not installed.
    """

    def __init__(self, spec: TrainSpec, out: ObjectStore, step: int) -> None:
        self._open: dict[str, _Logger] = {}
        name = out.uri.rstrip("/").rpartition("/")[2] or "run"
        if spec.tensorboard is not None:
            folder = spec.tensorboard
            self._try("tensorboard", lambda: self._open.update(tensorboard=TensorBoard(folder, name, step)))
        if spec.wandb is not None:
            project = spec.wandb
            self._try("wandb", lambda: self._open.update(wandb=WandB(project, name, spec, out)))

    def log(self, record: Mapping[str, Any]) -> None:
        """Pass a line to each logger."""
        for name, logger in list(self._open.items()):
            self._try(name, lambda logger=logger: logger.log(record))

    def close(self) -> None:
        """Close each logger."""
        for name, logger in list(self._open.items()):
            self._try(name, logger.close)
        self._open.clear()

    def _try(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except DependencyMissing:
            # found before the first step, and not what the spec asked for: an error, not a warning
            raise
        except Exception as error:
            # a service that is down and a library's own bug look alike, and neither is worth a run
            self._open.pop(name, None)
            log.warning("%s is left out from here on: %s", name, error)


def _require(package: Extra, field: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise DependencyMissing(
            f"{field} needs the package {package}", fix=f"{install_command(package)}, or leave it out"
        ) from error
