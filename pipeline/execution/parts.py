"""Distribute tasks over the jobs of an array job, which run without a scheduler between them."""

import heapq
from collections.abc import Sequence
from typing import Protocol, TypeVar

from flsep.pipeline.errors import SettingsError


class _Sized(Protocol):
    @property
    def num_bytes(self) -> int: ...


Task = TypeVar("Task", bound=_Sized)


def tasks_of_part(tasks: Sequence[Task], part: int, num_parts: int) -> tuple[Task, ...]:
    """Return the tasks of one part, counted from 1; all parts have about the same number of bytes.

    `tasks` are all tasks of a plan, largest first. The result depends on the plan alone, so that
    the jobs need not talk to each other.
    """
    if not 1 <= part <= num_parts:
        raise SettingsError(f"--part {part}/{num_parts}: expected a part from 1 to {num_parts}")
    # Greedy: each task goes to the part with the fewest bytes so far, the top of the heap.
    loads = [(0, number) for number in range(1, num_parts + 1)]
    chosen = []
    for task in tasks:
        load, number = loads[0]
        heapq.heapreplace(loads, (load + task.num_bytes, number))
        if number == part:
            chosen.append(task)
    return tuple(chosen)
