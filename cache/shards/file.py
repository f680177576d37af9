"""One shard: what it holds, checked on opening, and memory-mapped access to its data.

HDF5 is only asked where each dataset lies. All reading is slicing of a memory map. Truncating a
file while it is mapped ends the process with SIGBUS, which Python cannot catch. Shards are
therefore only ever replaced by renaming, which leaves the mapped file as it is.
"""

import hashlib
import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from flsep.cache.errors import DamagedDataError, MismatchError, MissingDataError
from flsep.cache.format import (
    FORMAT_NAME,
    FORMAT_VERSION,
    SPLITS,
    Dataset,
    Layout,
    fingerprint,
    group_name,
    require_version,
    track_datasets,
)
from flsep.cache.hdf5 import is_hard_link, open_hdf5

_REMEDY = "if it is a shard, delete it and run flsep-precompute again"
_HASH_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class StoredDataset:
    """Position of a dataset in its file, and the digest of each entry of axis 0."""

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
        """Digest of the track's attributes and of the digests of all datasets."""
        return fingerprint(
            {
                "audio_scale": list(self.audio_scale),
                "datasets": {name: list(d.sha256) for name, d in self.datasets.items()},
                "track": [self.name, self.split, self.num_samples, self.num_windows],
            }
        )


class ShardFile:
    """A shard, opened and checked: format, links, layout, shapes, offsets, size.

    The data itself is compared with its digests when it is read, see `read`. The constructor raises
    MissingDataError, FormatVersionError, or DamagedDataError if anything is not as the format
    prescribes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise MissingDataError(
                f"{path}: no such shard; run flsep-precompute again or restore the file"
            )
        with open_hdf5(path, what="a shard", remedy=_REMEDY) as file:
            self._read_description(file)
            # Offsets are checked against the size of the very file that HDF5 has open.
            self._state = _file_state(os.stat(file.id.get_vfd_handle()))
            self.num_bytes = self._state[0]
            names = [group_name(number) for number in range(len(file))]
            if sorted(file) != names:
                raise self._damaged(f"holds {sorted(file)[:5]}; expected {names[:5]}")
            self.tracks = tuple(self._read_track(file, name) for name in names)
        self._map: mmap.mmap | None = None
        self._verified: set[tuple[int, str, int]] = set()

    def _read_description(self, file: h5py.File) -> None:
        attributes = file.attrs
        if attributes.get("format") != FORMAT_NAME:
            raise self._damaged(f"an HDF5 file, but not of the format {FORMAT_NAME}")
        require_version(
            self.path, int(attributes["version"]), FORMAT_VERSION, command="flsep-precompute"
        )
        self.layout = Layout.from_json(json.loads(attributes["layout"]))
        self.config: dict[str, Any] = json.loads(attributes["config"])
        self.packages: dict[str, str] = json.loads(attributes["packages"])
        self.fingerprint = str(attributes["fingerprint"])
        if fingerprint(self.config) != self.fingerprint:
            raise self._damaged("its configuration does not have the fingerprint it states")
        if self.config["layout"] != self.layout.identity():
            raise self._damaged("its layout is not that of its configuration")

    def _read_track(self, file: h5py.File, name: str) -> StoredTrack:
        self._require_hard_link(file, name)
        group = file[name]
        if not isinstance(group, h5py.Group):
            raise self._damaged(f"{name} is not a group")
        num_samples, num_windows = (int(group.attrs[k]) for k in ("num_samples", "num_windows"))
        split = str(group.attrs["split"])
        if split not in SPLITS or num_samples < 1 or num_windows < 1:
            raise self._damaged(f"{name} has the attributes {dict(group.attrs)}")
        # Audio is the only optional dataset; all others follow from the layout and the lengths.
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
        """Return where a dataset's bytes lie; refuse one that cannot be mapped into memory."""
        place = f"{group.name[1:]}/{key}"
        self._require_hard_link(group, key)
        stored = group[key]
        if not isinstance(stored, h5py.Dataset):
            raise self._damaged(f"{place} is not a dataset")
        if stored.external or stored.is_virtual or stored.chunks or stored.compression:
            raise self._damaged(f"{place} is not stored contiguously in this file")
        if stored.shape != expected.shape or stored.dtype != expected.dtype:
            raise self._damaged(
                f"{place} is {stored.dtype} {stored.shape}; "
                f"expected {expected.dtype} {expected.shape}"
            )
        # A read of the map beyond the end of the file would end the process.
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
        if not is_hard_link(group, key):
            raise self._damaged(f"{group.name}/{key} is a soft or external link")

    def _damaged(self, problem: str) -> DamagedDataError:
        return DamagedDataError(f"{self.path}: {problem}; {_REMEDY}")

    def read(self, track: int, name: str, entry: int, *, verify: bool) -> npt.NDArray[Any]:
        """Return one entry of axis 0 (signal) of a track's dataset as a read-only memory map.

        With `verify`, the entry is compared with its digest the first time it is read. Raises
        DamagedDataError if they differ, MismatchError if the file was replaced since it was opened.
        """
        stored = self.tracks[track].datasets[name]
        shape = stored.dataset.shape[1:]
        size = stored.dataset.num_bytes // stored.dataset.shape[0]
        array: npt.NDArray[Any] = np.ndarray(
            shape, stored.dataset.dtype, self._mapped(), stored.offset + entry * size
        )
        if verify and (track, name, entry) not in self._verified:
            self._verify(array, track, name, entry)
        return array

    def _verify(self, array: npt.NDArray[Any], track: int, name: str, entry: int) -> None:
        raw = array.data.cast("B")
        digest = hashlib.sha256()
        for start in range(0, len(raw), _HASH_BLOCK_BYTES):
            digest.update(raw[start : start + _HASH_BLOCK_BYTES])
        stored = self.tracks[track]
        if digest.hexdigest() != stored.datasets[name].sha256[entry]:
            is_signal = name != "magnitude_moments"
            where = self.layout.signals[entry] if is_signal else f"entry {entry}"
            raise self._damaged(
                f"{name} of {where} of track {stored.name!r} does not have its digest: the file "
                "was altered"
            )
        self._verified.add((track, name, entry))

    def _mapped(self) -> mmap.mmap:
        # A local name: another thread may unmap the shard at any time.
        mapped = self._map
        if mapped is None:
            with open(self.path, "rb") as file:
                # The offsets hold for the file that was checked, and for no other.
                if _file_state(os.fstat(file.fileno())) != self._state:
                    raise MismatchError(
                        f"{self.path}: replaced or altered since it was opened; start again"
                    )
                mapped = self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return mapped

    def unmap(self) -> None:
        """Release the memory map and its file descriptor; the next read maps the file again."""
        self._map = None  # arrays that were read keep the map they came from


def _file_state(state: os.stat_result) -> tuple[int, int]:
    """Return what tells one content of a file from another: size and time of modification."""
    return state.st_size, state.st_mtime_ns
