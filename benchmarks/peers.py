"""The peers' environment: other libraries for sparse autoencoders, laid over this one.

    python -m benchmarks.peers                     # install if need be; print the folder
    python -m benchmarks.peers -- COMMAND ARGS...  # ... and run a command in it

It is a folder of packages, pinned in `peers.txt`, that is put in front of the import path: torch and Winnow
are yours, and nothing of theirs reaches your own environment. The folder is in Winnow's cache, under the
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
    # eai-sparsify would use its GPU kernel on a CPU too.
    "SPARSIFY_DISABLE_TRITON": "1",
    # No run may fetch or report anything: only the steps are compared.
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "TQDM_DISABLE": "1",
}


def peers_folder() -> Path:
    """The folder of this Python's packages, whether it exists or not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "winnow"
    digest = hashlib.sha256(PINS.read_bytes()).hexdigest()[:12]
    return cache / "peers" / f"{sys.implementation.cache_tag}-{digest}"


def installed() -> bool:
    """Whether `make peers` has been run for these pins."""
    return peers_folder().is_dir()


def install() -> Path:
    """Install the pins unless that is done; the folder appears whole or not at all."""
    folder = peers_folder()
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix="new-", dir=folder.parent))
        try:
            # Without dependencies: a torch of theirs would take the place of ours.
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(fresh)]
            subprocess.run([*pip, "-r", str(PINS)], check=True)
            # Another process may have been quicker.
            if not folder.is_dir():
                fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return folder


def environment() -> dict[str, str]:
    """This process's environment with the peers in front of the import path."""
    paths = [str(peers_folder()), os.environ.get("PYTHONPATH", "")]
    return os.environ | QUIET | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def main() -> None:
    """Install the peers, and run a command if one is given."""
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
