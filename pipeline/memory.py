"""The memory that workers need, and what a machine or a job's limits leave them."""

from collections.abc import Iterator
from pathlib import Path

WORKER_BYTES = 9 << 28
"""What a worker needs with VGGish, however long its tracks are: 1.5 GiB, measured, and room for
more channels and sources. Dask gives no new task to a worker that takes 80 % of its limit."""
_ROOT = Path("/")


def free_bytes(root: Path = _ROOT) -> int:
    """Return the memory that this process can still take.

    That is what the machine has free, or what the limits of its control groups leave, if less:
    those of a batch job or a container, version 1 or 2. Files in the page cache count as free.

    Parameters
    ----------
    root : Path
        Holds ``proc`` and ``sys``.
    """
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    machine = dict(line.split(":") for line in lines)
    free = [int(machine["MemAvailable"].split()[0]) << 10]
    free += _group_bytes(root)
    return max(0, min(free))


def _group_bytes(root: Path) -> Iterator[int]:
    """Yield what each control group that the process is in, and each above it, leaves."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(top):
                yield from _left_in(group, *names)


def _left_in(group: Path, limit: str, usage: str, cached: str) -> Iterator[int]:
    try:
        most = (group / limit).read_text(encoding="ascii").strip()
        used = int((group / usage).read_text(encoding="ascii"))
        statistics = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:  # a group above the container's own, or the root, which has no limit
        return
    if most != "max":
        yield int(most) - used + int(dict(line.split() for line in statistics).get(cached, 0))
