"""How many cores there are for this process."""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

CGROUPS, MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Cores this process may use, at least 1: its affinity's, cut to whole cores of its cgroups' quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    # Rounded down, as by Ray: one busy thread more than the quota pays for stops them all in every period.
    return cores if quota is None else max(1, min(cores, int(quota)))


def cores_each(workers: int) -> int:
    """Cores of each of several workers that share those of this process; at least 1."""
    return max(1, usable_cores() // workers)


def cpu_quota(groups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """CPU time that the control groups of this process may take, in cores; None where nothing limits it.

    Reads both versions of Linux's control groups. The groups above limit as well. In a container the path in
    `membership` may be the host's, of which only the root is there: the container's own group.

    Args:
        groups: Where they are mounted.
        membership: Which of them this process is in.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    quotas: list[float] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = groups / "cpu" if controllers else groups
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
