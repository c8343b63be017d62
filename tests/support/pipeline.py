"""A whole pipeline at toy size, for tests: a tiny subject, a made-up corpus and a config for both."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from tests.support.tiny import make_subject
from winnow.harvester.run.driver import ensure_plan
from winnow.harvester.run.worker import UnitWorker
from winnow.schemas.config import Config
from winnow.schemas.harvest import HarvestPlan
from winnow.store.objects import open_store
from winnow.store.write.writer import seal

WORDS = (
    "harvest", "grain", "wind", "chaff", "row", "order", "kept", "nothing", "twice", "named",
    "counted", "lies", "floor", "place", "every", "again", "weighed", "fan", "lifts", "past",
)  # fmt: skip


def write_corpus(path: Path, *, documents: int = 120, words: int = 90, seed: int = 0) -> Path:
    """A jsonl file of `documents` random documents, about `words` words each."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            text = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(words // 2, words * 2)))
            file.write(json.dumps({"text": text}) + "\n")
    return path


def pipeline_config(folder: Path, *, root: str | None = None, units: int = 4, **sections: Any) -> Path:
    """Write a subject, a corpus and `config.yaml` into `folder`; returns the config's path.

    `sections` are merged into the config's sections: `train={"k": 4}`; a value of None takes a field out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    subject = folder / "subject"
    if not subject.exists():
        make_subject(subject, "llama", layers=3, width=16)
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus, documents=40 * (units + 1))
    config: dict[str, Any] = {
        "root": root or str(folder / "data"),
        "subject": {"model": str(subject), "device": "cpu"},
        "corpus": {"sources": [{"uri": str(corpus)}]},
        "plan": {
            "hooks": ["resid_post.1", "mlp_out.0"],
            "context_length": 17,
            "windows_per_unit": 64,
            "train_units": units,
        },
        "harvest": {"batch_windows": 16, "threads_per_actor": 1},
        "train": {
            "out": str(folder / "run"),
            "hook": "resid_post.1",
            "latents": 64,
            "k": 4,
            "batch_rows": 256,
            "epochs": 4,
            "sample_rows": 512,
            "device": "cpu",
            "threads": 1,
        },
    }
    for name, values in sections.items():
        merged = {**config.get(name, {}), **values}
        config[name] = {field: value for field, value in merged.items() if value is not None}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def make_alone(config: Config) -> tuple[HarvestPlan, str]:
    """Make the whole dataset by one worker in this process, without Ray; returns its plan and its digest."""
    store = open_store(config.root)
    plan = ensure_plan(config, store)
    assert config.subject is not None
    worker = UnitWorker(
        plan.to_json(), config.root, config.storage, config.subject, 1, config.harvest.batch_windows
    )
    for unit in range(plan.units):
        worker.run(unit)
    return plan, seal(store, plan).dataset_sha256
