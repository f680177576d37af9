"""The stage that turns a corpus into shards, and the index of what parts of it have made."""

import time
from functools import partial
from pathlib import Path

from flsep.cache import MissingDataError, ShardFile, build_index, write_index
from flsep.cache.format import INDEX_NAME
from flsep.pipeline.execution.lock import CONFIG_NAME, open_output
from flsep.pipeline.execution.stage import Stage, Summary
from flsep.pipeline.shards.build import find_problem, make_shard
from flsep.pipeline.shards.plan import Plan, ShardTask
from flsep.pipeline.shards.rejections import read_rejections, still_rejected
from flsep.pipeline.shards.settings import ShardSettings

_MOST_SHOWN = 5


def shards_stage(plan: Plan, settings: ShardSettings, *, repair: bool = False) -> Stage[ShardTask]:
    """Return the stage that makes the shards of a plan.

    With `repair`, tracks that an earlier run has rejected are tried again.
    """
    return Stage(
        folder=settings.folder,
        config=settings.fingerprinted(),
        run_task=partial(make_shard, settings=settings, repair=repair),
        items_of=lambda task: [planned.track.name for planned in task.tracks],
        write_index=partial(_write_index, settings.folder),
        rejected=plan.rejected,
    )


def finalise(plan: Plan, settings: ShardSettings) -> Summary:
    """Write the index of the shards that parts have made.

    MissingDataError means that a shard is missing or is not the planned one.
    """
    start = time.perf_counter()
    folder = settings.folder
    # Check this first: `open_output` would create the folder and claim it.
    if not (folder / CONFIG_NAME).exists():
        raise MissingDataError(f"{folder}: no part has run here; expected shards to index")
    summary = Summary(failed=list(plan.rejected))
    with open_output(folder, settings.fingerprinted(), shared=False):
        names, problems = [], []
        for task in plan.tasks:
            path = folder / task.name
            rejected = still_rejected(task.tracks, read_rejections(path))
            summary.failed += [(name, known.reason) for name, known in rejected.items()]
            tracks = [planned for planned in task.tracks if planned.track.name not in rejected]
            # All tracks of the task were rejected, so there is no shard.
            if not tracks:
                continue
            # The parts have verified the digests; a look at the header is enough here.
            if problem := find_problem(path, tracks, settings, verify=False):
                problems.append(f"{problem} (for {tracks[0].track.name!r})")
            names.append(task.name)
            summary.num_kept += len(tracks)
        if problems:
            num_more = len(problems) - _MOST_SHOWN
            more = f"; and {num_more} more" if num_more > 0 else ""
            raise MissingDataError(
                f"{folder}: {len(problems)} of {len(plan.tasks)} shards are not there: "
                f"{'; '.join(problems[:_MOST_SHOWN])}{more}. Run the parts again that make them"
            )
        summary.failed.sort()
        _write_index(folder, sorted(names))
    summary.wall_seconds = time.perf_counter() - start
    return summary


def find_unplanned(folder: Path, plan: Plan) -> list[str]:
    """Return the shards in a folder that are not in the plan, such as those of an older corpus."""
    planned = {task.name for task in plan.tasks}
    return sorted(path.name for path in folder.glob("*.h5") if path.name not in planned)


def _write_index(folder: Path, names: list[str]) -> None:
    if names:
        write_index(folder, build_index(ShardFile(folder / name) for name in names))
    else:
        # An index of an earlier run would name shards that are not wanted now.
        (folder / INDEX_NAME).unlink(missing_ok=True)
