"""How many cores this process may use: those of its affinity mask, fewer where a container's limit says so."""

import math
import os
from pathlib import Path

__all__ = ["usable_cores"]


def usable_cores(root: Path = Path("/")) -> int:
    """Counts cores, at least 1: the mask (taskset), and the least of the limits on processor time (cgroup cpu.max).

    A limit of 2.5 cores counts as 3: a thread that waits costs less than a core left idle.
    root: where /proc and /sys lie.
    """
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = min(_unified(root), _first_version(root))
    return max(1, min(mask, math.ceil(quota - 1e-6))) if math.isfinite(quota) else max(1, mask)


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except (OSError, ValueError):
        return ""


def _share(quota: str, period: str) -> float:
    """Cores that a quota of processor time in each period comes to; infinite where there is none."""
    try:
        time, whole = float(quota), float(period)
    except ValueError:  # "max"
        return math.inf
    return time / whole if time > 0 and whole > 0 else math.inf


def _groups(root: Path, controller: str) -> list[Path]:
    """This process's group of a controller ("" is the unified hierarchy) and all above it, relative to its mount."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controller in controllers.split(","):
            here = Path(path.lstrip("/"))
            return [here, *here.parents]
    return [Path(".")]


def _unified(root: Path) -> float:
    limits = (_read(root / "sys/fs/cgroup" / group / "cpu.max").split() for group in _groups(root, ""))
    return min((_share(*limit) for limit in limits if len(limit) == 2), default=math.inf)


def _first_version(root: Path) -> float:
    shares = [math.inf]
    for mount in ("cpu", "cpu,cpuacct"):
        for group in _groups(root, "cpu"):
            place = root / "sys/fs/cgroup" / mount / group
            shares.append(_share(_read(place / "cpu.cfs_quota_us"), _read(place / "cpu.cfs_period_us")))
    return min(shares)
