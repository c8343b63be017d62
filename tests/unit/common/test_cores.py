"""The cores of a process: its affinity's, cut to the quota of its control groups, both versions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from winnow.common import cores
from winnow.common.cores import cores_each, cpu_quota, usable_cores


def quota(folder: Path, membership: str, files: dict[str, str]) -> float | None:
    """The quota where control groups and /proc/self/cgroup look like this."""
    for name, text in files.items():
        path = folder / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "membership").write_text(membership)
    return cpu_quota(folder / "groups", folder / "membership")


@pytest.mark.parametrize(
    ("membership", "files", "found"),
    [
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/a.slice/b\n", {"a.slice/cpu.max": "400000 100000\n", "a.slice/b/cpu.max": "max 100000\n"}, 4.0),
        (
            "0::/a.slice/b\n",
            {"a.slice/cpu.max": "4000 1000\n", "a.slice/b/cpu.max": "50000 100000\n"},
            0.5,
        ),
        ("0::/system/docker-1\n", {"cpu.max": "300000 100000\n"}, 3.0),
    ],
    ids=["a container", "no limit", "the root", "the slice limits", "the group limits", "the host's path"],
)
def test_version_2(tmp_path, membership, files, found):
    assert quota(tmp_path, membership, files) == found


@pytest.mark.parametrize(
    ("path", "place", "us", "found"),
    [
        ("/", "", "150000", 1.5),
        ("/", "", "-1", None),
        ("/docker/1", "", "200000", 2.0),  # in the container, whose mount holds its own group only
        ("/docker/1", "docker/1/", "800000", 8.0),
    ],
)
def test_version_1(tmp_path, path, place, us, found):
    files = {f"cpu/{place}cpu.cfs_quota_us": f"{us}\n", f"cpu/{place}cpu.cfs_period_us": "100000\n"}
    membership = f"4:memory:/other\n3:cpu,cpuacct:{path}\n2:cpuset:/\n1:name=systemd:/\n0::/\n"
    assert quota(tmp_path, membership, files) == found


def test_a_system_without_control_groups_has_no_quota(tmp_path):
    assert cpu_quota(tmp_path, tmp_path / "none") is None


@pytest.mark.parametrize(
    ("quota", "affinity", "found"),
    [(None, 6, 6), (2.5, 6, 2), (0.5, 6, 1), (16.0, 6, 6)],
)
def test_the_quota_counts_in_whole_cores_and_one_at_least(monkeypatch, quota, affinity, found):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)), raising=False)
    monkeypatch.setattr(cores, "cpu_quota", lambda: quota)
    assert usable_cores() == found
    assert [cores_each(workers) for workers in (1, 2, 100)] == [found, max(1, found // 2), 1]
