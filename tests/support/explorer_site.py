"""A whole explorer at toy size: a tiny subject, a harvest of it in this process, SAEs and their index."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tests.support.pipeline import pipeline_config, write_corpus
from winnow.common.config_file import load_config
from winnow.explorer.index.make import make_index
from winnow.explorer.place import Place
from winnow.harvester.run.driver import ensure_plan, harvest
from winnow.sae.model import Sae
from winnow.schemas.config import Config
from winnow.schemas.features import IndexSpec
from winnow.store import ActivationStore
from winnow.store.objects import open_store

HOOK = "resid_post.1"
LATENTS, K = 48, 5
SPEC = IndexSpec(top=4, bands=3, per_band=2, before=6, after=3, logits=5, neighbours=4, coactivation_rows=64)


@dataclass(frozen=True)
class Site:
    """Where things lie."""

    config_path: Path
    config: Config
    root: str
    saes: tuple[str, str]
    """Of different seeds; the first is indexed at `<sae>/features`, and the second too."""


def random_sae(d_model: int, latents: int, k: int, seed: int) -> Sae:
    """An SAE with seeded random unit rows."""
    draw = torch.Generator().manual_seed(seed)
    sae = Sae(d_model, latents, k)
    rows = torch.randn(latents, d_model, generator=draw)
    rows /= rows.norm(dim=1, keepdim=True)
    sae.fill(sae.tensors() | {"W_enc": rows, "W_dec": rows})
    return sae.requires_grad_(False)


def make_dataset(folder: Path, units: int = 3) -> tuple[Path, Config]:
    """Plan and harvest two sources in this process, without Ray."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "corpus.jsonl", folder / "letters.jsonl"]
    for seed, file in enumerate(files):
        write_corpus(file, documents=20 * (units + 1), seed=seed)
    path = pipeline_config(
        folder,
        units=units,
        corpus={"sources": [{"uri": str(file)} for file in files]},
        plan={"hooks": [HOOK]},
        storage={"single_writer": True},
    )
    config = load_config(path)
    store = open_store(config.root, config.storage)
    harvest(config, store, ensure_plan(config, store))
    return path, config


def make_site(folder: Path) -> Site:
    """Everything that `winnow explore` needs, with two SAEs."""
    path, config = make_dataset(folder)
    saes: list[str] = []
    for seed in (0, 1):
        uri = str(folder / f"sae-{seed}")
        dataset = ActivationStore.open(config.root)
        sae = random_sae(dataset.d_model(HOOK), LATENTS, K, seed)
        sae.save(open_store(uri), hook=HOOK)
        make_index(uri, Place.of(path, None), f"{uri}/features", None, SPEC)
        saes.append(uri)
    return Site(path, config, config.root, (saes[0], saes[1]))
