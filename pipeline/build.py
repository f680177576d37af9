"""Make one shard from its tracks: decode, transform, ask the teacher, write."""

import importlib.metadata
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flsep.cache import CacheError, Layout, ShardFile, ShardWriter, TrackPlan, verify_shard
from flsep.cache.writer import TrackWriter
from flsep.pipeline.config import FeatureConfig
from flsep.pipeline.features import (
    MagnitudeMoments,
    activity_db,
    pack,
    resample,
    stft_blocks,
    to_mono,
)
from flsep.pipeline.media import AudioStream, decode
from flsep.pipeline.plan import PlannedTrack, ShardTask
from flsep.pipeline.teacher import Teacher, TeacherInfo

Embed = Callable[[NDArray[np.float32]], NDArray[np.float32]]
_PACKAGES = ("flsep", "numpy", "h5py", "scipy", "soxr", "av", "soundfile", "tensorflow")


class TrackError(ValueError):
    """A track that cannot be stored; the others go on."""


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
    num_threads : int
        For the teacher in one worker process.
    """

    folder: Path
    config: FeatureConfig
    sources: tuple[str, ...]
    teacher: TeacherInfo
    teacher_folder: Path
    num_threads: int

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
    rejected : list of (str, str)
        Tracks that failed, with the reason.
    seconds : dict
        Time spent on ``decode``, ``stft``, ``teacher``, ``write`` and ``load`` (of the teacher).
    """

    name: str
    num_tracks: int = 0
    audio_seconds: float = 0.0
    kept: bool = False
    rejected: list[tuple[str, str]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of a block to one part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


def list_packages() -> dict[str, str]:
    """Return the versions of the packages that decide what a shard holds."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def make_shard(task: ShardTask, settings: ShardSettings) -> ShardReport:
    """Make the shard of a task, unless it is there, complete and intact.

    A track that fails is left out and named in the report.

    Raises
    ------
    OSError
        If the shard cannot be written, a full disk for one.
    """
    report = ShardReport(task.name)
    path = settings.folder / task.name
    if _is_complete(path, task, settings):
        report.kept = True
        report.num_tracks = len(task.tracks)
        report.audio_seconds = task.audio_seconds(settings.config.sample_rate_hz)
        return report
    with report.measure("load"):
        teacher = _load_teacher(settings.teacher_folder, settings.num_threads)
    if teacher.info.digest != settings.teacher.digest:
        raise ValueError(
            f"{settings.teacher_folder}: the teacher changed while the run was going on; "
            "start again with one teacher"
        )
    tracks = list(task.tracks)
    while tracks:
        try:
            _write_shard(path, tracks, settings, teacher, report)
            break
        except TrackError as error:
            # HDF5 cannot take a half-written track out of a file: start again without it.
            bad = next(planned for planned in tracks if planned.track.name == error.args[0])
            report.rejected.append((bad.track.name, error.args[1]))
            tracks.remove(bad)
    report.num_tracks = len(tracks)
    report.audio_seconds = sum(p.num_samples for p in tracks) / settings.config.sample_rate_hz
    return report


@cache
def _load_teacher(folder: Path, num_threads: int) -> Teacher:
    """Load the teacher once in each worker process."""
    return Teacher.load(str(folder), num_threads=num_threads)


def _is_complete(path: Path, task: ShardTask, settings: ShardSettings) -> bool:
    try:
        shard = ShardFile(path)
        verify_shard(shard)
    except CacheError:
        return False
    stored = [(track.name, track.split) for track in shard.tracks]
    planned = [(planned.track.name, planned.track.split) for planned in task.tracks]
    return shard.config == settings.fingerprinted() and stored == planned


def _write_shard(
    path: Path,
    tracks: list[PlannedTrack],
    settings: ShardSettings,
    embed: Embed,
    report: ShardReport,
) -> None:
    with ShardWriter(
        path,
        settings.layout,
        [_plan_track(planned, settings) for planned in tracks],
        config=settings.fingerprinted(),
        packages=list_packages(),
    ) as shard:
        for planned, writer in zip(tracks, shard.tracks, strict=True):
            try:
                _write_track(writer, planned, settings, embed, report)
            except ValueError as error:
                raise TrackError(planned.track.name, str(error)) from error


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
    embed: Embed,
    report: ShardReport,
) -> None:
    """Write one track a signal at a time, so that memory holds one waveform and a block."""
    moments = MagnitudeMoments(settings.layout.num_bins)
    teacher_samples = _teacher_samples(planned, settings)

    def write_signal(signal: int, waveform: NDArray[np.float32]) -> None:
        _write_spectrum(
            writer, signal, waveform, settings.config, report, moments if signal == 0 else None
        )
        with report.measure("decode"):
            mono = resample(
                to_mono(waveform), settings.config.sample_rate_hz, settings.teacher.sample_rate_hz
            )
            mono = _fit_length(mono, teacher_samples)
        with report.measure("teacher"):
            embedding = embed(mono)
        with report.measure("write"):
            level = activity_db(
                mono, settings.teacher.window_samples, settings.teacher.hop_samples, len(embedding)
            )
            writer.append_embedding(signal, embedding, level)
            if planned.track.split in settings.config.audio_splits:
                writer.append_audio(signal, waveform)

    total: NDArray[np.float32] | None = None
    if planned.track.mixture is not None:
        write_signal(0, _decode(planned.track.mixture, planned.num_samples, settings, report))
    for signal, source in enumerate(planned.track.sources, start=1):
        waveform = _decode(source, planned.num_samples, settings, report)
        write_signal(signal, waveform)
        if planned.track.mixture is None:
            total = waveform if total is None else np.add(total, waveform, out=total)
    if total is not None:
        write_signal(0, total)
    writer.append("magnitude_moments", 0, moments.total)
    writer.append("magnitude_moments", 1, moments.total_squares)


def _write_spectrum(
    writer: TrackWriter,
    signal: int,
    waveform: NDArray[np.float32],
    config: FeatureConfig,
    report: ShardReport,
    moments: MagnitudeMoments | None,
) -> None:
    blocks = stft_blocks(waveform, n_fft=config.n_fft, hop=config.hop_samples)
    while True:
        with report.measure("stft"):
            block = next(blocks, None)
            if block is None:
                return
            if moments is not None:
                moments.add(block)
            packed = pack(block, config.stft_dtype)
        with report.measure("write"):
            writer.append("stft", signal, packed)


def _decode(
    source: AudioStream, num_samples: int, settings: ShardSettings, report: ShardReport
) -> NDArray[np.float32]:
    with report.measure("decode"):
        waveform = decode(
            source,
            sample_rate_hz=settings.config.sample_rate_hz,
            num_channels=settings.config.num_channels,
        )
        return _fit_length(waveform, num_samples)


def _fit_length(waveform: NDArray[np.float32], num_samples: int) -> NDArray[np.float32]:
    """Cut or pad the end to the planned length: codecs and resamplers differ by a few samples."""
    missing = num_samples - waveform.shape[-1]
    if missing > 0:
        padding = [(0, 0)] * (waveform.ndim - 1) + [(0, missing)]
        return np.pad(waveform, padding)
    return waveform[..., :num_samples]
