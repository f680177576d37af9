"""Fill a folder with files, one task a file, and write its index last.

Shards and mixes are made this way. A further kind of folder needs a plan (its tasks), a function
that runs one task, and a function that writes the index.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from flsep.cache.errors import FlsepError
from flsep.pipeline.execution.lock import open_output
from flsep.pipeline.execution.runners import Runner, run_inline
from flsep.pipeline.stopwatch import Stopwatch


class StageTask(Protocol):
    """The work for one file."""

    @property
    def name(self) -> str:
        """Name of the file."""

    @property
    def num_bytes(self) -> int:
        """Predicted size of the file."""


Task = TypeVar("Task", bound=StageTask)


@dataclass(slots=True)
class TaskReport:
    """The result of one task."""

    name: str
    # Tracks or mixes in the file; 0 if all were rejected, in which case there is no file.
    num_items: int = 0
    audio_seconds: float = 0.0
    # The file was there already, complete and intact.
    kept: bool = False
    # What was wrong with the file that was there, if one was.
    found: str | None = None
    # Items that cannot be stored, with the reason.
    rejected: list[tuple[str, str]] = field(default_factory=list)
    seconds: Stopwatch = field(default_factory=Stopwatch)


@dataclass(slots=True)
class Summary:
    """The result of a run.

    Attributes
    ----------
    num_made, num_kept : int
        Items stored by this run, and items that were stored already.
    audio_seconds : float
        Length of the items stored by this run.
    seconds : Stopwatch
        Time by phase, the sum over all workers.
    failed : list of (str, str)
        Items that are not stored, with the reason.
    renewed : list of str
        What was wrong with files that were there and were made again.
    """

    num_made: int = 0
    num_kept: int = 0
    audio_seconds: float = 0.0
    wall_seconds: float = 0.0
    seconds: Stopwatch = field(default_factory=Stopwatch)
    failed: list[tuple[str, str]] = field(default_factory=list)
    renewed: list[str] = field(default_factory=list)

    def add(self, report: TaskReport) -> None:
        """Add the result of a task."""
        self.failed += report.rejected
        self.seconds.add(report.seconds)
        if report.found:
            self.renewed.append(report.found)
        if report.kept:
            self.num_kept += report.num_items
        else:
            self.num_made += report.num_items
            self.audio_seconds += report.audio_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage(Generic[Task]):
    """How to fill a folder.

    Attributes
    ----------
    config : dict
        JSON values that decide what the files hold. A folder has one configuration for good.
    run_task : callable
        Makes the file of a task, or finds it complete. It is pickled and sent to workers.
    items_of : callable
        Names the items that are lost if a task fails.
    write_index : callable
        Writes the index of the files with these names, sorted.
    rejected : sequence of (str, str)
        Items that the plan leaves out, with the reason.
    needs_all : bool
        Write no index if anything failed.
    stops_at : tuple of exception types
        Failures that would affect other tasks too: they end the run at once, as `OSError` does.
    """

    folder: Path
    config: dict[str, Any]
    run_task: Callable[[Task], TaskReport]
    items_of: Callable[[Task], list[str]]
    write_index: Callable[[list[str]], None]
    rejected: Sequence[tuple[str, str]] = ()
    needs_all: bool = False
    stops_at: tuple[type[Exception], ...] = ()


def run_stage(
    stage: Stage[Task],
    tasks: Sequence[Task],
    *,
    runner: Runner = run_inline,
    report: Callable[[Task, TaskReport | None], None] = lambda task, result: None,
    is_part: bool = False,
) -> Summary:
    """Make every file that is not there yet, then write the index.

    `report` is called with each task as it ends and its report, None for a task that failed. With
    `is_part`, other jobs may run the other tasks at the same time: the folder is shared, and no
    index is written. MismatchError means that the folder is in use or holds another configuration.
    Whatever else a task raises, except an `FlsepError`, is a bug and ends the run.
    """
    start = time.perf_counter()
    # The plan's rejections belong to no part: each part would count them again.
    summary = Summary(failed=[] if is_part else list(stage.rejected))
    names = []
    with open_output(stage.folder, stage.config, shared=is_part):
        for outcome in runner(stage.run_task, tasks):
            if outcome.error is None:
                summary.add(outcome.result)
                # A task whose items were all rejected has made no file.
                if outcome.result.num_items:
                    names.append(outcome.result.name)
            elif isinstance(outcome.error, FlsepError) and not isinstance(
                outcome.error, stage.stops_at
            ):
                summary.failed += [
                    (item, str(outcome.error)) for item in stage.items_of(outcome.task)
                ]
            else:
                # A bug, or a failure that would affect every task: a full disk, damaged input.
                raise outcome.error
            report(outcome.task, outcome.result)
        summary.failed.sort()
        # The index comes last: a folder that has one is complete.
        if not is_part and not (stage.needs_all and summary.failed):
            stage.write_index(sorted(names))
    summary.wall_seconds = time.perf_counter() - start
    return summary
