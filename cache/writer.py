"""Write one shard: under a temporary name, complete, fsynced, then renamed."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from flsep.cache.format import (
    FORMAT_NAME,
    FORMAT_VERSION,
    SILENCE_DB,
    SPLITS,
    Layout,
    canonical_json,
    fingerprint,
    group_name,
    track_datasets,
)
from flsep.cache.reader import ShardFile

TEMPORARY_SUFFIX = ".part"
# HDF5 1.10 object headers carry checksums, so that damaged metadata is noticed on opening.
_HDF5_VERSION = ("v110", "v110")
# Datasets start on a page, so that memory maps of them are aligned.
_ALIGNMENT_BYTES = 4096


class TrackWriter:
    """Fill the datasets of one track, each entry of axis 0 (signal) front to back."""

    def __init__(
        self,
        group: h5py.Group,
        layout: Layout,
        num_samples: int,
        num_windows: int,
        with_audio: bool,
    ) -> None:
        self._group = group
        self._layout = layout
        self._datasets = track_datasets(
            layout, num_samples=num_samples, num_windows=num_windows, with_audio=with_audio
        )
        self._written: dict[tuple[str, int], int] = {}
        self._hashes = {
            (name, entry): hashlib.sha256()
            for name, dataset in self._datasets.items()
            for entry in range(dataset.shape[0])
        }
        create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        create.set_layout(h5py.h5d.CONTIGUOUS)
        create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        create.set_obj_track_times(False)
        for name, dataset in self._datasets.items():
            h5py.h5d.create(
                group.id,
                name.encode(),
                h5py.h5t.py_create(dataset.dtype),
                h5py.h5s.create_simple(dataset.shape),
                dcpl=create,
            )
        self._scales = np.zeros(len(layout.signals))

    def append(self, name: str, entry: int, block: npt.ArrayLike) -> None:
        """Write the next rows of one entry of a dataset.

        Parameters
        ----------
        name : str
            Dataset, e.g. ``stft``.
        entry : int
            Position on axis 0, the signal.
        block : array [row, ...]
            Continues where the last block of this entry ended; cast to the dataset's dtype.

        Raises
        ------
        ValueError
            If the block does not fit the dataset, or holds NaN or infinity.
        """
        dataset = self._datasets[name]
        data = np.ascontiguousarray(block, dtype=dataset.dtype)
        start = self._written.get((name, entry), 0)
        stop = start + len(data)
        if data.shape[1:] != dataset.shape[2:] or stop > dataset.shape[1]:
            raise ValueError(
                f"block {data.shape} at row {start} of {name}[{entry}] does not fit {dataset.shape}"
            )
        if data.dtype.kind == "f" and not np.isfinite(data).all():
            raise ValueError(f"{name}[{entry}] would hold NaN or infinity from row {start}")
        self._group[name][entry, start:stop] = data
        self._hashes[name, entry].update(data.data)
        self._written[name, entry] = stop

    def append_audio(self, signal: int, waveform: npt.NDArray[np.float32]) -> None:
        """Write one signal's audio, float32 [channel, sample], as int16 with a scale.

        The scale is 1 / 32768, so that 16-bit audio is kept exactly, unless the signal exceeds
        full scale: then it is as large as it takes for nothing to clip.
        """
        peak = float(np.abs(waveform).max())
        scale = 1 / 32768 if peak <= 32767 / 32768 else peak / 32767
        self._scales[signal] = scale
        self.append("audio", signal, np.round(waveform / np.float32(scale)))

    def append_moments(self, magnitude: npt.NDArray[np.float64]) -> None:
        """Write the statistics: float64 [2, bin] of the mixture, those of the embeddings derived.

        Call it after every ``embedding`` and ``activity`` is written.
        """
        for entry in range(2):
            self.append("magnitude_moments", entry, magnitude[entry])
        for signal in range(len(self._layout.signals)):
            active = self._group["activity"][signal] >= SILENCE_DB
            embedding = self._group["embedding"][signal][active].astype(np.float64)
            self.append(
                "embedding_moments", signal, [embedding.sum(axis=0), (embedding**2).sum(axis=0)]
            )

    def finish(self) -> None:
        """Store the digests; raises ValueError if anything is missing."""
        for name, entry in self._hashes:
            rows = self._written.get((name, entry), 0)
            expected = self._datasets[name].shape[1]
            if rows != expected:
                raise ValueError(f"{name}[{entry}] has {rows} of {expected} rows")
        for name, dataset in self._datasets.items():
            digests = [self._hashes[name, entry].hexdigest() for entry in range(dataset.shape[0])]
            self._group[name].attrs["sha256"] = np.array(digests, dtype="S64")
        if "audio" in self._datasets:
            self._group["audio"].attrs["scale"] = self._scales


class ShardWriter:
    """Write a shard of one or more tracks.

    Use it as a context manager: leaving it normally checks the file, flushes it to the disk and
    gives it its name; leaving it by an exception removes it.

    Parameters
    ----------
    path : Path
        Final name; its folder exists.
    layout : Layout
        What the data is.
    config : dict
        The resolved configuration, JSON values; its fingerprint ties shards together.
    packages : dict
        Versions of the packages that made the data.
    """

    def __init__(
        self, path: Path, layout: Layout, *, config: dict[str, Any], packages: dict[str, str]
    ) -> None:
        self.path = path
        self._layout = layout
        self._attributes = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "layout": canonical_json(layout.to_json()),
            "config": canonical_json(config),
            "fingerprint": fingerprint(config),
            "packages": canonical_json(packages),
        }
        self._temporary = path.with_name(
            f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
        )
        self._num_tracks = 0

    def __enter__(self) -> "ShardWriter":
        self._file = h5py.File(
            self._temporary,
            "w",
            libver=_HDF5_VERSION,
            alignment_threshold=_ALIGNMENT_BYTES,
            alignment_interval=_ALIGNMENT_BYTES,
        )
        self._file.attrs.update(self._attributes)
        return self

    @contextmanager
    def track(
        self, name: str, split: str, *, num_samples: int, num_windows: int, with_audio: bool
    ) -> Iterator[TrackWriter]:
        """Add a track; its datasets must be complete when the block is left."""
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; expected one of {SPLITS}")
        if num_samples < 1 or num_windows < 1:
            raise ValueError(f"track {name!r} has {num_samples} samples, {num_windows} windows")
        group = self._file.create_group(group_name(self._num_tracks))
        self._num_tracks += 1
        group.attrs.update(
            {"name": name, "split": split, "num_samples": num_samples, "num_windows": num_windows}
        )
        writer = TrackWriter(group, self._layout, num_samples, num_windows, with_audio)
        yield writer
        writer.finish()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._file.close()
            if kind is None:
                with open(self._temporary, "rb") as file:
                    os.fsync(file.fileno())
                ShardFile(self._temporary)
                self._temporary.replace(self.path)
                sync_folder(self.path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1, allow_nan=False, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left; nobody may be writing into the folder."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)
