"""Ray on this machine: it and its actors get the cores that this process may use, not all there are."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import ray

from winnow.cluster.crew import CrewSettings, Named, cluster, threads_per_actor
from winnow.common.cores import usable_cores
from winnow.schemas.errors import WorkerError


@pytest.fixture
def one_core() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def settings(actors: int = 1, threads: int = 0) -> CrewSettings:
    return CrewSettings(Named("test", "actors", "threads", "gpus", "address"), actors, threads)


@pytest.mark.skipif(usable_cores() < 2, reason="one core")
@pytest.mark.usefixtures("one_core")
def test_a_process_kept_to_one_core_gives_ray_and_an_actor_one():
    with cluster(settings()):
        assert ray.cluster_resources()["CPU"] == 1
        assert threads_per_actor(settings()) == 1


def test_actors_share_the_cores_and_what_is_configured_stands():
    assert threads_per_actor(settings()) == usable_cores()
    assert threads_per_actor(settings(actors=2)) == max(1, usable_cores() // 2)
    assert threads_per_actor(settings(threads=5)) == 5


# What Ray raises when its processes take longer than 30 s to start, and when one of them dies.
@pytest.mark.parametrize("kind", [Exception, RuntimeError, ConnectionError])
def test_a_ray_that_does_not_start_here_is_a_sentence_that_says_what_to_do(monkeypatch, kind):
    def slow(**_: object) -> None:
        raise kind("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", slow)
    with pytest.raises(
        WorkerError, match=r"test: Ray did not start .* timed out .* the same command"
    ) as caught:
        with cluster(settings()):
            pass
    assert caught.value.exit_code == 1
