"""Make one shard from its tracks: decode, transform, ask the teacher, write."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flsep.cache import CacheError, Layout, ShardFile, ShardWriter, TrackPlan, verify_shard
from flsep.cache.writer import TrackWriter
from flsep.pipeline.config import FeatureConfig
from flsep.pipeline.corpus.media import AudioStream, decode
from flsep.pipeline.errors import TrackError
from flsep.pipeline.execution.stopwatch import Stopwatch
from flsep.pipeline.features import MagnitudeMoments, MonoStream, Pieces, Stft, activity_db, pack
from flsep.pipeline.packages import list_packages
from flsep.pipeline.shards.failures import (
    Failure,
    read_failures,
    stamp_files,
    still_failed,
    write_failures,
)
from flsep.pipeline.shards.plan import PlannedTrack, ShardTask
from flsep.pipeline.teachers.teacher import Teacher, TeacherInfo, load_once

Samples = NDArray[np.float32]
_ADDED_SAMPLES = 1 << 16


@dataclass(frozen=True, slots=True)
class ShardSettings:
    """What all tasks of a run share; small, and sent to every worker.

    Attributes
    ----------
    folder : Path
        Where the shards go.
    config : FeatureConfig
        How audio becomes arrays.
    sources : tuple of str
        Names of the sources.
    teacher : TeacherInfo
        The teacher's identity and window.
    teacher_folder : Path
        Where a worker loads it from.
    num_threads : int, optional
        For the teacher in one process; None leaves it to TensorFlow. The last bits of an embedding
        depend on it, so it must be the same for any number of workers.
    """

    folder: Path
    config: FeatureConfig
    sources: tuple[str, ...]
    teacher: TeacherInfo
    teacher_folder: Path
    num_threads: int | None

    @property
    def layout(self) -> Layout:
        """What the shards will hold."""
        return Layout(
            sample_rate_hz=self.config.sample_rate_hz,
            num_channels=self.config.num_channels,
            n_fft=self.config.n_fft,
            hop_samples=self.config.hop_samples,
            stft_dtype=self.config.stft_dtype,
            sources=self.sources,
            teacher=self.teacher.handle,
            teacher_digest=self.teacher.digest,
            embedding_size=self.teacher.dim,
            window_seconds=self.teacher.window_samples / self.teacher.sample_rate_hz,
            window_hop_seconds=self.teacher.hop_samples / self.teacher.sample_rate_hz,
        )

    def fingerprinted(self) -> dict[str, Any]:
        """Return the configuration whose fingerprint ties shards together.

        The teacher counts by its content, not by the address it came from.
        """
        return {**self.config.to_json(), "layout": self.layout.identity()}


@dataclass(slots=True)
class ShardReport:
    """What became of one task.

    Attributes
    ----------
    name : str
        The shard's file name.
    num_tracks : int
        Tracks in it; none, if all failed and there is no such file.
    audio_seconds : float
        Their length.
    kept : bool
        Whether it was there already, complete and intact.
    found : str, optional
        What was wrong with the file that was there; None if it was kept, or none was there.
    rejected : list of (str, str)
        Tracks that failed, with the reason.
    seconds : Stopwatch
        Time spent on ``decode``, ``stft``, ``teacher``, ``write`` and ``load`` (of the teacher).
    """

    name: str
    num_tracks: int = 0
    audio_seconds: float = 0.0
    kept: bool = False
    found: str | None = None
    rejected: list[tuple[str, str]] = field(default_factory=list)
    seconds: Stopwatch = field(default_factory=Stopwatch)


def make_shard(task: ShardTask, settings: ShardSettings, *, repair: bool = False) -> ShardReport:
    """Make the shard of a task, unless it is there, complete and intact.

    A track that fails is left out and named in the report. It is not tried again while its files
    stay as they are.

    Parameters
    ----------
    task : ShardTask
        What to make.
    settings : ShardSettings
        How, and where.
    repair : bool
        Try again what failed before.

    Raises
    ------
    OSError
        If the shard cannot be written, a full disk for one.
    """
    report = ShardReport(task.name)
    path = settings.folder / task.name
    known = [] if repair else still_failed(task.tracks, read_failures(path))
    failures = dict(known)
    report.rejected += [(name, f"{failure.reason} (as before)") for name, failure in known]
    tracks = [planned for planned in task.tracks if planned.track.name not in failures]
    problem = find_problem(path, tracks, settings, verify=True)
    report.kept = problem is None
    if path.exists():
        report.found = problem
    if tracks and not report.kept:
        with report.seconds.measure("load"):
            teacher = load_once(settings.teacher_folder, settings.teacher, settings.num_threads)
        while tracks:
            bad = _write_shard(path, tracks, settings, teacher, report)
            if bad is None:
                break
            # HDF5 cannot take a half-written track out of a file: start again without it.
            planned, reason = bad
            failures[planned.track.name] = Failure(reason, stamp_files(planned.track))
            report.rejected.append((planned.track.name, reason))
            tracks.remove(planned)
        write_failures(path, failures)
    report.num_tracks = len(tracks)
    report.audio_seconds = sum(p.num_samples for p in tracks) / settings.config.sample_rate_hz
    return report


def find_problem(
    path: Path, tracks: Sequence[PlannedTrack], settings: ShardSettings, *, verify: bool
) -> str | None:
    """Say why a file is not the shard of these tracks; None if it is.

    Parameters
    ----------
    path : Path
        Of the shard.
    tracks : sequence of PlannedTrack
        What it should hold, and nothing else.
    settings : ShardSettings
        How it should have been made.
    verify : bool
        Compare every byte with its digest.
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
    tracks: list[PlannedTrack],
    settings: ShardSettings,
    teacher: Teacher,
    report: ShardReport,
) -> tuple[PlannedTrack, str] | None:
    """Write a shard; if a track cannot be stored, write nothing, return it with the reason."""
    try:
        with ShardWriter(
            path,
            settings.layout,
            [_plan_track(planned, settings) for planned in tracks],
            config=settings.fingerprinted(),
            packages=list_packages(),
        ) as shard:
            for planned, writer in zip(tracks, shard.tracks, strict=True):
                try:
                    _write_track(writer, planned, settings, teacher, report)
                except ValueError as error:
                    raise TrackError(planned.track.name, str(error)) from error
    except TrackError as error:
        name, reason = error.args
        return next(planned for planned in tracks if planned.track.name == name), reason
    return None


