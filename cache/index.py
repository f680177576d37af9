"""The index of a folder of shards: tracks, digests, corpus statistics; written last."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flsep.cache.errors import CacheError, DamagedDataError, FormatVersionError, MissingDataError
from flsep.cache.format import FORMAT_VERSION, INDEX_NAME, Layout, fingerprint

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
    except CacheError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedDataError(f"{path}: not readable as an index ({error}); {remedy}") from error
