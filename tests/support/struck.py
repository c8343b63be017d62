"""A command that a signal strikes at a chosen moment, so that no test has to be quick enough to send it.

    python -m tests.support.struck OBJECT SIGNALS MODULE ARGUMENTS...

runs `MODULE`. When it has written the bytes of the first object whose path contains the pattern `OBJECT`, and
that object is not there yet, it sends itself the signals (`SIGKILL`, or several: `SIGUSR1,SIGTERM`).
"""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from winnow.store.objects.local import LocalStore


def begun(wanted: str, signals: str, command: Sequence[str], **options) -> subprocess.Popen:
    """Start `python -m` the words of `command`, to be struck."""
    words = [sys.executable, "-m", "tests.support.struck", wanted, signals, *command]
    return subprocess.Popen(words, cwd=Path(__file__).parents[2], **options)


def killed(wanted: str, command: Sequence[str]) -> None:
    """Run a command until SIGKILL strikes it."""
    process = begun(wanted, "SIGKILL", command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    told = process.communicate(timeout=300)[1]
    assert process.returncode == -signal.SIGKILL, told


def _strike(wanted: str, signals: list[signal.Signals]) -> None:
    """Let the store send `signals` once."""
    here, lock, sent = threading.local(), threading.Lock(), list[signal.Signals]()
    write = LocalStore._write_temp

    def named(real):
        def put(self, key, *arguments, **options):
            here.path = str(self._path(key))
            return real(self, key, *arguments, **options)

        return put

    def write_and_strike(self, *arguments, **options):
        temp = write(self, *arguments, **options)
        with lock:  # metadata is put by several threads
            if not sent and re.search(wanted, here.path):
                sent.extend(signals)
                for number in signals:
                    os.kill(os.getpid(), number)
        return temp

    LocalStore.put, LocalStore.put_new = named(LocalStore.put), named(LocalStore.put_new)
    LocalStore._write_temp = write_and_strike


if __name__ == "__main__":
    pattern, names, module, *words = sys.argv[1:]
    _strike(pattern, [signal.Signals[name] for name in names.split(",")])
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
