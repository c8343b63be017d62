"""Where the explorer finds things: the dataset, the subject, an SAE's index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from winnow.common.config_file import load_config
from winnow.schemas.config import StorageSpec
from winnow.schemas.subject import SubjectSpec


class Place(NamedTuple):
    """Where the dataset and the subject are, as the options say."""

    root: str | None
    subject: SubjectSpec | None
    storage: StorageSpec

    @classmethod
    def of(cls, config: Path | None, root: str | None) -> Place:
        """Read the config, if there is one."""
        if config is None:
            return cls(root, None, StorageSpec())
        settings = load_config(config, [f"root={json.dumps(root)}"] if root else [])
        return cls(settings.root, settings.subject, settings.storage)


def default_index(sae: str) -> str:
    """Where the index of an SAE lies unless somebody says otherwise."""
    return sae.rstrip("/") + "/features"
