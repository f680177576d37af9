"""Render the mixes of one file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flsep.cache import (
    CacheError,
    Draw,
    Grid,
    MismatchError,
    MixesConfig,
    MixesFile,
    RandomMixes,
    Shards,
    TrackRecord,
    write_mixes,
)
from flsep.cache.mixes.file import digest_tracks
from flsep.pipeline.execution.stage import TaskReport
from flsep.pipeline.features import activity_db
from flsep.pipeline.mixes.renderer import Renderer
from flsep.pipeline.packages import list_packages
from flsep.pipeline.stopwatch import Stopwatch
from flsep.pipeline.teachers.interface import Teacher, TeacherInfo
from flsep.pipeline.teachers.loading import load_once


@dataclass(frozen=True, kw_only=True, slots=True)
class MixesSettings:
    """What all tasks of a run share; small, and sent to every worker.

    `shards` is the folder of the shards to mix; with `verify`, each of their signals is compared
    with its digest when it is first read. Workers load the teacher from `teacher_folder`, and run
    it with `num_threads` threads; None leaves the number to TensorFlow. The last bits of an
    embedding depend on it, so it must not depend on the number of workers.
    """

    folder: Path
    shards: Path
    config: MixesConfig
    teacher: TeacherInfo
    teacher_folder: Path
    num_threads: int | None
    verify: bool


class MixesTask(NamedTuple):
    """The work of one task: render consecutive mixes of an epoch into one file."""

    name: str
    epoch: int
    indices: range
    num_bytes: int


def render_mixes(task: MixesTask, settings: MixesSettings) -> TaskReport:
    """Render the mixes of a task, unless they are there, complete and intact.

    The report's phases are ``load`` (of the teacher), ``mix``, ``invert``, ``teacher`` and
    ``write``. CacheError means that the shards are damaged, or not those that the settings name.
    """
    config, num_mixes = settings.config, len(task.indices)
    report = TaskReport(task.name, num_mixes, num_mixes * config.excerpt_seconds)
    path = settings.folder / task.name
    problem = _find_problem(path, task, config)
    report.kept = problem is None
    if report.kept:
        return report
    if path.exists():
        report.found = problem

    shards = _open_shards(settings.shards, settings.verify)
    grid = Grid(shards.layout, config.excerpt_seconds)
    tracks = _find_tracks(shards, grid, config)
    with report.seconds.measure("load"):
        teacher = load_once(settings.teacher_folder, settings.teacher, settings.num_threads)
    # A draw depends on the seed, the epoch and the index alone, so each file can be made by itself.
    draws = RandomMixes(
        grid,
        tracks,
        mixes_per_track=config.excerpts_per_track,
        min_gain=config.min_gain,
        max_gain=config.max_gain,
        swap_probability=config.swap_probability,
        seed=config.seed,
    )
    arrays = {
        name: np.zeros(dataset.shape, dataset.dtype)
        for name, dataset in config.datasets(num_mixes).items()
    }
    num_signals = arrays["activity"].shape[1]
    renderer = Renderer(shards, grid, teacher.info, num_signals, report.seconds)

    # The teacher is fastest with full batches: let it hear several mixes at once.
    for chosen in _batches(num_mixes, teacher.batch_windows // (num_signals * config.num_windows)):
        recipes = [draws.draw(task.epoch, index) for index in task.indices[chosen]]
        _store_recipes(arrays, chosen, recipes, tracks, grid)
        waveforms = np.concatenate([renderer.render(recipe) for recipe in recipes])
        _store_embeddings(arrays, chosen, waveforms, teacher, report.seconds)

    with report.seconds.measure("write"):
        write_mixes(path, config, task.epoch, arrays, list_packages())
    return report


def _find_problem(path: Path, task: MixesTask, config: MixesConfig) -> str | None:
    """Say why a file is not that of the task; None if it is."""
    try:
        file = MixesFile.read(path)
    except CacheError as error:
        return str(error)
    if (file.config, file.epoch) != (config, task.epoch):
        return f"{path}: made with another configuration"
    return None


# A worker makes many files from the same shards.
@lru_cache(maxsize=1)
def _open_shards(folder: Path, verify: bool) -> Shards:
    return Shards(folder, verify=verify)


def _find_tracks(shards: Shards, grid: Grid, config: MixesConfig) -> Sequence[TrackRecord]:
    tracks, _ = grid.split_by_length(shards, config.split)
    if (shards.index.fingerprint, digest_tracks(tracks)) != (config.shards, config.tracks):
        raise MismatchError(
            f"{shards.folder}: the shards changed while the run was going on; start again"
        )
    return tracks


def _batches(num_mixes: int, size: int) -> Iterator[slice]:
    # The last slice may reach beyond the end, which ranges and arrays allow.
    step = max(1, size)
    for first in range(0, num_mixes, step):
        yield slice(first, first + step)


def _store_recipes(
    arrays: dict[str, NDArray[Any]],
    chosen: slice,
    recipes: Sequence[Draw],
    tracks: Sequence[TrackRecord],
    grid: Grid,
) -> None:
    # The file stores the numbers of tracks in this list, not their names.
    numbers = {track.name: number for number, track in enumerate(tracks)}
    places = [recipe.places for recipe in recipes]
    arrays["track"][chosen] = [[numbers[track.name] for track, _ in row] for row in places]
    arrays["frame"][chosen] = [[grid.first_frame(window) for _, window in row] for row in places]
    arrays["gain"][chosen] = [recipe.gains for recipe in recipes]
    arrays["swap"][chosen] = [recipe.swaps for recipe in recipes]


def _store_embeddings(
    arrays: dict[str, NDArray[Any]],
    chosen: slice,
    waveforms: NDArray[np.float32],
    teacher: Teacher,
    seconds: Stopwatch,
) -> None:
    """Store embeddings and levels of waveforms, float32 [mix * signal, sample]."""
    with seconds.measure("teacher"):
        embeddings = teacher.embed_each(waveforms)
    window, hop = teacher.info.window_samples, teacher.info.hop_samples
    num_windows = embeddings.shape[1]
    levels_db = np.stack([activity_db(w, window, hop, num_windows) for w in waveforms])
    for name, values in (("embedding", embeddings), ("activity", levels_db)):
        # `rows` is a view [mix, signal, ...], so that this fills the array of the file.
        rows = arrays[name][chosen]
        rows[...] = values.reshape(rows.shape)
