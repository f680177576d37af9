"""The whole offline stage: plan, make the shards inline or on Dask, write the index last."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from flsep.cache import MissingDataError, ShardFile, build_index, remove_leftovers, write_index
from flsep.cache.format import INDEX_NAME
from flsep.pipeline.execution.lock import CONFIG_NAME, claim, locked
from flsep.pipeline.execution.parts import share_tasks
from flsep.pipeline.execution.runners import Outcome, run_inline
from flsep.pipeline.execution.stopwatch import Stopwatch
from flsep.pipeline.shards.build import ShardReport, ShardSettings, find_problem, make_shard
from flsep.pipeline.shards.failures import read_failures, still_failed
from flsep.pipeline.shards.plan import Plan, ShardTask

Runner = Callable[
    [Callable[[ShardTask], ShardReport], Sequence[ShardTask]],
    Iterator[Outcome],
]


@dataclass(slots=True)
class RunSummary:
    """What a run did.

    Attributes
    ----------
    num_made, num_kept : int
        Tracks stored now, and found stored and intact.
    audio_seconds : float
        Length of the tracks stored now.
    wall_seconds : float
        How long the run took.
    seconds : Stopwatch
        Time that all workers together spent on each part.
    failed : list of (str, str)
        Tracks that are not stored, with the reason.
    renewed : list of str
        What was wrong with the shards that were there and were made again.
    """

    num_made: int = 0
    num_kept: int = 0
    audio_seconds: float = 0.0
    wall_seconds: float = 0.0
    seconds: Stopwatch = field(default_factory=Stopwatch)
    failed: list[tuple[str, str]] = field(default_factory=list)
    renewed: list[str] = field(default_factory=list)


def run_plan(
    plan: Plan,
    settings: ShardSettings,
    *,
    runner: Runner = run_inline,
    report: Callable[[ShardTask, ShardReport | None], None] = lambda task, shard: None,
    part: tuple[int, int] | None = None,
    repair: bool = False,
) -> RunSummary:
    """Make every shard of a plan that is not there yet, then the index.

    Parameters
    ----------
    plan : Plan
        What to do.
    settings : ShardSettings
        How; its folder exists or can be made.
    runner : callable
        Runs a function over tasks and yields an `Outcome` for each.
    report : callable
        Told of each task as it ends, with None for one that failed as a whole.
    part : (int, int), optional
        Make the shards of the I-th of N parts alone, and no index: see `finalise`. Parts may run
        at the same time.
    repair : bool
        Try the tracks again that failed before.

    Raises
    ------
    MismatchError
        If the folder holds shards of another configuration, or another run is writing into it.
    OSError
        If the folder or a shard cannot be written.
    """
    start = time.perf_counter()
    folder = settings.folder
    tasks = plan.tasks if part is None else share_tasks(plan.tasks, *part)
    folder.mkdir(parents=True, exist_ok=True)
    summary = RunSummary(failed=[] if part else list(plan.rejected))
    with locked(folder, shared=part is not None):
        claim(folder, settings.fingerprinted())
        if part is None:
            remove_leftovers(folder)
        made = []
        for outcome in runner(partial(make_shard, settings=settings, repair=repair), tasks):
            if outcome.error is not None:
                # A disk that is full or gone fails every task alike: stop, and say it once.
                if isinstance(outcome.error, OSError):
                    raise outcome.error
                reason = f"{type(outcome.error).__name__}: {outcome.error}"
                summary.failed += [(p.track.name, reason) for p in outcome.task.tracks]
                report(outcome.task, None)
                continue
            _add(summary, outcome.result)
            if outcome.result.num_tracks:
                made.append(outcome.result.name)
            report(outcome.task, outcome.result)
        summary.failed.sort()
        if part is None:
            _index(folder, made)
    summary.wall_seconds = time.perf_counter() - start
    return summary


def finalise(plan: Plan, settings: ShardSettings) -> RunSummary:
    """Write the index of the shards that parts have made.

    Raises
    ------
    MissingDataError
        If a shard is missing, or is not the one that the plan has.
    MismatchError
        If the folder holds shards of another configuration, or a run is writing into it.
    """
    start = time.perf_counter()
    folder = settings.folder
    if not (folder / CONFIG_NAME).exists():
        raise MissingDataError(f"{folder}: no part has run here; expected shards to index")
    summary = RunSummary(failed=list(plan.rejected))
    with locked(folder, shared=False):
        claim(folder, settings.fingerprinted())
        remove_leftovers(folder)
        made, problems = [], []
        for task in plan.tasks:
            path = folder / task.name
            failed = dict(still_failed(task.tracks, read_failures(path)))
            summary.failed += [(name, failure.reason) for name, failure in failed.items()]
            tracks = [planned for planned in task.tracks if planned.track.name not in failed]
            if not tracks:
                continue
            if problem := find_problem(path, tracks, settings, verify=False):
                problems.append(f"{problem} (for {tracks[0].track.name!r})")
            made.append(task.name)
            summary.num_kept += len(tracks)
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise MissingDataError(
                f"{folder}: {len(problems)} of {len(plan.tasks)} shards are not there: "
                f"{'; '.join(problems[:5])}{more}. Run the parts again that were to make them"
            )
        summary.failed.sort()
        _index(folder, made)
    summary.wall_seconds = time.perf_counter() - start
    return summary


def _index(folder: Path, names: Sequence[str]) -> None:
    if names:
        write_index(folder, build_index(ShardFile(folder / name) for name in sorted(names)))
    else:
        (folder / INDEX_NAME).unlink(missing_ok=True)


def find_strangers(folder: Path, plan: Plan) -> list[str]:
    """Return shards in a folder that do not belong to the plan: those of an earlier corpus."""
    planned = {task.name for task in plan.tasks}
    return sorted(path.name for path in folder.glob("*.h5") if path.name not in planned)


def _add(summary: RunSummary, shard: ShardReport) -> None:
    summary.failed += shard.rejected
    if shard.found:
        summary.renewed.append(shard.found)
    summary.seconds.add(shard.seconds)
    if shard.kept:
        summary.num_kept += shard.num_tracks
    else:
        summary.num_made += shard.num_tracks
        summary.audio_seconds += shard.audio_seconds
