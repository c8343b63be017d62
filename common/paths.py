"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def expand_user(path: str | Path) -> Path:
    """Replace a leading `~` or `~user` of `path`; unchanged if there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's raises for a folder called `~name`
