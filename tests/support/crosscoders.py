"""Two tiny subjects on the same windows, and crosscoders of their rows, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.support.evaluated import toy_config
from tests.support.tiny import make_subject
from winnow.harvester.run.driver import ensure_plan, harvest
from winnow.sae import Sae
from winnow.schemas.config import Config
from winnow.schemas.training import SaeParts, TrainSpec
from winnow.store.objects import open_store
from winnow.store.read.joined import open_roots
from winnow.trainer.run.start import identity_of

WIDTHS = (16, 24)
"""D of the base and of the other subject."""
HOOKS = ("base/resid_post.1", "chat/resid_post.1")
LATENTS, K = 48, 6
BASE_ONLY, CHAT_ONLY, SHARED = 4, 5, 6
"""Latents whose decoder rows are 0 in the other part, or equally long in both."""


def make_pair(folder: Path, **sections: Any) -> tuple[Config, Config]:
    """Configs of two subjects on the same windows, harvested."""
    base = toy_config(folder / "base", **sections)
    make_subject(folder / "chat", "llama", layers=3, width=WIDTHS[1], seed=4)
    assert base.subject is not None
    subject = base.subject.model_copy(update={"model": str(folder / "chat")})
    fields = {"root": str(folder / "chat-data"), "corpus": None, "subject": subject.model_dump()}
    plan = {"hooks": ["resid_post.1"], "tokens_from": base.root}
    chat = Config.model_validate(base.model_dump(mode="json") | {"plan": plan} | fields)
    store = open_store(chat.root)
    harvest(chat, store, ensure_plan(chat, store))
    return base, chat


@torch.no_grad()
def random_crosscoder(widths: tuple[int, ...] = WIDTHS, seed: int = 0) -> Sae:
    """Random directions in the raw space; see `BASE_ONLY` and its neighbours."""
    sae = Sae(sum(widths), LATENTS, K, "none", SaeParts(widths=widths))
    draw = torch.Generator().manual_seed(seed)
    for tensor in (sae.W_enc, sae.W_dec):
        tensor.copy_(torch.randn(tensor.shape, generator=draw))
    sae.b_pre.copy_(0.05 * torch.randn(sae.d_model, generator=draw))
    sae.b_enc.copy_(0.1 * torch.randn(LATENTS, generator=draw))
    first, second = sae.W_dec.split(list(widths), dim=1)
    second[BASE_ONLY] = 0
    first[CHAT_ONLY] = 0
    first[SHARED] /= first[SHARED].norm()
    second[SHARED] /= second[SHARED].norm()
    return sae


def save_crosscoder(pair: tuple[Config, Config], folder: Path, sae: Sae, **train: Any) -> tuple[Config, str]:
    """Publish a crosscoder of both subjects; returns a config that names its datasets, and its address."""
    base, chat = pair
    roots = {"base": base.root, "chat": chat.root}
    fields = {"normalize": "none", "latents": sae.latents, "k": min(sae.k, sae.latents), "roots": roots}
    fields |= {"hook": HOOKS[0], "with_hooks": list(HOOKS[1:]), "out": str(folder)}
    spec = TrainSpec.model_validate(fields | train)
    config = Config(root=base.root, train=spec, storage=base.storage)
    identity = identity_of(open_roots("", roots))
    sae.save(open_store(str(folder)), hook=HOOKS[0], with_hooks=HOOKS[1:], identity=identity, spec=spec)
    return config, str(folder)


def write_config(config: Config, path: Path) -> Path:
    """Write a config as a file that commands take."""
    path.write_text(json.dumps(config.model_dump(mode="json", exclude_defaults=True)), encoding="utf-8")
    return path
