"""The settings of a run."""

from __future__ import annotations

import resource

import pytest
import torch

from trainer.device import keep_memory

PAGE = 4096


def test_what_a_step_gives_back_is_kept_for_the_next():
    if not keep_memory():
        pytest.skip("this C library has no such setting")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        held = [torch.ones(6 << 20) for _ in range(3)]  # 24 MiB each
        del held
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    # what lies between them moves them about at first
    assert min(faults() for _ in range(6)) < (24 << 20) / PAGE / 10
