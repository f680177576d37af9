"""Share tasks among the jobs of an array."""

import heapq
from collections.abc import Sequence
from typing import Protocol, TypeVar

from flsep.pipeline.errors import SettingsError


class _Sized(Protocol):
    @property
    def num_bytes(self) -> int: ...


Task = TypeVar("Task", bound=_Sized)


def share_tasks(tasks: Sequence[Task], number: int, num_parts: int) -> tuple[Task, ...]:
    """Return the tasks of one of several parts of equal size, the same ones for the same plan.

    Each task, largest first, goes to the part that has least so far.

    Parameters
    ----------
    tasks : sequence
        All tasks of a plan, largest first; they have an attribute `num_bytes`.
    number : int
        Of the part, from 1.
    num_parts : int
        How many there are.

    Raises
    ------
    ValueError
        If there is no such part.
    """
    if not 1 <= number <= num_parts:
        raise SettingsError(f"--part {number}/{num_parts}: expected a part from 1 to {num_parts}")
    loads = [(0, part) for part in range(1, num_parts + 1)]  # a heap
    share = []
    for task in tasks:
        load, part = loads[0]
        heapq.heapreplace(loads, (load + task.num_bytes, part))
        if part == number:
            share.append(task)
    return tuple(share)
