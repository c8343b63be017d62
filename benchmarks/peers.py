"""The peers' environment: other libraries for sparse autoencoders, laid over this one.

    python -m benchmarks.peers                     # install if need be; print the folder
    python -m benchmarks.peers -- COMMAND ARGS...  # ... and run a command in it

It is a folder of packages, pinned in `peers.txt`, that goes in front of the import path: torch and Winnow are
the ones you run, nothing of theirs reaches your own environment. The folder lies in Winnow's cache under the
digest of the pins, so that a fresh clone finds it again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PINS = Path(__file__).with_name("peers.txt")
QUIET = {
    "SPARSIFY_DISABLE_TRITON": "1",  # eai-sparsify would take its GPU kernel on a CPU too
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "TQDM_DISABLE": "1",
}


def peers_folder() -> Path:
    """Where this Python's packages lie, or will."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "winnow"
    digest = hashlib.sha256(PINS.read_bytes()).hexdigest()[:12]
    return cache / "peers" / f"{sys.implementation.cache_tag}-{digest}"


def installed() -> bool:
    """Whether `make peers` has been run for these pins."""
    return peers_folder().is_dir()


def install() -> Path:
    """Install the pins unless they are; the folder appears whole or not at all."""
    folder = peers_folder()
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix="new-", dir=folder.parent))
        try:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(fresh)]
            subprocess.run([*pip, "-r", str(PINS)], check=True)
            if not folder.is_dir():  # another process may have been quicker
                fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return folder


def environment() -> dict[str, str]:
    """This process's environment with the peers in front of the import path."""
    paths = [str(peers_folder()), os.environ.get("PYTHONPATH", "")]
    return os.environ | QUIET | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def main() -> None:
    """Install; run what is asked for."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return
    folder = install()
    command = sys.argv[2:] if sys.argv[1:2] == ["--"] else sys.argv[1:]
    if not command:
        print(folder)
        return
    os.execvpe(command[0], command, environment())


if __name__ == "__main__":
    main()
