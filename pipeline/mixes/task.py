"""Render the mixes of one file."""

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flsep.cache import CacheError, Grid, MixesConfig, MixesFile, RandomMixes, Shards, write_mixes
from flsep.cache.errors import MismatchError
from flsep.cache.mixes_file import digest_tracks
from flsep.pipeline.execution.stopwatch import Stopwatch
from flsep.pipeline.features import activity_db
from flsep.pipeline.mixes.renderer import Renderer
from flsep.pipeline.packages import list_packages
from flsep.pipeline.teachers.teacher import TeacherInfo, load_once


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
        raise MismatchError(
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