def _plan_track(planned: PlannedTrack, settings: ShardSettings) -> TrackPlan:
    return TrackPlan(
        name=planned.track.name,
        split=planned.track.split,
        num_samples=planned.num_samples,
        num_windows=_count_windows(planned, settings),
        with_audio=planned.track.split in settings.config.audio_splits,
    )


def _teacher_samples(planned: PlannedTrack, settings: ShardSettings) -> int:
    return planned.num_samples * settings.teacher.sample_rate_hz // settings.config.sample_rate_hz


def _count_windows(planned: PlannedTrack, settings: ShardSettings) -> int:
    teacher = settings.teacher
    spare = _teacher_samples(planned, settings) - teacher.window_samples
    if spare < 0:
        raise TrackError(
            planned.track.name,
            f"{planned.num_samples / settings.config.sample_rate_hz:.2f} s long, the teacher needs "
            f"{teacher.window_samples / teacher.sample_rate_hz:.2f} s; leave it out",
        )
    return 1 + spare // teacher.hop_samples


def _write_track(
    writer: TrackWriter,
    planned: PlannedTrack,
    settings: ShardSettings,
    teacher: Teacher,
    report: ShardReport,
) -> None:
    """Write one track, a signal after the other, each in one pass over its blocks of samples."""
    track = planned.track
    sources = [partial(_decode, source, planned.num_samples, settings) for source in track.sources]
    if track.mixture is not None:
        mixture = _decode(track.mixture, planned.num_samples, settings)
    else:
        mixture = _add(source() for source in sources)
    moments = MagnitudeMoments(settings.layout.num_bins)
    for signal, blocks in enumerate([mixture, *(source() for source in sources)]):
        _write_signal(
            writer, signal, blocks, planned, settings, teacher, report, None if signal else moments
        )
    writer.append("magnitude_moments", 0, moments.total)
    writer.append("magnitude_moments", 1, moments.total_squares)


def _write_signal(
    writer: TrackWriter,
    signal: int,
    blocks: Iterator[Samples],
    planned: PlannedTrack,
    settings: ShardSettings,
    teacher: Teacher,
    report: ShardReport,
    moments: MagnitudeMoments | None,
) -> None:
    config, info = settings.config, settings.teacher
    stft = Stft(n_fft=config.n_fft, hop=config.hop_samples)
    mono = MonoStream(
        config.sample_rate_hz, info.sample_rate_hz, _teacher_samples(planned, settings)
    )
    batches = Pieces(
        (teacher.batch_windows - 1) * info.hop_samples + info.window_samples,
        teacher.batch_windows * info.hop_samples,
    )
    embeddings: list[Samples] = []
    levels: list[Samples] = []

    def write(spectra: Iterator[NDArray[np.complex64]]) -> None:
        for spectrum in report.seconds.measure_each("stft", spectra):
            with report.seconds.measure("stft"):
                if moments is not None:
                    moments.add(spectrum)
                packed = pack(spectrum, config.stft_dtype)
            with report.seconds.measure("write"):
                writer.append("stft", signal, packed)

    def embed(batch: Samples) -> None:
        if len(batch) < info.window_samples:
            return
        with report.seconds.measure("teacher"):
            embeddings.append(teacher(batch))
        with report.seconds.measure("write"):
            levels.append(
                activity_db(batch, info.window_samples, info.hop_samples, len(embeddings[-1]))
            )

    for block in report.seconds.measure_each("decode", blocks):
        write(stft.add(block))
        if "audio" in writer.datasets:
            with report.seconds.measure("write"):
                writer.append_audio(signal, block)
        with report.seconds.measure("decode"):
            samples = mono.add(block)
        for batch in batches.add(samples):
            embed(batch)
    write(stft.finish())
    for batch in batches.add(mono.finish()):
        embed(batch)
    embed(batches.rest())
    with report.seconds.measure("write"):
        writer.append_embedding(signal, np.concatenate(embeddings), np.concatenate(levels))


def _decode(source: AudioStream, num_samples: int, settings: ShardSettings) -> Iterator[Samples]:
    """Decode as many samples as planned: the lengths that headers declare may be a few off."""
    num_missing = num_samples
    for block in decode(
        source,
        sample_rate_hz=settings.config.sample_rate_hz,
        num_channels=settings.config.num_channels,
    ):
        yield block[:, :num_missing]
        num_missing -= min(num_missing, block.shape[1])
    if num_missing:
        yield np.zeros((settings.config.num_channels, num_missing), np.float32)


def _add(sources: Iterable[Iterator[Samples]]) -> Iterator[Samples]:
    """Add signals of one length, whatever blocks they come in."""
    for parts in zip(*map(_cut, sources), strict=True):
        total = parts[0].copy()
        for part in parts[1:]:
            total += part
        yield total


def _cut(blocks: Iterator[Samples]) -> Iterator[Samples]:
    pieces = Pieces(_ADDED_SAMPLES, _ADDED_SAMPLES)
    for block in blocks:
        yield from pieces.add(block)
    yield pieces.rest()
