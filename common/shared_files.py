"""Files and folders on a local disk that several processes may use at the same moment."""

from __future__ import annotations

import fcntl
import secrets
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Write a file: others find the old one or all of the new one, also if several write it at once.

    Folders that do not exist are made. What a kill leaves behind has a name that begins with a dot.

    Raises:
        OSError: It cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: of two writers of one `NAME.part`, one renames what the other has half written.
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, waiting: Callable[[], object]) -> Generator[None]:
    """Hold the lock of a folder, which another process of this machine may hold; a kill releases it.

    The lock is the file `.NAME.lock` beside the folder, which stays there: one that was removed would let two
    processes hold two locks.

    Args:
        folder: It need not exist.
        waiting: Called if another process holds the lock, before it is waited for.

    Raises:
        OSError: The lock's file cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # some network file systems have no locks
        yield
