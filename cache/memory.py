"""Free memory of the machine, within the limits of the job or container."""

from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def free_host_bytes(root: Path = _ROOT) -> int:
    """Return the memory that this process can still allocate, in bytes.

    This is the free memory of the machine or, if less, what the process's control groups (version
    1 or 2: a batch job, a container) leave. `root` holds ``proc`` and ``sys``.
    """
    # Unlike MemFree, MemAvailable counts cached files as free: the kernel drops them when needed.
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    machine = dict(line.split(":", 1) for line in lines)
    free = [int(machine["MemAvailable"].split()[0]) << 10]
    free += _group_bytes(root)
    return max(0, min(free))  # a group can be over its limit for a moment


def _group_bytes(root: Path) -> Iterator[int]:
    """Yield the memory left in each of the process's control groups and their parents."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        # Each line reads "number:controllers:path".
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2 has one hierarchy, without names of controllers
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        folder = top / path.strip("/")
        # A limit of a parent holds for all groups below it.
        for group in (folder, *folder.parents):
            if group.is_relative_to(top):
                yield from _left_in(group, *names)


def _left_in(group: Path, limit: str, usage: str, prefix: str) -> Iterator[int]:
    try:
        most = (group / limit).read_text(encoding="ascii").strip()
        used = int((group / usage).read_text(encoding="ascii"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:  # a group outside the container, or the root group, which has no limit
        return
    statistics = dict(line.split() for line in lines)
    cached = sum(int(statistics.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))
    # Version 1 has no word for "no limit": it states a number above all memory, which never wins.
    if most != "max":
        yield int(most) - used + cached
