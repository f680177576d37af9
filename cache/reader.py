"""Random access to shards: memory maps, opened lazily in each process, dropped on pickling."""

import hashlib
import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from flsep.cache.errors import (
    DamagedDataError,
    FormatVersionError,
    MismatchError,
    MissingDataError,
)
from flsep.cache.format import (
    FORMAT_NAME,
    FORMAT_VERSION,
    SPLITS,
    Dataset,
    Layout,
    fingerprint,
    group_name,
    track_datasets,
)
from flsep.cache.index import Index, TrackRecord, read_index

_MAX_OPEN_SHARDS = 128
_HASH_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class StoredDataset:
    """Where a dataset lies in its file, and the digest of each entry of axis 0."""

    dataset: Dataset
    offset: int
    sha256: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StoredTrack:
    """One track of a shard as the file describes it."""

    name: str
    split: str
    num_samples: int
    num_windows: int
    datasets: dict[str, StoredDataset]
    audio_scale: tuple[float, ...]

    @property
    def digest(self) -> str:
        """Digest over the digests of all datasets."""
        return fingerprint(
            {
                "audio_scale": list(self.audio_scale),
                "datasets": {name: list(d.sha256) for name, d in self.datasets.items()},
                "track": [self.name, self.split, self.num_samples, self.num_windows],
            }
        )


