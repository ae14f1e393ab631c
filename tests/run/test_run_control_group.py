"""Limits are set on some group above a process's own; the least of them counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from dfmpc.run.schedule.control_group import core_limit, memory_limit

SLURM = "0::/system.slice/slurmd/job_7/step_0/user/task_0\n"
OLD = "12:cpuset:/\n5:memory:/slurm/uid_0/job_7\n4:cpu,cpuacct:/slurm/uid_0/job_7\n1:name=systemd:/a:b\n0::/\n"
UNLIMITED = "9223372036854771712"


def tree(root: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (SLURM, {"system.slice/slurmd/job_7/memory.max": "5000", "system.slice/memory.max": "max"}, 5000),
        (SLURM, {"system.slice/slurmd/job_7/memory.max": "5000", "system.slice/memory.max": "4000"}, 4000),
        (SLURM, {"system.slice/slurmd/job_7/step_0/user/task_0/memory.max": "3000"}, 3000),
        (SLURM, {"system.slice/slurmd/job_8/memory.max": "10", "memory.max": "max"}, None),
        ("0::/\n", {"memory.max": "7000"}, 7000),
        ("1:name=systemd:/\n0::/job\n", {"unified/job/memory.max": "7000"}, 7000),
        ("0::/../../other\n", {"memory.max": "7000", "other/memory.max": "6000"}, 6000),
        (OLD, {"memory/slurm/uid_0/job_7/memory.limit_in_bytes": "5000"}, 5000),
        (OLD, {"memory/slurm/memory.limit_in_bytes": "800", "memory/memory.limit_in_bytes": UNLIMITED}, 800),
        ("5:memory:/docker/12ab\n", {"memory/memory.limit_in_bytes": "9000"}, 9000),
        ("5:memory:/docker/12ab\n", {}, None),
        ("no such words", {"memory.max": "1"}, None),
        ("", {"memory.max": "1"}, None),
    ],
)
def test_the_least_limit_of_memory_counts(
    tmp_path: Path, groups: str, files: Mapping[str, str], expected: int | None
) -> None:
    assert memory_limit(tree(tmp_path, files), groups) == expected


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        (SLURM, {"system.slice/slurmd/job_7/cpu.max": "200000 100000", "system.slice/cpu.max": "max 100000"}, 2.0),
        (SLURM, {"system.slice/slurmd/job_7/cpu.max": "200000 100000", "cpu.max": "75000 50000"}, 1.5),
        (SLURM, {"system.slice/cpu.max": "max 100000"}, None),
        (SLURM, {}, None),
        (
            OLD,
            {"cpu,cpuacct/slurm/cpu.cfs_quota_us": "350000", "cpu,cpuacct/slurm/cpu.cfs_period_us": "100000"},
            3.5,
        ),
        (OLD, {"cpu/slurm/cpu.cfs_quota_us": "50000", "cpu/slurm/cpu.cfs_period_us": "100000"}, 0.5),
        (OLD, {"cpu/slurm/cpu.cfs_quota_us": "-1", "cpu/slurm/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_the_least_quota_of_cores_counts(
    tmp_path: Path, groups: str, files: Mapping[str, str], expected: float | None
) -> None:
    assert core_limit(tree(tmp_path, files), groups) == expected


def test_here_limits_are_absent_or_some_of_what_there_is() -> None:
    memory, cores = memory_limit(), core_limit()
    assert memory is None or memory > 2**20
    assert cores is None or cores > 0
