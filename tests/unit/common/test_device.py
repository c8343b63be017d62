"""The settings of a run."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a process of its own: faults are counted per process, and threads that other tests left behind fault too.
# Of thirty steps the last ten count: allocations move about in the heap at first, for up to six steps.
_FAULTS_PER_STEP = """
import resource
import torch
from winnow.common.device import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    held = [torch.ones(6 << 20) for _ in range(3)]  # 24 MiB each
    del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if keep_memory():
    print(*[faults() for _ in range(30)])
"""


def test_what_a_step_gives_back_is_kept_for_the_next():
    run = subprocess.run([sys.executable, "-c", _FAULTS_PER_STEP], capture_output=True, text=True, check=True)
    if not run.stdout:
        pytest.skip("this C library has no such setting")
    faults = [int(word) for word in run.stdout.split()]
    pages = 3 * (24 << 20) // 4096
    assert faults[0] > pages * 0.9  # what is new to the process is counted
    assert max(faults[-10:]) < pages / 30
