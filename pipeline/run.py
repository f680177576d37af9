"""The whole offline stage: plan, make the shards inline or on Dask, write the index last."""

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from flsep.cache import (
    MismatchError,
    ShardFile,
    build_index,
    remove_leftovers,
    write_index,
    write_json,
)
from flsep.cache.format import INDEX_NAME, fingerprint
from flsep.pipeline.build import ShardReport, ShardSettings, make_shard
from flsep.pipeline.execute import Outcome, run_inline
from flsep.pipeline.plan import Plan, ShardTask

CONFIG_NAME = "config.json"
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
    seconds : dict
        Time that all workers together spent on each part.
    failed : list of (str, str)
        Tracks that are not stored, with the reason.
    """

    num_made: int = 0
    num_kept: int = 0
    audio_seconds: float = 0.0
    wall_seconds: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    failed: list[tuple[str, str]] = field(default_factory=list)


def run_plan(
    plan: Plan,
    settings: ShardSettings,
    *,
    runner: Runner = run_inline,
    report: Callable[[ShardTask, ShardReport | None], None] = lambda task, shard: None,
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

    Raises
    ------
    MismatchError
        If the folder holds shards of another configuration, or another run is writing into it.
    OSError
        If the folder or a shard cannot be written.
    """
    start = time.perf_counter()
    folder = settings.folder
    folder.mkdir(parents=True, exist_ok=True)
    summary = RunSummary(failed=list(plan.rejected))
    with _locked(folder):
        _claim(folder, settings)
        remove_leftovers(folder)
        made = []
        for outcome in runner(partial(make_shard, settings=settings), plan.tasks):
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
        if made:
            index = build_index(ShardFile(folder / name) for name in sorted(made))
            write_index(folder, index)
        else:
            (folder / INDEX_NAME).unlink(missing_ok=True)
    summary.wall_seconds = time.perf_counter() - start
    return summary


def find_strangers(folder: Path, plan: Plan) -> list[str]:
    """Return shards in a folder that do not belong to the plan: those of an earlier corpus."""
    planned = {task.name for task in plan.tasks}
    return sorted(path.name for path in folder.glob("*.h5") if path.name not in planned)


def _add(summary: RunSummary, shard: ShardReport) -> None:
    summary.failed += shard.rejected
    for part, seconds in shard.seconds.items():
        summary.seconds[part] = summary.seconds.get(part, 0.0) + seconds
    if shard.kept:
        summary.num_kept += shard.num_tracks
    else:
        summary.num_made += shard.num_tracks
        summary.audio_seconds += shard.audio_seconds


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one run at a time write into a folder; the lock ends with the process."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MismatchError(
                f"{folder}: another run is writing into it; wait for it, or use another folder"
            ) from error
        yield
    finally:
        os.close(descriptor)


def _claim(folder: Path, settings: ShardSettings) -> None:
    """Write the configuration into a new folder; refuse a folder of another configuration."""
    path = folder / CONFIG_NAME
    config = settings.fingerprinted()
    if not path.exists():
        if any(folder.glob("*.h5")):
            raise MismatchError(
                f"{folder}: holds *.h5 files but no {CONFIG_NAME}; expected an empty folder or "
                "one that an earlier run made"
            )
        write_json(path, {"config": config, "fingerprint": fingerprint(config)})
        return
    try:
        stored = json.loads(path.read_bytes())["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise MismatchError(
            f"{path}: not readable ({error}); delete the folder and run again"
        ) from error
    if stored != config:
        changes = "; ".join(dict.fromkeys(_list_changes(stored, config)))
        raise MismatchError(
            f"{folder}: holds shards of another configuration ({changes}); "
            "give each configuration its own folder"
        )


def _list_changes(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _list_changes(old.get(key), new.get(key), key)
    elif old != new:
        yield f"{name} was {old}, now {new}"
