"""The specification on a mesh is that of one process, whatever the variant."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.support.meeting import meet
from tests.support.mesh_worker import N, go
from winnow.trainer.mesh.shard import has_latents
from winnow.trainer.mesh.world import World
from winnow.trainer.run.checkpoint import pack

SEEN = ("everything", "multi", "K falls", "dataset", "rows, batchtopk", "rows, batchtopk in one group")
SEEN += ("rows, matryoshka", "rows, transcoder", "matryoshka, batchtopk", "relu", "jumprelu")
SEEN += ("transcoder, skip, matryoshka, relu",)


def ended(case: str, world: World) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """This rank's state after the steps, and what they reported."""
    run, told = go(case, world, "eager")
    return pack(run), told


@pytest.mark.parametrize("case", SEEN)
def test_the_specification_on_a_mesh_is_that_of_one_process(case):
    alone, told = go(case, None, "eager")
    expected = pack(alone)
    for row in meet(2, 2, partial(ended, case)):
        for shard, found in enumerate(row):
            assert not isinstance(found, Exception), found
            state, reports = found
            part = slice(shard * N // 2, (shard + 1) * N // 2)
            for name, tensor in expected.items():
                right = tensor[part] if has_latents(name, tensor) else tensor
                torch.testing.assert_close(state[name], right, rtol=1e-7, atol=1e-9, msg=name)
            for report, right in zip(reports, told, strict=True):
                assert report["loss"] == pytest.approx(right["loss"], rel=1e-9)
                assert report["auxk"] == pytest.approx(right["auxk"], rel=1e-9)
                assert report["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-9)
