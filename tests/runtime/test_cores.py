"""Cores that a process may use: its mask, and a container's limits on processor time in both forms."""

import os

import pytest

from migician.runtime.cores import usable_cores

MASK = len(os.sched_getaffinity(0))


def write(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


@pytest.mark.parametrize(
    ("limit", "wanted"),
    [("max 100000", 99), ("100000 100000", 1), ("150000 100000", 2), ("200000 100000", 2), ("10000 100000", 1),
     ("50000 50000", 1), ("", 99), ("words", 99), ("0 0", 99), ("-1 100000", 99)],
)  # fmt: skip
def test_the_unified_hierarchy(tmp_path, limit, wanted):
    write(tmp_path, "proc/self/cgroup", "0::/\n")
    write(tmp_path, "sys/fs/cgroup/cpu.max", limit + "\n")
    assert usable_cores(tmp_path) == min(wanted, MASK)


def test_a_limit_of_any_group_above_counts(tmp_path):
    write(tmp_path, "proc/self/cgroup", "0::/system.slice/one.scope\n")
    write(tmp_path, "sys/fs/cgroup/system.slice/one.scope/cpu.max", "max 100000\n")
    assert usable_cores(tmp_path) == MASK
    write(tmp_path, "sys/fs/cgroup/system.slice/cpu.max", "100000 100000\n")
    assert usable_cores(tmp_path) == 1


@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_the_first_version(tmp_path, mount):
    write(tmp_path, "proc/self/cgroup", "4:memory:/\n3:cpu,cpuacct:/docker/abc\n0::/\n")
    write(tmp_path, f"sys/fs/cgroup/{mount}/cpu.cfs_quota_us", "100000\n")
    write(tmp_path, f"sys/fs/cgroup/{mount}/cpu.cfs_period_us", "100000\n")
    assert usable_cores(tmp_path) == 1
    write(tmp_path, f"sys/fs/cgroup/{mount}/cpu.cfs_quota_us", "-1\n")
    assert usable_cores(tmp_path) == MASK


def test_no_such_files_leave_the_mask(tmp_path):
    assert usable_cores(tmp_path) == MASK
