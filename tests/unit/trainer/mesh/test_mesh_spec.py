"""What a mesh may be, asked before any process meets another."""

from __future__ import annotations

import pytest

from winnow.schemas.errors import ConfigError
from winnow.schemas.training import TrainSpec
from winnow.trainer.mesh.fit import check_mesh


def spec(**fields):
    base = {"out": "x", "hook": "h.1", "latents": 6, "k": 2, "batch_rows": 64, "lanes": 8}
    return TrainSpec.model_validate(base | fields)


@pytest.mark.parametrize(
    ("mesh", "processes", "found"),
    [({}, 1, (1, 1)), ({}, 4, (4, 1)), ({"latent": 4}, 8, (2, 4)), ({"data": 2, "latent": 6}, 12, (2, 6))],
    ids=str,
)
def test_a_mesh_takes_the_processes_there_are(mesh, processes, found):
    """6 latents over 4 shards: they differ by one."""
    assert check_mesh(spec(mesh=mesh), processes) == found


@pytest.mark.parametrize(
    ("fields", "processes", "words"),
    [
        ({"mesh": {"latent": 2}}, 3, r"1 x 2 \(data x latent\).*2 processes.*3.*torchrun"),
        ({"mesh": {"data": 3}}, 3, r"train\.mesh\.data.*divisor of lanes \(8\).*3"),
        ({"mesh": {"latent": 7}}, 7, r"train\.mesh\.latent.*at most latents \(6\).*7"),
        ({"kernels": "eager"}, 2, r"kernels: eager.*one process.*2"),
    ],
    ids=str,
)
def test_one_that_does_not_fit_is_a_sentence(fields, processes, words):
    with pytest.raises(ConfigError, match=words):
        check_mesh(spec(**fields), processes)
