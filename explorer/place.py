"""Where the explorer finds things: the dataset, the subject, an SAE's index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from winnow.common.config_file import load_config
from winnow.schemas.config import Config, StorageSpec
from winnow.schemas.layers import layer_folder
from winnow.schemas.sets import SetCard
from winnow.schemas.subject import SubjectSpec


class Place(NamedTuple):
    """Where the dataset and the subject are, as the options say."""

    root: str | None
    subject: SubjectSpec | None
    storage: StorageSpec
    roots: dict[str, str] | None = None
    """Of an SAE of several datasets: where they are, if not where its card says (`train.roots`)."""
    subjects: dict[str, str] = {}
    """Of such an SAE: where a subject's files are, if not where its plan says (`evaluate.subjects`)."""

    @classmethod
    def of(cls, config: Path | None, root: str | None) -> Place:
        """Read the config, if there is one."""
        if config is None:
            return cls(root, None, StorageSpec())
        settings = load_config(config, [f"root={json.dumps(root)}"] if root else [])
        return cls.in_config(settings)

    @classmethod
    def in_config(cls, settings: Config) -> Place:
        """What a config says."""
        roots = settings.train.roots if settings.train is not None else None
        places = settings.evaluate.subjects
        return cls(settings.root, settings.subject, settings.storage, roots, places)


def default_index(sae: str) -> str:
    """Where the index of an SAE lies unless somebody says otherwise."""
    return sae.rstrip("/") + "/features"


def layer_places(set_uri: str, card: SetCard, out: str | None = None) -> dict[int, tuple[str, str]]:
    """Layer -> the address of its transcoder and the folder of its index.

    Args:
        set_uri: The set.
        card: Its card.
        out: Folder of all indexes, one per layer; None is each layer's default.
    """
    found: dict[int, tuple[str, str]] = {}
    for entry in card.layers:
        sae = f"{set_uri.rstrip('/')}/{entry.folder}"
        where = default_index(sae) if out is None else f"{out.rstrip('/')}/{layer_folder(entry.layer)}"
        found[entry.layer] = sae, where
    return found
