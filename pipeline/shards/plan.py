"""Plan the shards of a corpus from the headers of its files: which tracks, and how large."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from flsep.cache import Layout
from flsep.cache.format import track_datasets
from flsep.pipeline.config import FeatureConfig
from flsep.pipeline.corpus.tracks import Corpus, Track
from flsep.pipeline.errors import CorpusError, SettingsError

DEFAULT_SHARD_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class PlannedTrack:
    """A track and its length in the shard, in samples at the rate of the shards."""

    track: Track
    num_samples: int


@dataclass(frozen=True, slots=True)
class ShardTask:
    """The work of one task: make one shard.

    The file name depends on the tracks alone, so that a later run finds the shard again.
    """

    name: str
    tracks: tuple[PlannedTrack, ...]  # in the order of the corpus
    num_bytes: int  # predicted

    def audio_seconds(self, sample_rate_hz: int) -> float:
        """Return the length of all tracks together."""
        return sum(planned.num_samples for planned in self.tracks) / sample_rate_hz


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a run will do."""

    tasks: tuple[ShardTask, ...]  # largest first, so that no long task is left for the end
    rejected: tuple[tuple[str, str], ...]  # tracks that cannot be used, with the reason

    @property
    def num_bytes(self) -> int:
        """Predicted size of all shards."""
        return sum(task.num_bytes for task in self.tasks)

    @property
    def tracks(self) -> tuple[PlannedTrack, ...]:
        """All planned tracks."""
        return tuple(planned for task in self.tasks for planned in task.tracks)


def plan_shards(
    corpus: Corpus, config: FeatureConfig, *, shard_bytes: int = DEFAULT_SHARD_BYTES
) -> Plan:
    """Group tracks of one split into shards of about `shard_bytes`.

    Tracks are never divided: a track larger than `shard_bytes` has a shard of its own. CorpusError
    means that no track can be used.
    """
    if shard_bytes < 1 << 20:
        raise SettingsError(f"--shard-size {shard_bytes}: expected at least 1 MiB")
    if not corpus.tracks:
        reasons = "; ".join(reason for _, reason in corpus.rejected[:3])
        raise CorpusError(f"{corpus.root}: no usable track ({reasons})")
    layout = _expected_layout(corpus, config)
    groups: list[tuple[list[PlannedTrack], int]] = []  # tracks and their bytes
    split = ""
    for track in corpus.tracks:
        info = corpus.infos[track.name]
        num_samples = info.num_samples * config.sample_rate_hz // info.sample_rate_hz
        planned = PlannedTrack(track, num_samples)
        size = _track_bytes(planned, layout, config)
        # Fill the last shard until the next track is too large for it or belongs to another split.
        if groups and track.split == split and groups[-1][1] + size <= shard_bytes:
            groups[-1][0].append(planned)
            groups[-1] = (groups[-1][0], groups[-1][1] + size)
        else:
            groups.append(([planned], size))
        split = track.split
    tasks = [ShardTask(_shard_name(tracks), tuple(tracks), size) for tracks, size in groups]
    # The name breaks ties: every job of an array must sort the tasks the same way.
    tasks.sort(key=lambda task: (-task.num_bytes, task.name))
    return Plan(tuple(tasks), corpus.rejected)


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
    """Name a shard after its split and a digest, since track names may be invalid in a path."""
    digest = hashlib.sha256()
    for planned in tracks:
        # `repr` quotes the names, so that different lists of tracks never give the same bytes.
        digest.update(repr((planned.track.name, planned.num_samples)).encode())
    return f"{tracks[0].track.split}-{digest.hexdigest()[:16]}.h5"
