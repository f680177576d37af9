"""Render random mixes of precomputed tracks ahead, and keep what the teacher hears in them.

The STFT is linear: a mixture's is the weighted sum of those of its sources, which the shards hold.
Only recipes and embeddings are stored, a few kilobytes a mix.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flsep.cache import (
    CacheError,
    Grid,
    MixesConfig,
    MixesFile,
    RandomMixes,
    Shards,
    remove_leftovers,
    write_mixes,
    write_mixes_index,
)
from flsep.cache.mixes import digest_tracks
from flsep.pipeline.build import list_packages
from flsep.pipeline.execute import Outcome, run_inline
from flsep.pipeline.features import activity_db
from flsep.pipeline.folders import claim, locked
from flsep.pipeline.plan import share_tasks
from flsep.pipeline.render import Renderer, count_heard_samples
from flsep.pipeline.stopwatch import Stopwatch
from flsep.pipeline.teacher import TeacherInfo, load_once


@dataclass(frozen=True, slots=True)
class MixesSettings:
    """What all tasks share; small, and sent to every worker.

    Attributes
    ----------
    folder : Path
        Where the mixes go.
    shards : Path
        What they are rendered from.
    config : MixesConfig
        What decides them.
    teacher : TeacherInfo
        The teacher's identity and window.
    teacher_folder : Path
        Where a worker loads it from.
    num_threads : int, optional
        For the teacher in one process; None leaves it to TensorFlow. The last bits of an embedding
        depend on it, so it must be the same for any number of workers.
    verify : bool
        Compare each signal of the shards with its digest when it is first read.
    """

    folder: Path
    shards: Path
    config: MixesConfig
    teacher: TeacherInfo
    teacher_folder: Path
    num_threads: int | None
    verify: bool


class MixesTask(NamedTuple):
    """The work of one task: render some neighbouring mixes of an epoch.

    Attributes
    ----------
    name : str
        Of the file.
    epoch : int
        Whose mixes.
    indices : range
        Which ones.
    num_bytes : int
        Size of what is stored.
    """

    name: str
    epoch: int
    indices: range
    num_bytes: int


@dataclass(slots=True)
class MixesReport:
    """What became of one task.

    Attributes
    ----------
    num_mixes : int
        In the file.
    kept : bool
        Whether it was there already, complete and intact.
    found : str, optional
        What was wrong with the file that was there; None if it was kept, or none was there.
    seconds : Stopwatch
        Time spent on ``mix``, ``invert``, ``teacher``, ``write`` and ``load`` (of the teacher).
    """

    num_mixes: int
    kept: bool = False
    found: str | None = None
    seconds: Stopwatch = field(default_factory=Stopwatch)


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
        raise ValueError(
            f"the teacher {teacher.handle} has the digest {teacher.digest[:12]}..., the shards "
            f"were made with {layout.teacher} of {layout.teacher_digest[:12]}...: give that one "
            "with --teacher"
        )
    if not settings["excerpt_seconds"] > 0:
        raise ValueError(f"--seconds {settings['excerpt_seconds']:g}: expected more than 0")
    grid = Grid(layout, settings["excerpt_seconds"])
    tracks, _ = grid.split_by_length(shards, settings["split"])
    if len(tracks) < len(layout.sources):
        raise ValueError(
            f"{shards.folder}: {len(tracks)} tracks of the split {settings['split']!r} can be "
            f"mixed, fewer than the {len(layout.sources)} sources of a mix; precompute more, or "
            "train with --mixing original"
        )
    spare = count_heard_samples(grid, teacher) - teacher.window_samples
    if spare < 0:
        raise ValueError(
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


def render_mixes(task: MixesTask, settings: MixesSettings) -> MixesReport:
    """Render the mixes of a task, unless they are there, complete and intact.

    Raises
    ------
    CacheError
        If the shards are damaged, or not those that the settings name.
    OSError
        If the file cannot be written.
    """
    report, config = MixesReport(len(task.indices)), settings.config
    path = settings.folder / task.name
    if path.exists():
        try:
            file = MixesFile.read(path)
            report.kept = (file.config, file.epoch) == (config, task.epoch)
            report.found = None if report.kept else f"{path}: made with another configuration"
        except CacheError as error:
            report.found = str(error)
        if report.kept:
            return report
    shards = _open_shards(settings.shards, settings.verify)
    grid = Grid(shards.layout, config.excerpt_seconds)
    tracks, _ = grid.split_by_length(shards, config.split)
    if (shards.index.fingerprint, digest_tracks(tracks)) != (config.shards, config.tracks):
        raise ValueError(
            f"{settings.shards}: the shards changed while the run was going on; start again"
        )
    with report.seconds.measure("load"):
        teacher = load_once(settings.teacher_folder, settings.teacher, settings.num_threads)
    draws = RandomMixes(
        grid,
        tracks,
        mixes_per_track=config.excerpts_per_track,
        min_gain=config.min_gain,
        max_gain=config.max_gain,
        swap_probability=config.swap_probability,
        seed=config.seed,
    )
    numbers = {track.name: number for number, track in enumerate(tracks)}
    arrays = {
        name: np.zeros(dataset.shape, dataset.dtype)
        for name, dataset in config.datasets(len(task.indices)).items()
    }
    num_signals = arrays["activity"].shape[1]
    at_once = max(1, teacher.batch_windows // (num_signals * config.num_windows))
    renderer = Renderer(shards, grid, teacher.info, num_signals, report.seconds)
    for first in range(0, len(task.indices), at_once):
        chosen = slice(first, first + at_once)
        group = [draws.draw(task.epoch, index) for index in task.indices[chosen]]
        arrays["track"][chosen] = [[numbers[t.name] for t, _ in draw.places] for draw in group]
        arrays["frame"][chosen] = [[grid.first_frame(k) for _, k in draw.places] for draw in group]
        arrays["gain"][chosen] = [draw.gains for draw in group]
        arrays["swap"][chosen] = [draw.swaps for draw in group]
        waveforms = np.concatenate([renderer.render(draw) for draw in group])
        with report.seconds.measure("teacher"):
            embeddings = teacher.embed_each(waveforms)
        window, hop = teacher.info.window_samples, teacher.info.hop_samples
        levels = np.stack([activity_db(w, window, hop, config.num_windows) for w in waveforms])
        for name, values in (("embedding", embeddings), ("activity", levels)):
            arrays[name][chosen] = values.reshape(len(group), *arrays[name].shape[1:])
    with report.seconds.measure("write"):
        write_mixes(path, config, task.epoch, arrays, list_packages())
    return report


@lru_cache(maxsize=1)
def _open_shards(folder: Path, verify: bool) -> Shards:
    return Shards(folder, verify=verify)
