"""The index of a folder of shards: tracks, digests, corpus statistics."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flsep.cache.errors import DamagedDataError, FieldError
from flsep.cache.format import FORMAT_VERSION, INDEX_NAME, Layout
from flsep.cache.sealed import read_sealed

INDEX_FORMAT = "flsep-index"


@dataclass(frozen=True, slots=True)
class TrackRecord:
    """Location and length of one track."""

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
        Over all frames of the mixture's magnitude, which is the mean of the channels' magnitudes.
    embedding_mean, embedding_std : float64 [signal, dim]
        Over all windows that are not silent; `num_windows`, int64 [signal], counts these.
    """

    magnitude_mean: npt.NDArray[np.float64]
    magnitude_std: npt.NDArray[np.float64]
    embedding_mean: npt.NDArray[np.float64]
    embedding_std: npt.NDArray[np.float64]
    num_windows: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Index:
    """Everything known about a folder of shards without opening a shard."""

    layout: Layout
    config: dict[str, Any]
    packages: dict[str, str]
    fingerprint: str
    shard_bytes: dict[str, int]
    tracks: tuple[TrackRecord, ...]
    statistics: Statistics | None


def read_index(folder: Path) -> Index:
    """Read and check ``index.json``; raises CacheError as `read_sealed` does."""
    path = folder / INDEX_NAME
    content = read_sealed(
        path, format_name=INDEX_FORMAT, version=FORMAT_VERSION, command="flsep-precompute"
    )
    try:
        return _parse(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedDataError(
            f"{path}: not readable as an index ({error}); run flsep-precompute again to renew it"
        ) from error


def _parse(content: dict[str, Any]) -> Index:
    # A digest does not stop forgers: a name with a path would make readers open files elsewhere.
    for name in content["shards"]:
        if Path(name).name != name:
            raise FieldError(f"shard {name!r} is not a file name in this folder")
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
