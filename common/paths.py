"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def expand_user(path: str | Path) -> Path:
    """`path` with a leading `~` or `~user` replaced; as it is where no such user is known."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib's raises for a folder called `~name`
