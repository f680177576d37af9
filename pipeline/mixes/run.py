"""Render random mixes of precomputed tracks ahead, and keep what the teacher hears in them.

The STFT is linear: a mixture's is the weighted sum of those of its sources, which the shards hold.
Only recipes and embeddings are stored, a few kilobytes a mix.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flsep.cache import CacheError, Grid, MixesConfig, Shards, remove_leftovers, write_mixes_index
from flsep.cache.mixes_file import digest_tracks
from flsep.pipeline.errors import SettingsError
from flsep.pipeline.execution.lock import claim, locked
from flsep.pipeline.execution.parts import share_tasks
from flsep.pipeline.execution.runners import Outcome, run_inline
from flsep.pipeline.execution.stopwatch import Stopwatch
from flsep.pipeline.mixes.renderer import count_heard_samples
from flsep.pipeline.mixes.task import MixesReport, MixesSettings, MixesTask, render_mixes
from flsep.pipeline.teachers.teacher import TeacherInfo


@dataclass(slots=True)
class MixesSummary:
    """What a run did.

    Attributes
    ----------
    num_made, num_kept : int
        Mixes rendered now, and found rendered and intact.
    wall_seconds : float
        How long the run took.
    seconds : Stopwatch
        Time that all workers together spent on each part.
    failed : list of (str, str)
        Files that could not be made, with the reason.
    renewed : list of str
        What was wrong with files that were there and were made again.
    """

    num_made: int = 0
    num_kept: int = 0
    wall_seconds: float = 0.0
    seconds: Stopwatch = field(default_factory=Stopwatch)
    failed: list[tuple[str, str]] = field(default_factory=list)
    renewed: list[str] = field(default_factory=list)


Runner = Callable[
    [Callable[[MixesTask], MixesReport], Sequence[MixesTask]],
    Iterator[Outcome],
]


def make_config(shards: Shards, teacher: TeacherInfo, **settings: Any) -> MixesConfig:
    """Return the configuration of mixes of some shards.

    Parameters
    ----------
    shards : Shards
        What to mix.
    teacher : TeacherInfo
        Of the loaded teacher.
    **settings
        The fields of `MixesConfig` that a user chooses: split, seed, excerpt_seconds,
        excerpts_per_track, min_gain, max_gain, swap_probability, with_stems, embedding_dtype.

    Raises
    ------
    ValueError
        If the teacher is not that of the shards, there are fewer tracks than sources, an excerpt
        holds no window of the teacher, or a setting makes no sense.
    MissingDataError
        If no track of the split can hold an excerpt.
    """
    layout = shards.layout
    if teacher.digest != layout.teacher_digest:
        raise SettingsError(
            f"the teacher {teacher.handle} has the digest {teacher.digest[:12]}..., the shards "
            f"were made with {layout.teacher} of {layout.teacher_digest[:12]}...: give that one "
            "with --teacher"
        )
    if not settings["excerpt_seconds"] > 0:
        raise SettingsError(f"--seconds {settings['excerpt_seconds']:g}: expected more than 0")
    grid = Grid(layout, settings["excerpt_seconds"])
    tracks, _ = grid.split_by_length(shards, settings["split"])
    if len(tracks) < len(layout.sources):
        raise SettingsError(
            f"{shards.folder}: {len(tracks)} tracks of the split {settings['split']!r} can be "
            f"mixed, fewer than the {len(layout.sources)} sources of a mix; precompute more, or "
            "train with --mixing original"
        )
    spare = count_heard_samples(grid, teacher) - teacher.window_samples
    if spare < 0:
        raise SettingsError(
            f"--seconds {settings['excerpt_seconds']:g}: an excerpt holds no window of the "
            f"teacher, {teacher.window_samples / teacher.sample_rate_hz:g} s"
        )
    return MixesConfig(
        shards=shards.index.fingerprint,
        tracks=digest_tracks(tracks),
        num_tracks=len(tracks),
        num_sources=len(layout.sources),
        num_windows=1 + spare // teacher.hop_samples,
        embedding_size=teacher.dim,
        **settings,
    )


def plan_mixes(config: MixesConfig, num_epochs: int) -> tuple[MixesTask, ...]:
    """Return the tasks of all epochs, in order."""
    return tuple(
        MixesTask(name, epoch, indices, config.num_bytes(len(indices)))
        for epoch in range(num_epochs)
        for name, indices in config.files_of_epoch(epoch).items()
    )


def run_mixes(
    num_epochs: int,
    settings: MixesSettings,
    *,
    runner: Runner = run_inline,
    report: Callable[[MixesTask, MixesReport | None], None] = lambda task, mixes: None,
    part: tuple[int, int] | None = None,
) -> MixesSummary:
    """Render every file that is not there yet, then write the index.

    Parameters
    ----------
    num_epochs : int
        How many; those that are there beyond it are left out of the index.
    settings : MixesSettings
        How; its folder exists or can be made.
    runner : callable
        Runs a function over tasks and yields an `Outcome` for each.
    report : callable
        Told of each task as it ends, with None for one that failed.
    part : (int, int), optional
        Render the files of the I-th of N parts alone, and write no index. Parts may run at the
        same time; a run without `part` after them finds their files and writes the index.

    Raises
    ------
    MismatchError
        If the folder holds mixes of another configuration, or another run is writing into it.
    OSError
        If the folder or a file cannot be written.
    """
    start = time.perf_counter()
    folder, config = settings.folder, settings.config
    tasks: Sequence[MixesTask] = plan_mixes(config, num_epochs)
    if part is not None:
        tasks = share_tasks(tasks, *part)
    folder.mkdir(parents=True, exist_ok=True)
    summary = MixesSummary()
    with locked(folder, shared=part is not None):
        claim(folder, config.to_json())
        if part is None:
            remove_leftovers(folder)
        for outcome in runner(partial(render_mixes, settings=settings), tasks):
            if outcome.error is not None:
                # A disk that is full fails every task alike, and so do damaged shards many.
                if isinstance(outcome.error, (OSError, CacheError)):
                    raise outcome.error
                reason = f"{type(outcome.error).__name__}: {outcome.error}"
                summary.failed.append((outcome.task.name, reason))
                report(outcome.task, None)
                continue
            _add(summary, outcome.result)
            report(outcome.task, outcome.result)
        if part is None and not summary.failed:
            write_mixes_index(folder, config, num_epochs)
    summary.wall_seconds = time.perf_counter() - start
    return summary


def _add(summary: MixesSummary, mixes: MixesReport) -> None:
    summary.seconds.add(mixes.seconds)
    if mixes.found:
        summary.renewed.append(mixes.found)
    if mixes.kept:
        summary.num_kept += mixes.num_mixes
    else:
        summary.num_made += mixes.num_mixes
