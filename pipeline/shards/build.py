"""Make one shard: find it complete, or write it without the tracks that cannot be stored."""

from collections.abc import Sequence
from pathlib import Path

from flsep.cache import CacheError, ShardFile, ShardWriter, TrackPlan, verify_shard
from flsep.pipeline.errors import MediaError, SignalError, TeacherError, TrackError
from flsep.pipeline.execution.stage import TaskReport
from flsep.pipeline.packages import list_packages
from flsep.pipeline.shards.plan import PlannedTrack, ShardTask
from flsep.pipeline.shards.rejections import (
    Rejection,
    read_rejections,
    stamp_files,
    still_rejected,
    write_rejections,
)
from flsep.pipeline.shards.settings import ShardSettings
from flsep.pipeline.shards.track import TrackBuilder
from flsep.pipeline.stopwatch import Stopwatch
from flsep.pipeline.teachers.interface import Teacher
from flsep.pipeline.teachers.loading import load_once


def make_shard(task: ShardTask, settings: ShardSettings, *, repair: bool = False) -> TaskReport:
    """Make the shard of a task, unless it is there, complete and intact.

    Tracks that cannot be stored are left out and named in the report. They are not tried again
    while their files stay the same, except with `repair`. The report's phases are ``load`` (of the
    teacher), ``decode``, ``stft``, ``teacher`` and ``write``. FlsepError means that the whole shard
    cannot be made, such as when the teacher has changed.
    """
    report = TaskReport(task.name)
    path = settings.folder / task.name

    # Leave out the tracks that an earlier run has rejected.
    rejections = {} if repair else still_rejected(task.tracks, read_rejections(path))
    report.rejected += [(name, f"{known.reason} (as before)") for name, known in rejections.items()]
    tracks = [planned for planned in task.tracks if planned.track.name not in rejections]

    # Keep a shard that is there and holds exactly these tracks.
    problem = find_problem(path, tracks, settings, verify=True)
    report.kept = problem is None
    if path.exists():
        report.found = problem

    # Load the teacher only if there is work: a run that finds all shards complete needs none.
    if tracks and not report.kept:
        with report.seconds.measure("load"):
            teacher = load_once(settings.teacher_folder, settings.teacher, settings.num_threads)
        while tracks:
            try:
                _write_shard(path, tracks, settings, teacher, report.seconds)
                break
            except TrackError as error:
                # HDF5 cannot remove a half-written track from a file: start again without it.
                planned = next(p for p in tracks if p.track.name == error.track)
                rejections[error.track] = Rejection(error.reason, stamp_files(planned.track))
                report.rejected.append((error.track, error.reason))
                tracks.remove(planned)
        write_rejections(path, rejections)

    report.num_items = len(tracks)
    report.audio_seconds = sum(p.num_samples for p in tracks) / settings.config.sample_rate_hz
    return report


def find_problem(
    path: Path, tracks: Sequence[PlannedTrack], settings: ShardSettings, *, verify: bool
) -> str | None:
    """Say why a file is not the shard of exactly these tracks; None if it is.

    With `verify`, every byte of the shard is compared with its digest.
    """
    try:
        shard = ShardFile(path)
        if verify:
            verify_shard(shard)
    except CacheError as error:
        return str(error)
    if shard.config != settings.fingerprinted():
        return f"{path}: made with another configuration"
    stored = [(track.name, track.split, track.num_samples) for track in shard.tracks]
    planned = [(p.track.name, p.track.split, p.num_samples) for p in tracks]
    if stored != planned:
        return f"{path}: holds {len(stored)} tracks, not the {len(planned)} that are wanted"
    return None


def _write_shard(
    path: Path,
    tracks: Sequence[PlannedTrack],
    settings: ShardSettings,
    teacher: Teacher,
    seconds: Stopwatch,
) -> None:
    """Write a shard; if a track cannot be stored, raise TrackError and leave no file."""
    plans = [_plan_track(planned, settings) for planned in tracks]
    with ShardWriter(
        path,
        settings.layout,
        plans,
        config=settings.fingerprinted(),
        packages=list_packages(),
    ) as shard:
        for planned, writer in zip(tracks, shard.tracks, strict=True):
            try:
                TrackBuilder(planned, settings, teacher, writer, seconds).write()
            # These concern one track. Anything else, such as a full disk, fails the whole task.
            except (MediaError, SignalError, TeacherError) as error:
                raise TrackError(planned.track.name, str(error)) from error


def _plan_track(planned: PlannedTrack, settings: ShardSettings) -> TrackPlan:
    teacher = settings.teacher
    spare = settings.teacher_samples(planned.num_samples) - teacher.window_samples
    if spare < 0:
        raise TrackError(
            planned.track.name,
            f"{planned.num_samples / settings.config.sample_rate_hz:.2f} s long, the teacher needs "
            f"{teacher.window_samples / teacher.sample_rate_hz:.2f} s; leave it out",
        )
    return TrackPlan(
        name=planned.track.name,
        split=planned.track.split,
        num_samples=planned.num_samples,
        num_windows=1 + spare // teacher.hop_samples,
        with_audio=planned.track.split in settings.config.audio_splits,
    )
