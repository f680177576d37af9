"""Build and write the index of a folder of shards."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flsep.cache.errors import MismatchError, MissingDataError
from flsep.cache.format import FORMAT_VERSION, INDEX_NAME, SILENCE_DB
from flsep.cache.sealed import write_sealed
from flsep.cache.shards.file import ShardFile
from flsep.cache.shards.index import INDEX_FORMAT, Index, Statistics, TrackRecord


def build_index(shards: Iterable[ShardFile]) -> Index:
    """Build the index of opened shards; the order of the shards does not matter.

    Raises MismatchError if two shards come from different configurations or hold the same track,
    and MissingDataError if there are no shards.
    """
    # Sorted, so that the same shards give the same index byte for byte.
    files = sorted(shards, key=lambda shard: shard.path.name)
    if not files:
        raise MissingDataError("there are no shards to index")
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
    # Names identify tracks, in evaluations too, so they must differ across shards.
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


def _merge_statistics(files: list[ShardFile]) -> Statistics | None:
    """Add up the moments of the training tracks; None if there are none."""
    # Floating-point sums depend on their order, which is that of the sorted files.
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
                # The moments leave out silent windows, so the count has to leave them out too.
                activity = shard.read(position, "activity", signal, verify=True)
                num_windows[signal] += int((activity >= SILENCE_DB).sum())
                embedding[signal] += shard.read(position, "embedding_moments", signal, verify=True)
    if num_frames == 0:
        return None
    magnitude_mean, magnitude_std = _mean_and_std(magnitude[0], magnitude[1], num_frames)
    count = np.maximum(num_windows, 1)[:, None]  # a signal may be silent throughout
    embedding_mean, embedding_std = _mean_and_std(embedding[:, 0], embedding[:, 1], count)
    return Statistics(magnitude_mean, magnitude_std, embedding_mean, embedding_std, num_windows)


def _mean_and_std(
    total: npt.NDArray[np.float64],
    total_squares: npt.NDArray[np.float64],
    count: int | npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    mean = total / count
    # Rounding can make the variance of constant data negative.
    return mean, np.sqrt(np.maximum(total_squares / count - mean**2, 0))


def write_index(folder: Path, index: Index) -> None:
    """Write ``index.json`` atomically, with a digest of its content."""
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
    write_sealed(folder / INDEX_NAME, content)
