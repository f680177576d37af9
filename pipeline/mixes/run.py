"""The stage that renders random mixes of precomputed tracks and embeds them.

The STFT is linear: the spectrum of a mixture is the weighted sum of the spectra of its sources,
which the shards hold. So only recipes and embeddings are stored, a few kilobytes a mix.
"""

from functools import partial
from typing import Any

from flsep.cache import CacheError, Grid, MixesConfig, Shards, write_mixes_index
from flsep.cache.mixes.file import digest_tracks
from flsep.pipeline.errors import SettingsError, TeacherError
from flsep.pipeline.execution.stage import Stage
from flsep.pipeline.mixes.renderer import count_teacher_samples
from flsep.pipeline.mixes.task import MixesSettings, MixesTask, render_mixes
from flsep.pipeline.teachers.interface import TeacherInfo


def mixes_stage(num_epochs: int, settings: MixesSettings) -> Stage[MixesTask]:
    """Return the stage that renders some epochs of mixes.

    Epochs beyond `num_epochs` that an earlier run has rendered are left out of the index.
    """
    return Stage(
        folder=settings.folder,
        config=settings.config.to_json(),
        run_task=partial(render_mixes, settings=settings),
        items_of=lambda task: [task.name],
        write_index=lambda names: write_mixes_index(settings.folder, settings.config, num_epochs),
        needs_all=True,
        stops_at=(CacheError,),  # all tasks read the same shards
    )


def plan_mixes(config: MixesConfig, num_epochs: int) -> tuple[MixesTask, ...]:
    """Return the tasks of all epochs, in order."""
    return tuple(
        MixesTask(name, epoch, indices, config.num_bytes(len(indices)))
        for epoch in range(num_epochs)
        for name, indices in config.files_of_epoch(epoch).items()
    )


def make_config(shards: Shards, teacher: TeacherInfo, **settings: Any) -> MixesConfig:
    """Return the configuration of mixes of some shards, for the teacher that made the shards.

    `settings` are the fields of `MixesConfig` that a user chooses. TeacherError means that the
    teacher is another one, SettingsError that a setting cannot be used, MissingDataError that no
    track of the split can hold an excerpt.
    """
    layout = shards.layout
    # The embeddings of mixes replace those in the shards, so they must come from the same model.
    if teacher.digest != layout.teacher_digest:
        raise TeacherError(
            f"the teacher {teacher.handle} has the digest {teacher.digest[:12]}..., the shards "
            f"were made with {layout.teacher} of {layout.teacher_digest[:12]}...: give that one "
            "with --teacher"
        )
    seconds = settings["excerpt_seconds"]
    # Written this way, the condition refuses NaN too.
    if not seconds > 0:
        raise SettingsError(f"--seconds {seconds:g}: expected more than 0")
    grid = Grid(layout, seconds)
    tracks, _ = grid.split_by_length(shards, settings["split"])
    if len(tracks) < len(layout.sources):
        raise SettingsError(
            f"{shards.folder}: {len(tracks)} tracks of the split {settings['split']!r} can be "
            f"mixed, fewer than the {len(layout.sources)} sources of a mix; precompute more, or "
            "train with --mixing original"
        )
    spare = count_teacher_samples(grid, teacher) - teacher.window_samples
    if spare < 0:
        raise SettingsError(
            f"--seconds {seconds:g}: an excerpt holds no window of the "
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
