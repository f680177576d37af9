from pathlib import Path

import pytest

from flsep.cache.memory import free_host_bytes


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  9000 kB\nMemAvailable:    4000 kB\nHugePages_Total:  0\n"}
STAT = "anon 7\ninactive_file 100000\nactive_file 20000\n"
LEGACY = STAT + "total_inactive_file 100000\ntotal_active_file 20000\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/\n"}, 4_096_000),
        # Version 2: the parent's limit holds too, and the cache can be given up.
        (
            {
                "proc/self/cgroup": "0::/job/step\n",
                "sys/fs/cgroup/job/step/memory.max": "max\n",
                "sys/fs/cgroup/job/memory.max": "3000000\n",
                "sys/fs/cgroup/job/memory.current": "1000000\n",
                "sys/fs/cgroup/job/memory.stat": STAT,
            },
            2_120_000,
        ),
        # The same seen from within a container: the group is the top.
        (
            {
                "proc/self/cgroup": "0::/not/here\n",
                "sys/fs/cgroup/memory.max": "500000\n",
                "sys/fs/cgroup/memory.current": "700000\n",
                "sys/fs/cgroup/memory.stat": STAT,
            },
            0,
        ),
        # Version 1, with no limit of its own, within one that has.
        (
            {
                "proc/self/cgroup": "5:cpu:/a\n4:memory:/a/b\n0::/\n",
                "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/a/b/memory.usage_in_bytes": "1000000\n",
                "sys/fs/cgroup/memory/a/b/memory.stat": LEGACY,
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "2000000\n",
                "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "1500000\n",
                "sys/fs/cgroup/memory/a/memory.stat": LEGACY,
            },
            620_000,
        ),
        # There is room in the group, but not on the machine.
        (
            {
                "proc/self/cgroup": "0::/job\n",
                "sys/fs/cgroup/job/memory.max": "9000000\n",
                "sys/fs/cgroup/job/memory.current": "1000000\n",
                "sys/fs/cgroup/job/memory.stat": STAT,
            },
            4_096_000,
        ),
    ],
)
def test_free_host_memory(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert free_host_bytes(write(tmp_path, MEMINFO | files)) == expected


def test_free_memory_of_this_machine() -> None:
    assert 1 << 20 < free_host_bytes() < 1 << 50
