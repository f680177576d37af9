"""The memory that a machine, or the limits of a job, leave."""

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def free_host_bytes(root: Path = _ROOT) -> int:
    """Return the memory that this process can still take.

    That is what the machine has free, or what the limits of its control groups leave, if less:
    those of a batch job or a container, version 1 or 2. Files in the page cache count as free, as
    the kernel gives them up when memory is asked for.

    Parameters
    ----------
    root : Path
        Holds ``proc`` and ``sys``.
    """
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    machine = dict(line.split(":", 1) for line in lines)
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
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        folder = top / path.strip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(top):
                yield from _left_in(group, *names)


def _left_in(group: Path, limit: str, usage: str, prefix: str) -> Iterator[int]:
    try:
        most = (group / limit).read_text(encoding="ascii").strip()
        used = int((group / usage).read_text(encoding="ascii"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:  # a group above the container's own, or the root, which has no limit
        return
    statistics = dict(line.split() for line in lines)
    cached = sum(int(statistics.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    if most != "max":
        yield int(most) - used + cached
