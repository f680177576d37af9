"""The index of a folder of shards: tracks, digests, corpus statistics; written last."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flsep.cache.errors import (
    DamagedDataError,
    FormatVersionError,
    MismatchError,
    MissingDataError,
)
from flsep.cache.format import FORMAT_VERSION, INDEX_NAME, SILENCE_DB, Layout, fingerprint

if TYPE_CHECKING:
    from flsep.cache.reader import ShardFile

INDEX_FORMAT = "flsep-index"


@dataclass(frozen=True, slots=True)
class TrackRecord:
    """One track: where it lies and how long it is."""

    name: str
    split: str
    shard: str
    position: int
    num_samples: int
    num_frames: int
    num_windows: int
    has_audio: bool
    digest: str


@dataclass(frozen=True, slots=True)
class Statistics:
    """Statistics of the training split.

    Attributes
    ----------
    magnitude_mean, magnitude_std : float64 [bin]
        Of the mixture's magnitude, averaged over channels, frames as samples.
    embedding_mean, embedding_std : float64 [signal, dim]
        Of the teacher's embeddings, over the windows that are not silent.
    num_windows : int64 [signal]
        How many windows that is.
    """

    magnitude_mean: npt.NDArray[np.float64]
    magnitude_std: npt.NDArray[np.float64]
    embedding_mean: npt.NDArray[np.float64]
    embedding_std: npt.NDArray[np.float64]
    num_windows: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Index:
    """Everything known of a folder of shards without opening one."""

    layout: Layout
    config: dict[str, Any]
    packages: dict[str, str]
    fingerprint: str
    shard_bytes: dict[str, int]
    tracks: tuple[TrackRecord, ...]
    statistics: Statistics | None


def build_index(shards: Iterable["ShardFile"]) -> Index:
    """Collect the index of opened shards; the order of the shards does not matter.

    Raises
    ------
    MismatchError
        If two shards come from different configurations or hold the same track.
    MissingDataError
        If there is no shard.
    """
    files = sorted(shards, key=lambda shard: shard.path.name)
    if not files:
        raise MissingDataError("there is no shard to index")
    tracks: list[TrackRecord] = []
    for shard in files:
        if shard.fingerprint != files[0].fingerprint:
            raise MismatchError(
                f"{shard.path}: made with another configuration than {files[0].path.name}; "
                "give each configuration its own folder"
            )
        for position, track in enumerate(shard.tracks):
            tracks.append(
                TrackRecord(
                    name=track.name,
                    split=track.split,
                    shard=shard.path.name,
                    position=position,
                    num_samples=track.num_samples,
                    num_frames=shard.layout.num_frames(track.num_samples),
                    num_windows=track.num_windows,
                    has_audio="audio" in track.datasets,
                    digest=track.digest,
                )
            )
    counts = Counter(track.name for track in tracks)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise MismatchError(f"{files[0].path.parent}: tracks stored twice: {twice[:3]}")
    return Index(
        layout=files[0].layout,
        config=files[0].config,
        packages=files[0].packages,
        fingerprint=files[0].fingerprint,
        shard_bytes={shard.path.name: shard.num_bytes for shard in files},
        tracks=tuple(tracks),
        statistics=_merge_statistics(files),
    )


def _merge_statistics(files: list["ShardFile"]) -> Statistics | None:
    """Add up the moments that the shards carry, in the order of the shards."""
    layout = files[0].layout
    num_signals = len(layout.signals)
    num_frames = 0
    num_windows = np.zeros(num_signals, np.int64)
    magnitude = np.zeros((2, layout.num_bins))
    embedding = np.zeros((num_signals, 2, layout.embedding_size))
    for shard in files:
        for position, track in enumerate(shard.tracks):
            if track.split != "train":
                continue
            num_frames += layout.num_frames(track.num_samples)
            for entry in range(2):
                magnitude[entry] += shard.read(position, "magnitude_moments", entry, verify=True)
            for signal in range(num_signals):
                activity = shard.read(position, "activity", signal, verify=True)
                num_windows[signal] += int((activity >= SILENCE_DB).sum())
                embedding[signal] += shard.read(position, "embedding_moments", signal, verify=True)
    if num_frames == 0:
        return None
    magnitude_mean, magnitude_std = _mean_and_std(magnitude[0], magnitude[1], num_frames)
    count = np.maximum(num_windows, 1)[:, None]
    embedding_mean, embedding_std = _mean_and_std(embedding[:, 0], embedding[:, 1], count)
    return Statistics(magnitude_mean, magnitude_std, embedding_mean, embedding_std, num_windows)


def _mean_and_std(
    total: npt.NDArray[np.float64],
    total_squares: npt.NDArray[np.float64],
    count: int | npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    mean = total / count
    return mean, np.sqrt(np.maximum(total_squares / count - mean**2, 0))


def write_index(folder: Path, index: Index) -> None:
    """Write ``index.json`` atomically, with a digest of its own content."""
    from flsep.cache.writer import write_json

    statistics = index.statistics
    content: dict[str, Any] = {
        "format": INDEX_FORMAT,
        "version": FORMAT_VERSION,
        "fingerprint": index.fingerprint,
        "layout": index.layout.to_json(),
        "config": index.config,
        "packages": index.packages,
        "shards": index.shard_bytes,
        "tracks": [asdict(track) for track in index.tracks],
        "statistics": None
        if statistics is None
        else {field.name: getattr(statistics, field.name).tolist() for field in fields(statistics)},
    }
    write_json(folder / INDEX_NAME, {**content, "sha256": fingerprint(content)})


def read_index(folder: Path) -> Index:
    """Read and check ``index.json``.

    Raises
    ------
    MissingDataError
        If the folder or its index does not exist.
    FormatVersionError
        If it is of another version of the format.
    DamagedDataError
        If it is no index, or was altered.
    """
    path = folder / INDEX_NAME
    if not folder.is_dir():
        raise MissingDataError(f"{folder}: no such folder; expected the output of flsep-precompute")
    if not path.is_file():
        raise MissingDataError(
            f"{path}: no index; flsep-precompute run writes it last, run it again to finish"
        )
    remedy = "run flsep-precompute again to renew it"
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != INDEX_FORMAT:
            raise DamagedDataError(f"{path}: no {INDEX_FORMAT}; {remedy}")
        if content["version"] != FORMAT_VERSION:
            raise FormatVersionError(
                f"{path}: format version {content['version']}, this flsep reads {FORMAT_VERSION}; "
                "use the flsep that wrote it, or precompute again"
            )
        if content.pop("sha256") != fingerprint(content):
            raise DamagedDataError(f"{path}: altered, its digest does not hold; {remedy}")
        for name in content["shards"]:
            if Path(name).name != name:
                raise DamagedDataError(f"{path}: names {name!r}, no file of its folder; {remedy}")
        statistics = content["statistics"]
        return Index(
            layout=Layout.from_json(content["layout"]),
            config=content["config"],
            packages=content["packages"],
            fingerprint=content["fingerprint"],
            shard_bytes=content["shards"],
            tracks=tuple(TrackRecord(**track) for track in content["tracks"]),
            statistics=None
            if statistics is None
            else Statistics(**{key: np.array(value) for key, value in statistics.items()}),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedDataError(f"{path}: not readable as an index ({error}); {remedy}") from error
