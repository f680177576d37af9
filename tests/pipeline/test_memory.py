from pathlib import Path

import pytest

from flsep.pipeline import reporting
from flsep.pipeline.memory import free_bytes

GIB = 1 << 30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 8 GiB free and no limits."""
    write(tmp_path / "proc/meminfo", f"MemTotal: 1 kB\nMemAvailable:  {8 << 20} kB")
    return tmp_path


def write(path: Path, text: str | int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def limit(folder: Path, most: str | int, used: int, cached: int, version: int = 2) -> None:
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    write(folder / names[0], most)
    write(folder / names[1], used)
    write(folder / "memory.stat", f"anon 1\n{names[2]} {cached}")


def test_without_limits_it_is_what_the_machine_has(root: Path) -> None:
    assert free_bytes(root) == 8 * GIB
    write(root / "proc/self/cgroup", "0::/job")
    limit(root / "sys/fs/cgroup/job", "max", 5 * GIB, 0)
    assert free_bytes(root) == 8 * GIB


def test_the_limit_of_a_job_counts_and_its_page_cache_does_not(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/slurm/job_7/step_0")
    group = root / "sys/fs/cgroup/slurm/job_7"
    limit(group / "step_0", "max", 3 * GIB, 2 * GIB)
    limit(group, 4 * GIB, 3 * GIB, 2 * GIB)  # of the group above the process's own
    assert free_bytes(root) == 3 * GIB
    limit(group, GIB, 2 * GIB, 0)
    assert free_bytes(root) == 0


def test_version_1_of_control_groups(root: Path) -> None:
    write(root / "proc/self/cgroup", "4:cpu,cpuacct:/other\n3:memory:/job\n1:name=systemd:/x:y")
    limit(root / "sys/fs/cgroup/memory/job", 3 * GIB, GIB, GIB // 2, version=1)
    limit(root / "sys/fs/cgroup/memory", 9223372036854771712, 20 * GIB, 0, version=1)
    assert free_bytes(root) == 2.5 * GIB


def test_this_machine() -> None:
    assert 1 << 20 < free_bytes() < 1 << 50


def test_more_workers_than_the_memory_takes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "free_bytes", lambda: 4 * GIB)
    for workers in (0, 1):
        reporting.require_memory(workers)
    with pytest.raises(
        ValueError, match=r"2 worker\(s\) need about 4.5 GiB of memory, 4 GiB are free; use fewer"
    ):
        reporting.require_memory(2)
    monkeypatch.setattr(reporting, "free_bytes", lambda: 2 * GIB)
    with pytest.raises(ValueError, match=r"1 worker\(s\) need"):
        reporting.require_memory(0)
