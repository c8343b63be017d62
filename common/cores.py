"""Cores that this process may use."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Count the cores this process may use, at least 1: its affinity's, limited by its cgroups' quota."""
    # `os.cpu_count()` alone is the machine's, also in a container with a fraction of it.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    # Rounded down, as Ray does: one busy thread more than the quota covers stalls all of them every period.
    return cores if quota is None else max(1, min(cores, int(quota)))


def cores_each(workers: int) -> int:
    """Divide this process's cores among several workers; at least 1 each."""
    return max(1, usable_cores() // workers)


def cpu_quota(groups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """Read the CPU quota of this process's control groups, in cores; None without a limit.

    Args:
        groups: Mount point of the control groups, version 1 or 2.
        membership: File that lists this process's groups.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    quotas: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # Version 2 has one line, without controllers; version 1 one per controller.
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = groups / "cpu" if controllers else groups
        # The groups above limit as well. In a container the path may be the host's, of which only the root
        # exists here: the container's own group.
        below = PurePosixPath(path.lstrip("/"))
        for folder in (below, *below.parents):
            quota = _quota_of(mount / folder, version=1 if controllers else 2)
            if quota is not None:
                quotas.append(quota)
    return min(quotas, default=None)


def _quota_of(group: Path, version: int) -> float | None:
    names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        quota, period = " ".join((group / name).read_text(encoding="ascii") for name in names).split()
        return int(quota) / int(period) if int(quota) > 0 else None  # version 1 says -1 for no limit
    except (OSError, ValueError):  # no such group, or version 2's word for no limit, `max`
        return None
