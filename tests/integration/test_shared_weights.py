"""Two processes that hold the same subject on the CPU hold its weights once between them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.support.tiny import make_subject
from winnow.subject import Subject

CHILD = """
import sys
import numpy as np
from winnow import Subject
subject = Subject.load(sys.argv[1], until=["resid_post.1"])
subject.activations(np.zeros((1, 8), np.int64), ["resid_post.1"])
print("ready", flush=True)
sys.stdin.readline()
"""


def mapped(pid: int | str, folder: Path) -> dict[str, int]:
    """Bytes of a process's mappings of the files in `folder`, by kind, as the kernel counts them."""
    found: dict[str, int] = {}
    ours = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = f"{folder}/" in line
        elif ours and line.endswith(" kB"):
            kind, count, _ = line.split()
            found[kind[:-1]] = found.get(kind[:-1], 0) + int(count) * 1024
    return found


def test_the_weights_are_held_once(tmp_path: Path) -> None:
    folder = make_subject(tmp_path, layers=2, width=512)
    subject = Subject.load(folder, until=["resid_post.1"])
    subject.activations(np.zeros((1, 8), np.int64), ["resid_post.1"])
    weights = sum(parameter.numel() * 4 for parameter in subject.model.parameters())
    assert weights > 16 * 2**20
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        both = mapped("self", tmp_path), mapped(other.pid, tmp_path)
        other.communicate("\n")
    for one in both:
        assert one["Rss"] > 0.9 * weights, "each reads them where the file is mapped"
        assert one["Private_Dirty"] == 0, "nobody has a copy"
    together = sum(one["Pss"] for one in both)
    assert together < 1.2 * weights, "the kernel counts them once for the two"