class ShardFile:
    """One shard, checked on opening: format, links, layouts, shapes, offsets, size.

    Parameters
    ----------
    path : Path
        The HDF5 file.

    Raises
    ------
    MissingDataError
        If there is no such file.
    FormatVersionError
        If the file was written in another version of the format.
    DamagedDataError
        If anything is not as the format prescribes; the digests are left to `verify`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise MissingDataError(
                f"{path}: no such shard; run flsep-precompute again or restore the file"
            )
        try:
            with h5py.File(path, "r") as file:
                self._read(file)
        # h5py reports damaged metadata under many names.
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise self._damaged(f"not readable as a shard ({_first_line(error)})") from error
        self._map = np.memmap(path, np.uint8, "r")
        self._verified: set[tuple[int, str, int]] = set()

    def _read(self, file: h5py.File) -> None:
        attributes = file.attrs
        if attributes.get("format") != FORMAT_NAME:
            raise self._damaged(f"an HDF5 file, but not of the format {FORMAT_NAME}")
        version = int(attributes["version"])
        if version != FORMAT_VERSION:
            raise FormatVersionError(
                f"{self.path}: format version {version}, this flsep reads {FORMAT_VERSION}; "
                "use the flsep that wrote it, or precompute again"
            )
        self.layout = Layout.from_json(json.loads(attributes["layout"]))
        self.config: dict[str, Any] = json.loads(attributes["config"])
        self.packages: dict[str, str] = json.loads(attributes["packages"])
        self.fingerprint = str(attributes["fingerprint"])
        if fingerprint(self.config) != self.fingerprint:
            raise self._damaged("its configuration does not have the fingerprint it states")
        if self.config["layout"] != self.layout.identity():
            raise self._damaged("its layout is not that of its configuration")
        self.num_bytes = self.path.stat().st_size
        names = [group_name(number) for number in range(len(file))]
        if sorted(file) != names:
            raise self._damaged(f"holds {sorted(file)[:5]}; expected {names[:5]}")
        self.tracks = tuple(self._read_track(file, name) for name in names)

    def _read_track(self, file: h5py.File, name: str) -> StoredTrack:
        self._require_hard_link(file, name)
        group = file[name]
        if not isinstance(group, h5py.Group):
            raise self._damaged(f"{name} is no group")
        num_samples, num_windows = (int(group.attrs[k]) for k in ("num_samples", "num_windows"))
        split = str(group.attrs["split"])
        if split not in SPLITS or num_samples < 1 or num_windows < 1:
            raise self._damaged(f"{name} has the attributes {dict(group.attrs)}")
        with_audio = "audio" in group
        expected = track_datasets(
            self.layout, num_samples=num_samples, num_windows=num_windows, with_audio=with_audio
        )
        if set(group) != set(expected):
            raise self._damaged(f"{name} holds {sorted(group)}; expected {sorted(expected)}")
        datasets = {key: self._locate(group, key, expected[key]) for key in sorted(expected)}
        scale = tuple(map(float, group["audio"].attrs["scale"])) if with_audio else ()
        if with_audio and len(scale) != len(self.layout.signals):
            raise self._damaged(f"{name}/audio has {len(scale)} scales")
        return StoredTrack(
            str(group.attrs["name"]), split, num_samples, num_windows, datasets, scale
        )

    def _locate(self, group: h5py.Group, key: str, expected: Dataset) -> StoredDataset:
        place = f"{group.name[1:]}/{key}"
        self._require_hard_link(group, key)
        stored = group[key]
        if not isinstance(stored, h5py.Dataset):
            raise self._damaged(f"{place} is no dataset")
        if stored.external or stored.is_virtual or stored.chunks or stored.compression:
            raise self._damaged(f"{place} is not stored contiguously in this file")
        if stored.shape != expected.shape or stored.dtype != expected.dtype:
            raise self._damaged(
                f"{place} is {stored.dtype} {stored.shape}; "
                f"expected {expected.dtype} {expected.shape}"
            )
        offset = stored.id.get_offset()
        if offset is None or offset + expected.num_bytes > self.num_bytes:
            raise self._damaged(
                f"{place} ends beyond the file's {self.num_bytes} bytes: the file is truncated"
            )
        digests = tuple(digest.decode("ascii") for digest in stored.attrs["sha256"])
        if len(digests) != expected.shape[0]:
            raise self._damaged(f"{place} has {len(digests)} digests for {expected.shape[0]}")
        return StoredDataset(expected, int(offset), digests)

    def _require_hard_link(self, group: h5py.Group, key: str) -> None:
        if not isinstance(group.get(key, getlink=True), h5py.HardLink):
            raise self._damaged(f"{group.name}/{key} is a soft or external link")

    def _damaged(self, problem: str) -> DamagedDataError:
        return DamagedDataError(f"{self.path}: {problem}; delete it and run flsep-precompute again")

    def read(self, track: int, name: str, entry: int, *, verify: bool) -> npt.NDArray[Any]:
        """Return one entry (signal) of a dataset as a read-only memory map.

        Parameters
        ----------
        track : int
            Position of the track in the shard.
        name : str
            Dataset, e.g. ``stft``.
        entry : int
            Position on axis 0.
        verify : bool
            Compare the entry with its digest the first time it is read.

        Raises
        ------
        DamagedDataError
            If the entry does not have the digest that the file states.
        """
        stored = self.tracks[track].datasets[name]
        shape = stored.dataset.shape[1:]
        size = stored.dataset.num_bytes // stored.dataset.shape[0]
        start = stored.offset + entry * size
        raw = self._map[start : start + size]
        if verify and (track, name, entry) not in self._verified:
            digest = hashlib.sha256()
            for block in range(0, size, _HASH_BLOCK_BYTES):
                digest.update(raw[block : block + _HASH_BLOCK_BYTES].data)
            if digest.hexdigest() != stored.sha256[entry]:
                raise self._damaged(
                    f"{name} of {self._signal(name, entry)} of track {self.tracks[track].name!r} "
                    "does not have its digest: the file was altered"
                )
            self._verified.add((track, name, entry))
        array: npt.NDArray[Any] = raw.view(np.ndarray).view(stored.dataset.dtype).reshape(shape)
        return array

    def _signal(self, name: str, entry: int) -> str:
        return f"entry {entry}" if name == "magnitude_moments" else self.layout.signals[entry]


class Shards:
    """A folder of shards with its index: what a trainer reads.

    Parameters
    ----------
    folder : path
        Where ``flsep-precompute run`` wrote.
    verify : bool
        Compare each signal of each dataset with its digest when it is first read.

    Attributes
    ----------
    index : Index
        Tracks, layout, statistics.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.index: Index = read_index(self.folder)
        self._verify = verify
        self._open: OrderedDict[str, ShardFile] = OrderedDict()

    @property
    def layout(self) -> Layout:
        """What the data is."""
        return self.index.layout

    def tracks(self, split: str) -> tuple[TrackRecord, ...]:
        """Tracks of one split, in the order of the index."""
        return tuple(track for track in self.index.tracks if track.split == split)

    def check_files(self, *splits: str) -> None:
        """Refuse missing or truncated shards of the given splits by name and size, cheaply."""
        needed = {track.shard for split in splits for track in self.tracks(split)}
        for name in sorted(needed):
            path = self.folder / name
            if not path.is_file():
                raise MissingDataError(
                    f"{path}: listed in the index but missing; "
                    "run flsep-precompute again or restore the file"
                )
            size, expected = path.stat().st_size, self.index.shard_bytes[name]
            if size != expected:
                raise DamagedDataError(
                    f"{path}: {size} bytes, the index says {expected}; "
                    "delete it and run flsep-precompute again"
                )

    def read(self, track: TrackRecord, name: str, signal: int) -> npt.NDArray[Any]:
        """Return one signal of a dataset of a track as a read-only memory map.

        Parameters
        ----------
        track : TrackRecord
            From `tracks`.
        name : {"stft", "embedding", "activity", "audio"}
            See `flsep.cache.format.track_datasets` for dtypes and axes.
        signal : int
            0 is the mixture, ``1 + i`` the i-th source.

        Raises
        ------
        CacheError
            If the shard is missing, damaged, or not the one that the index describes.
        """
        shard = self._shard(track)
        return shard.read(track.position, name, signal, verify=self._verify)

    def read_audio(self, track: TrackRecord, signal: int) -> npt.NDArray[np.float32]:
        """Return one signal's audio, float32 [channel, sample]."""
        if not track.has_audio:
            raise MissingDataError(
                f"track {track.name!r} of the split {track.split!r} has no audio in {self.folder}; "
                f"precompute again with --audio-splits naming {track.split!r}"
            )
        scale = np.float32(self._shard(track).tracks[track.position].audio_scale[signal])
        return self.read(track, "audio", signal).astype(np.float32) * scale

    def _shard(self, track: TrackRecord) -> ShardFile:
        shard = self._open.get(track.shard)
        if shard is None:
            shard = ShardFile(self.folder / track.shard)
            if shard.fingerprint != self.index.fingerprint:
                raise MismatchError(
                    f"{shard.path}: made with another configuration than the index beside it; "
                    "give each configuration its own folder"
                )
            self._open[track.shard] = shard
            if len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        else:
            self._open.move_to_end(track.shard)
        if (
            track.position >= len(shard.tracks)
            or shard.tracks[track.position].digest != track.digest
        ):
            raise MismatchError(
                f"{shard.path}: track {track.name!r} is not the one that the index lists; "
                "run flsep-precompute again to renew the index"
            )
        return shard

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
