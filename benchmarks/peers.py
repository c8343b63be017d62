"""The peers' environment: other libraries for sparse autoencoders, laid over this one.

    python -m benchmarks.peers                            # install if need be; print the folders
    python -m benchmarks.peers -- COMMAND ARGS...         # ... and run a command with the libraries for SAEs
    python -m benchmarks.peers circuits -- COMMAND ...    # ... or with circuit-tracer

They are folders of packages, pinned in `peers.txt` and `peers-circuits.txt`, that are put in front of the
import path: torch and Winnow are yours, and nothing of theirs reaches your own environment. They are in
Winnow's cache, under the digests of the pins, so that a fresh clone finds them again. circuit-tracer has its
own, since it wants another transformers.
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
CIRCUITS = Path(__file__).with_name("peers-circuits.txt")
QUIET = {
    # eai-sparsify would use its GPU kernel on a CPU too.
    "SPARSIFY_DISABLE_TRITON": "1",
    # No run may fetch or report anything: only the steps are compared.
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "TQDM_DISABLE": "1",
}


def peers_folder(pins: Path = PINS) -> Path:
    """The folder of this Python's packages for these pins, whether it exists or not."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "winnow"
    digest = hashlib.sha256(pins.read_bytes()).hexdigest()[:12]
    return cache / "peers" / f"{sys.implementation.cache_tag}-{digest}"


def installed(pins: Path = PINS) -> bool:
    """Whether `make peers` has been run for these pins."""
    return peers_folder(pins).is_dir()


def install(pins: Path = PINS) -> Path:
    """Install the pins unless that is done; the folder appears whole or not at all."""
    folder = peers_folder(pins)
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix="new-", dir=folder.parent))
        try:
            # Without dependencies: a torch of theirs would take the place of ours.
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(fresh)]
            subprocess.run([*pip, "-r", str(pins)], check=True)
            # Another process may have been quicker.
            if not folder.is_dir():
                fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return folder


def environment(pins: Path = PINS) -> dict[str, str]:
    """This process's environment with the peers in front of the import path."""
    paths = [str(peers_folder(pins)), os.environ.get("PYTHONPATH", "")]
    return os.environ | QUIET | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def main() -> None:
    """Install the peers, and run a command if one is given."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return
    arguments = sys.argv[1:]
    pins = CIRCUITS if arguments[:1] == ["circuits"] else PINS
    arguments = arguments[pins == CIRCUITS :]
    command = arguments[arguments[:1] == ["--"] :]
    if not command:
        print(*map(install, (PINS, CIRCUITS)), sep="\n")
        return
    install(pins)
    os.execvpe(command[0], command, environment(pins))


if __name__ == "__main__":
    main()
