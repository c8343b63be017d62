"""A dataset of every layer's reads and MLP outputs, for tests of transcoder sets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from winnow.schemas.harvest import HarvestPlan
from winnow.store.objects import open_store
from winnow.store.testing import make_plan, write_dataset

D_MODEL, DIRECTIONS, ACTIVE, LAYERS = 16, 24, 2, 3
HOOKS = tuple(f"{site}.{layer}" for layer in range(LAYERS) for site in ("resid_mid", "mlp_out"))


def set_rows(plan: HarvestPlan, unit: int, hook: str) -> NDArray[np.float32]:
    """[R, 16]: at every layer the same directions are active; an MLP's output is another image of them."""
    draw = np.random.default_rng(unit)
    chosen = draw.random((plan.rows_per_unit, DIRECTIONS)).argsort(1)[:, :ACTIVE]
    strengths = draw.uniform(1, 2, chosen.shape).astype(np.float32)
    images = np.random.default_rng([ord(letter) for letter in hook]).standard_normal((DIRECTIONS, D_MODEL))
    noise = np.random.default_rng([unit, HOOKS.index(hook)]).standard_normal((plan.rows_per_unit, D_MODEL))
    return (np.einsum("rk,rkd->rd", strengths, images[chosen]) + 0.01 * noise).astype(np.float32)


def set_config(folder: Path, *, layers: Any = (0, LAYERS - 1), cross: bool = False, **train: Any) -> Path:
    """Write the dataset and a config of a set into `folder`; returns the config's path. `train` wins."""
    root = folder / "data"
    if not root.exists():
        plan = make_plan(9, hooks=dict.fromkeys(HOOKS, D_MODEL))
        write_dataset(open_store(str(root)), plan, set_rows)
    spec = {
        "out": str(folder / "run"),
        "set": {"layers": layers if layers == "all" else list(layers), "cross": cross},
        "latents": 64,
        "k": 2 * ACTIVE,
        "batch_rows": 256,
        "epochs": 3,
        "lr": 0.02,
        "dead_after_tokens": 1500,
        "sample_rows": 1000,
        "device": "cpu",
        "threads": 1,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"root": str(root), "train": {**spec, **train}}), encoding="utf-8")
    return path
