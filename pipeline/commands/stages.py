"""Run a stage for a command: start the workers, show progress, collect the summary."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from flsep.pipeline.commands.worker_options import start_workers

if TYPE_CHECKING:
    from flsep.pipeline.execution.cluster import ClusterSettings
    from flsep.pipeline.execution.stage import Stage, StageTask, Summary

Task = TypeVar("Task", bound="StageTask")


def run_with_workers(
    stage: "Stage[Task]",
    tasks: Sequence[Task],
    workers: "ClusterSettings | str | None",
    progress: AbstractContextManager[Callable[[Task, Any], None]],
    *,
    is_part: bool,
) -> "Summary":
    """Run the tasks of a stage on workers as from `choose_workers`."""
    from flsep.pipeline.execution.stage import run_stage

    # The workers come first: their own messages would break the progress bar, and the time in which
    # they start is not work done.
    with start_workers(workers) as runner, progress as report:
        return run_stage(stage, tasks, runner=runner, report=report, is_part=is_part)
