"""Two aligned datasets of planted directions, for tests of what reads several subjects at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from tests.support.planted import D_MODEL, HOOK, TRAIN, planted_rows
from winnow.schemas.base import sha256_hex
from winnow.schemas.harvest import HarvestPlan
from winnow.store.objects import open_store
from winnow.store.testing import make_plan, write_dataset

WIDTH = 24
"""D of the second subject."""
HOOKS = (f"base/{HOOK}", f"chat/{HOOK}")


def chat_rows(plan: HarvestPlan, unit: int, hook: str) -> NDArray[np.float32]:
    """[R, 24] the base's rows in another space; another row is a sink."""
    turn = np.random.default_rng(5).standard_normal((D_MODEL, WIDTH)).astype(np.float32)
    rows = planted_rows(plan, unit, hook)
    rows[:3] = rows[3:6]
    rows = 2 * rows @ turn / D_MODEL**0.5
    rows[6] = 9000.0
    return rows.astype(np.float32)


def chat_plan(units: int, **fields: Any) -> HarvestPlan:
    """A plan of the second subject on the windows of `make_plan(units)`."""
    plan = make_plan(units, hooks={HOOK: WIDTH}, **fields)
    other = {"model": "synthetic-chat", "weights_sha256": sha256_hex(b"chat")}
    return plan.model_copy(update={"subject": plan.subject.model_copy(update=other)})


def write_base(folder: Path, units: int = 9) -> str:
    """Write the base's dataset; returns its root."""
    root = folder / "base"
    write_dataset(open_store(str(root)), make_plan(units, hooks={HOOK: D_MODEL}), planted_rows)
    return str(root)


def write_chat(folder: Path, units: int = 9, **fields: Any) -> str:
    """Write the second subject's dataset, stored in another dtype and compressed; returns its root."""
    root = folder / "chat"
    plan = chat_plan(units, **{"dtype": "float16", "compress": "zstd"} | fields)
    write_dataset(open_store(str(root)), plan, chat_rows)
    return str(root)


def roots_config(folder: Path, roots: dict[str, str] | None = None, **train: Any) -> Path:
    """Write both datasets, unless `roots` are given, and the config of a crosscoder; returns its path."""
    spec = {
        "out": str(folder / "run"),
        "roots": roots or {"base": write_base(folder), "chat": write_chat(folder)},
        "hook": HOOKS[0],
        "with_hooks": [HOOKS[1]],
        "normalize": "dataset",
        **TRAIN,
    }
    path = folder / "roots.yaml"
    path.write_text(yaml.safe_dump({"train": {**spec, **train}}), encoding="utf-8")
    return path
