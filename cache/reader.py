"""Random access to shards: memory maps, opened when needed, safe among threads and forks.

HDF5 is asked once for each shard, for what it holds and where; all reading is slicing of a memory
map. A file that somebody truncates while it is mapped ends the process with SIGBUS, which Python
cannot catch: shards are only ever replaced by renaming, which leaves the mapped file as it is.
"""

import hashlib
import json
import mmap
import os
import stat
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from flsep.cache.errors import (
    CacheError,
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

_MAX_MAPPED_SHARDS = 256  # each map holds a file descriptor, of which 1024 are usual
_HASH_BLOCK_BYTES = 1 << 24
_all_shards: "weakref.WeakSet[Shards]" = weakref.WeakSet()


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
        except CacheError:
            raise
        # h5py reports damaged metadata under many names.
        except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise self._damaged(f"not readable as a shard ({_first_line(error)})") from error
        self._map: mmap.mmap | None = None
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
        self._state = _file_state(os.stat(file.id.get_vfd_handle()))
        self.num_bytes = self._state[0]
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
        array: npt.NDArray[Any] = np.ndarray(
            shape, stored.dataset.dtype, self._mapped(), stored.offset + entry * size
        )
        if verify and (track, name, entry) not in self._verified:
            raw = array.data.cast("B")
            digest = hashlib.sha256()
            for block in range(0, size, _HASH_BLOCK_BYTES):
                digest.update(raw[block : block + _HASH_BLOCK_BYTES])
            if digest.hexdigest() != stored.sha256[entry]:
                raise self._damaged(
                    f"{name} of {self._signal(name, entry)} of track {self.tracks[track].name!r} "
                    "does not have its digest: the file was altered"
                )
            self._verified.add((track, name, entry))
        return array

    def _mapped(self) -> mmap.mmap:
        mapped = self._map
        if mapped is None:
            with open(self.path, "rb") as file:
                if _file_state(os.fstat(file.fileno())) != self._state:
                    raise MismatchError(
                        f"{self.path}: replaced or altered since it was opened; start again"
                    )
                mapped = self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return mapped

    def unmap(self) -> None:
        """Let go of the memory map and its file descriptor; the next read maps it again."""
        self._map = None  # arrays that were read keep the map they came from

    def _signal(self, name: str, entry: int) -> str:
        return f"entry {entry}" if name == "magnitude_moments" else self.layout.signals[entry]


class Shards:
    """A folder of shards with its index: what a trainer reads.

    It may be used from many threads at once, in forked children, and pickled.

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
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, ShardFile] = {}
        self._mapped: OrderedDict[str, ShardFile] = OrderedDict()
        self._known: set[tuple[str, int, str]] = set()
        _all_shards.add(self)

    @property
    def layout(self) -> Layout:
        """What the data is."""
        return self.index.layout

    def tracks(self, split: str) -> tuple[TrackRecord, ...]:
        """Tracks of one split, in the order of the index."""
        return tuple(track for track in self.index.tracks if track.split == split)

    def check_files(self, *splits: str) -> None:
        """Refuse missing or truncated shards of the given splits by name and size, cheaply."""
        needed = {track.shard for track in self.index.tracks if track.split in splits}
        for name in sorted(needed):
            path = os.path.join(self.folder, name)
            try:
                state = os.stat(path)
            except FileNotFoundError:
                state = None
            if state is None or not stat.S_ISREG(state.st_mode):
                raise MissingDataError(
                    f"{path}: listed in the index but missing; "
                    "run flsep-precompute again or restore the file"
                )
            expected = self.index.shard_bytes[name]
            if state.st_size != expected:
                raise DamagedDataError(
                    f"{path}: {state.st_size} bytes, the index says {expected}; "
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
        with self._lock:
            shard = self._open.get(track.shard)
            if shard is None:
                shard = self._open[track.shard] = self._open_shard(track.shard)
            self._mapped[track.shard] = shard
            self._mapped.move_to_end(track.shard)
            if len(self._mapped) > _MAX_MAPPED_SHARDS:
                self._mapped.popitem(last=False)[1].unmap()
            if (track.shard, track.position, track.digest) not in self._known:
                self._require_track(shard, track)
                self._known.add((track.shard, track.position, track.digest))
        return shard

    def _open_shard(self, name: str) -> ShardFile:
        shard = ShardFile(self.folder / name)
        if shard.fingerprint != self.index.fingerprint:
            raise MismatchError(
                f"{shard.path}: made with another configuration than the index beside it; "
                "give each configuration its own folder"
            )
        return shard

    def _require_track(self, shard: ShardFile, track: TrackRecord) -> None:
        if (
            track.position >= len(shard.tracks)
            or shard.tracks[track.position].digest != track.digest
        ):
            raise MismatchError(
                f"{shard.path}: track {track.name!r} is not the one that the index lists; "
                "run flsep-precompute again to renew the index"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "index": self.index, "_verify": self._verify}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


def _renew_locks() -> None:
    # Another thread of the parent may have held them.
    for shards in _all_shards:
        shards._lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)


def _file_state(state: os.stat_result) -> tuple[int, int]:
    """Return what tells one content of a file from another: size and time of change."""
    return state.st_size, state.st_mtime_ns


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
