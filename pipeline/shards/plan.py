"""Plan the work from headers alone: tracks into shards, and their sizes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from flsep.cache import Layout
from flsep.cache.format import track_datasets
from flsep.pipeline.config import FeatureConfig
from flsep.pipeline.corpus.tracks import Corpus, Track, TrackInfo
from flsep.pipeline.errors import SettingsError

DEFAULT_SHARD_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class PlannedTrack:
    """A track with the length it will have in the shard."""

    track: Track
    num_samples: int


@dataclass(frozen=True, slots=True)
class ShardTask:
    """The work of one task: make one shard of these tracks.

    Attributes
    ----------
    name : str
        File name; it depends on the tracks alone, so that a rerun finds its shard again.
    tracks : tuple of PlannedTrack
        In the order of the corpus.
    num_bytes : int
        Predicted size.
    """

    name: str
    tracks: tuple[PlannedTrack, ...]
    num_bytes: int

    def audio_seconds(self, sample_rate_hz: int) -> float:
        """Length of the tracks in seconds."""
        return sum(planned.num_samples for planned in self.tracks) / sample_rate_hz


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a run will do.

    Attributes
    ----------
    tasks : tuple of ShardTask
        Largest first, so that no long one is left for the end.
    rejected : tuple of (str, str)
        Tracks that cannot be used, with the reason.
    """

    tasks: tuple[ShardTask, ...]
    rejected: tuple[tuple[str, str], ...]

    @property
    def num_bytes(self) -> int:
        """Predicted size of all shards."""
        return sum(task.num_bytes for task in self.tasks)

    @property
    def tracks(self) -> tuple[PlannedTrack, ...]:
        """All tracks."""
        return tuple(planned for task in self.tasks for planned in task.tracks)


def plan_shards(
    corpus: Corpus, config: FeatureConfig, *, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> Plan:
    """Group tracks of one split into shards of about `shard_bytes`.

    A track is never divided: one that is larger than `shard_bytes` has a shard of its own.

    Raises
    ------
    ValueError
        If no track is left, or `shard_bytes` makes no sense.
    """
    if shard_bytes < 1 << 20:
        raise SettingsError(f"--shard-size {shard_bytes}: expected at least 1 MiB")
    if not corpus.tracks:
        reasons = "; ".join(reason for _, reason in corpus.rejected[:3])
        raise SettingsError(f"{corpus.root}: no usable track ({reasons})")
    layout = _expected_layout(corpus, config)
    groups: list[tuple[list[PlannedTrack], int]] = []
    split = ""
    for track in corpus.tracks:
        planned = PlannedTrack(track, stored_samples(corpus.infos[track.name], config))
        size = _track_bytes(planned, layout, config)
        if groups and track.split == split and groups[-1][1] + size <= shard_bytes:
            groups[-1][0].append(planned)
            groups[-1] = (groups[-1][0], groups[-1][1] + size)
        else:
            groups.append(([planned], size))
        split = track.split
    tasks = [ShardTask(_shard_name(tracks), tuple(tracks), size) for tracks, size in groups]
    tasks.sort(key=lambda task: (-task.num_bytes, task.name))
    return Plan(tuple(tasks), corpus.rejected)


def stored_samples(info: TrackInfo, config: FeatureConfig) -> int:
    """Return the length that a track has at the rate of the shards."""
    return info.num_samples * config.sample_rate_hz // info.sample_rate_hz


def _expected_layout(corpus: Corpus, config: FeatureConfig) -> Layout:
    """Return a layout with VGGish's sizes: embeddings are less than a thousandth of a shard."""
    return Layout(
        sample_rate_hz=config.sample_rate_hz,
        num_channels=config.num_channels,
        n_fft=config.n_fft,
        hop_samples=config.hop_samples,
        stft_dtype=config.stft_dtype,
        sources=corpus.sources,
        teacher="",
        teacher_digest="",
        embedding_size=128,
        window_seconds=0.975,
        window_hop_seconds=0.96,
    )


def _track_bytes(planned: PlannedTrack, layout: Layout, config: FeatureConfig) -> int:
    seconds = planned.num_samples / layout.sample_rate_hz
    datasets = track_datasets(
        layout,
        num_samples=planned.num_samples,
        num_windows=max(1, int(seconds / layout.window_hop_seconds)),
        with_audio=planned.track.split in config.audio_splits,
    )
    return sum(dataset.num_bytes for dataset in datasets.values())


def _shard_name(tracks: Sequence[PlannedTrack]) -> str:
    """Name a shard after its split and a digest of its tracks, never after a track's own name."""
    digest = hashlib.sha256()
    for planned in tracks:
        digest.update(repr((planned.track.name, planned.num_samples)).encode())
    return f"{tracks[0].track.split}-{digest.hexdigest()[:16]}.h5"
