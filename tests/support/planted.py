"""A dataset of known directions, for tests of training: sparse sums, a little noise, a few sinks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from winnow.schemas.harvest import HarvestPlan
from winnow.store.objects import open_store
from winnow.store.testing import make_plan, write_dataset

D_MODEL, DIRECTIONS, ACTIVE = 32, 48, 3
HOOK, OTHER_HOOK = "resid_post.1", "mlp_out.0"
SINKS_PER_UNIT = 3
TRAIN: dict[str, Any] = {
    "latents": 64,
    "k": ACTIVE,
    "batch_rows": 256,
    "epochs": 3,
    "lr": 0.003,
    "dead_after_tokens": 1500,
    "sample_rows": 1000,
    "device": "cpu",
    "threads": 1,
}
"""How an SAE of such rows is trained."""


def directions() -> NDArray[np.float32]:
    """[48, 32] unit rows of mean 0, so that layer normalisation leaves them as they are."""
    rows = np.random.default_rng(7).standard_normal((DIRECTIONS, D_MODEL)).astype(np.float32)
    rows -= rows.mean(1, keepdims=True)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def planted_rows(plan: HarvestPlan, unit: int, hook: str) -> NDArray[np.float32]:
    """[R, 32] 3 directions each, coefficients in [1, 2], and a little noise; the first rows are sinks."""
    draw = np.random.default_rng([unit, len(hook)])
    chosen = draw.random((plan.rows_per_unit, DIRECTIONS)).argsort(1)[:, :ACTIVE]
    weights = draw.uniform(1, 2, chosen.shape).astype(np.float32)
    rows = np.einsum("rk,rkd->rd", weights, directions()[chosen])
    rows += 0.01 * draw.standard_normal(rows.shape, dtype=np.float32)
    rows[:SINKS_PER_UNIT] = 3000.0
    return rows.astype(np.float32)


def planted_config(folder: Path, *, train_units: int = 8, **train: Any) -> Path:
    """Write the dataset and a config into `folder`; returns the config's path. `train` wins."""
    root = folder / "data"
    if not root.exists():
        plan = make_plan(train_units + 1, hooks={HOOK: D_MODEL, OTHER_HOOK: D_MODEL})
        write_dataset(open_store(str(root)), plan, planted_rows)
    spec = {
        "out": str(folder / "run"),
        "hook": HOOK,
        **TRAIN,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"root": str(root), "train": {**spec, **train}}), encoding="utf-8")
    return path


def mean_max_cosine(W_dec: torch.Tensor) -> float:
    """Mean over the true directions of the best cosine with a decoder row [N, D]."""
    return (torch.from_numpy(directions()) @ W_dec.T).max(dim=1).values.mean().item()
