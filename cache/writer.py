"""Write one shard: under a temporary name, complete, fsynced, then renamed."""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from flsep.cache.files import TEMPORARY_SUFFIX, sync_folder
from flsep.cache.format import (
    FORMAT_NAME,
    FORMAT_VERSION,
    SILENCE_DB,
    SPLITS,
    Dataset,
    Layout,
    canonical_json,
    fingerprint,
    group_name,
    track_datasets,
)
from flsep.cache.shard_file import ShardFile
from flsep.cache.spool import Spool, reserve, write_at

# Datasets start on a page, so that memory maps of them are aligned. (The format of HDF5 1.10 is
# asked for below since its object headers carry checksums: damaged metadata is noticed.)
_ALIGNMENT_BYTES = 4096
_SPARE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackPlan:
    """What has to be known of a track before it is written: all sizes follow.

    Attributes
    ----------
    name, split : str
        Of the track.
    num_samples, num_windows : int
        Length of every signal, and the teacher windows in it.
    with_audio : bool
        Store the audio too.
    """

    name: str
    split: str
    num_samples: int
    num_windows: int
    with_audio: bool

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; expected one of {SPLITS}")
        if self.num_samples < 1 or self.num_windows < 1:
            raise ValueError(
                f"track {self.name!r} has {self.num_samples} samples, {self.num_windows} windows"
            )

    def datasets(self, layout: Layout) -> dict[str, Dataset]:
        """Return every dataset of the track by name."""
        return track_datasets(
            layout,
            num_samples=self.num_samples,
            num_windows=self.num_windows,
            with_audio=self.with_audio,
        )


class TrackWriter:
    """Fill the datasets of one track, each entry of axis 0 (signal) front to back.

    The bytes go straight to their place in the file, past HDF5.

    Attributes
    ----------
    datasets : dict of str to Dataset
        By name: what is to be filled.
    audio_scale : float64 [signal]
        What the int16 samples are to be multiplied by.
    """

    def __init__(
        self,
        plan: TrackPlan,
        layout: Layout,
        folder: Path,
        descriptor: int,
        offsets: dict[str, int],
    ) -> None:
        self._layout = layout
        self._folder = folder
        self._descriptor = descriptor
        self._offsets = offsets
        self.datasets = plan.datasets(layout)
        self._written: dict[tuple[str, int], int] = {}  # bytes
        self._spools: dict[int, Spool] = {}
        self._hashes = {
            (name, entry): hashlib.sha256()
            for name, dataset in self.datasets.items()
            for entry in range(dataset.shape[0])
        }
        self.audio_scale = np.zeros(len(layout.signals))

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
        dataset = self.datasets[name]
        data = np.ascontiguousarray(block, dtype=dataset.dtype)
        row_bytes = dataset.num_bytes // (dataset.shape[0] * dataset.shape[1])
        start = self._written.get((name, entry), 0) // row_bytes
        if data.shape[1:] != dataset.shape[2:] or start + len(data) > dataset.shape[1]:
            raise ValueError(
                f"block {data.shape} at row {start} of {name}[{entry}] does not fit {dataset.shape}"
            )
        if not _is_finite(data):
            raise ValueError(f"{name}[{entry}] would hold NaN or infinity from row {start}")
        self._write(name, entry, data)

    def _write(self, name: str, entry: int, data: npt.NDArray[Any]) -> None:
        dataset = self.datasets[name]
        raw = data.data.cast("B")
        written = self._written.get((name, entry), 0)
        position = self._offsets[name] + entry * dataset.num_bytes // dataset.shape[0] + written
        self._hashes[name, entry].update(raw)
        self._written[name, entry] = written + len(raw)
        write_at(self._descriptor, raw, position)

    def append_embedding(
        self,
        signal: int,
        embedding: npt.NDArray[np.float32],
        activity_db: npt.NDArray[np.float32],
    ) -> None:
        """Write one signal's embeddings, [window, dim], levels, [window], and their moments."""
        self.append("embedding", signal, embedding)
        self.append("activity", signal, activity_db)
        active = embedding[activity_db >= SILENCE_DB].astype(np.float64)
        self.append("embedding_moments", signal, [active.sum(axis=0), (active**2).sum(axis=0)])

    def append_audio(self, signal: int, block: npt.NDArray[np.float32]) -> None:
        """Take the next samples of one signal, float32 [channel, sample]; store them as int16.

        The scale is 1 / 32768, so that 16-bit audio is kept exactly, unless the signal exceeds
        full scale: then it is as large as it takes for nothing to clip. It is known at the end
        only; until then the samples wait in an unnamed file.

        Raises
        ------
        ValueError
            If the block does not fit the dataset.
        OSError
            If the disk has no room for the samples to wait.
        """
        _, num_channels, num_samples = self.datasets["audio"].shape
        if signal not in self._spools:
            self._spools[signal] = Spool(self._folder, num_channels, num_samples)
        spool = self._spools[signal]
        if len(block) != num_channels or spool.num_held + block.shape[1] > num_samples:
            raise ValueError(
                f"block {block.shape} at sample {spool.num_held} of audio[{signal}] does not fit "
                f"{self.datasets['audio'].shape}"
            )
        spool.add(block)
        if spool.num_held < num_samples or not block.size:
            return
        peak = spool.peak
        scale = 1 / 32768 if peak <= 32767 / 32768 else peak / 32767
        self.audio_scale[signal] = scale
        for samples in spool.read():
            self._write("audio", signal, np.round(samples / np.float32(scale)).astype(np.int16))
        spool.close()

    def close(self) -> None:
        """Forget what waits to be stored."""
        for spool in self._spools.values():
            spool.close()

    def digests(self) -> dict[str, npt.NDArray[np.bytes_]]:
        """Return the digests of each dataset; raises ValueError if anything is missing."""
        for name, entry in self._hashes:
            dataset = self.datasets[name]
            written = self._written.get((name, entry), 0)
            rows = written * dataset.shape[0] * dataset.shape[1] // dataset.num_bytes
            if rows != dataset.shape[1]:
                raise ValueError(f"{name}[{entry}] has {rows} of {dataset.shape[1]} rows")
        return {
            name: np.array(
                [self._hashes[name, entry].hexdigest() for entry in range(dataset.shape[0])],
                dtype="S64",
            )
            for name, dataset in self.datasets.items()
        }


class ShardWriter:
    """Write a shard of one or more tracks.

    Use it as a context manager: entering it lays out the file and reserves its space on the disk;
    leaving it normally checks the file, flushes it to the disk and gives it its name; leaving it
    by an exception removes it.

    Parameters
    ----------
    path : Path
        Final name; its folder exists.
    layout : Layout
        What the data is.
    tracks : sequence of TrackPlan
        What it will hold.
    config : dict
        The resolved configuration, JSON values; with the layout's identity in its field
        ``layout``, its fingerprint ties shards together.
    packages : dict
        Versions of the packages that made the data.

    Attributes
    ----------
    tracks : list of TrackWriter
        One a track, in the same order, to be filled while the context is open.

    Raises
    ------
    OSError
        On entering, if the disk has no room for the shard.
    """

    def __init__(
        self,
        path: Path,
        layout: Layout,
        tracks: Sequence[TrackPlan],
        *,
        config: dict[str, Any],
        packages: dict[str, str],
    ) -> None:
        config = {**config, "layout": layout.identity()}
        self.path = path
        self.tracks: list[TrackWriter] = []
        self._layout = layout
        self._plans = tracks
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

    def __enter__(self) -> "ShardWriter":
        num_bytes = sum(
            dataset.num_bytes + _ALIGNMENT_BYTES
            for plan in self._plans
            for dataset in plan.datasets(self._layout).values()
        )
        # HDF5 itself can crash where the disk is full: it must not come to that.
        if shutil.disk_usage(self.path.parent).free < num_bytes + _SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        try:
            offsets = self._lay_out()
            self._descriptor = os.open(self._temporary, os.O_RDWR)
            try:
                reserve(self._descriptor, os.fstat(self._descriptor).st_size, self.path)
            except OSError:
                os.close(self._descriptor)
                raise
        except BaseException:
            self._temporary.unlink(missing_ok=True)
            raise
        self.tracks = [
            TrackWriter(plan, self._layout, self.path.parent, self._descriptor, places)
            for plan, places in zip(self._plans, offsets, strict=True)
        ]
        return self

    def _lay_out(self) -> list[dict[str, int]]:
        """Create all groups, datasets and attributes; return where each dataset's bytes go."""
        access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
        access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
        access.set_alignment(_ALIGNMENT_BYTES, _ALIGNMENT_BYTES)
        creation, group_creation, contiguous = (
            h5py.h5p.create(kind)
            for kind in (h5py.h5p.FILE_CREATE, h5py.h5p.GROUP_CREATE, h5py.h5p.DATASET_CREATE)
        )
        for properties in (creation, group_creation, contiguous):
            properties.set_obj_track_times(False)  # the same content gives the same bytes
        contiguous.set_layout(h5py.h5d.CONTIGUOUS)
        contiguous.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        contiguous.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        identity = h5py.h5f.create(
            os.fsencode(self._temporary), h5py.h5f.ACC_EXCL, fcpl=creation, fapl=access
        )
        offsets = []
        with h5py.File(identity) as file:
            file.attrs.update(self._attributes)
            for number, plan in enumerate(self._plans):
                name = group_name(number).encode()
                group = h5py.Group(h5py.h5g.create(file.id, name, gcpl=group_creation))
                group.attrs.update(
                    {
                        "name": plan.name,
                        "split": plan.split,
                        "num_samples": plan.num_samples,
                        "num_windows": plan.num_windows,
                    }
                )
                places = {}
                for key, dataset in plan.datasets(self._layout).items():
                    kind = h5py.h5t.py_create(dataset.dtype)
                    space = h5py.h5s.create_simple(dataset.shape)
                    stored = h5py.h5d.create(group.id, key.encode(), kind, space, dcpl=contiguous)
                    places[key] = stored.get_offset()
                    attributes = h5py.Dataset(stored).attrs
                    attributes["sha256"] = np.full(dataset.shape[0], b"?" * 64, dtype="S64")
                    if key == "audio":
                        attributes["scale"] = np.zeros(dataset.shape[0])
                offsets.append(places)
        return offsets

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for track in self.tracks:
                track.close()
            os.close(self._descriptor)
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        digests = [track.digests() for track in self.tracks]
        with h5py.File(self._temporary, "r+") as file:
            for number, (track, values) in enumerate(zip(self.tracks, digests, strict=True)):
                group = file[group_name(number)]
                for name, digest in values.items():
                    group[name].attrs.modify("sha256", digest)
                if "audio" in values:
                    group["audio"].attrs.modify("scale", track.audio_scale)
        os.fsync(self._descriptor)
        ShardFile(self._temporary)
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)


def _is_finite(data: npt.NDArray[Any]) -> bool:
    if data.dtype == np.float16:  # NumPy's own check takes ten times as long
        return bool(np.bitwise_and(data.view(np.uint16), 0x7FFF).max(initial=0) < 0x7C00)
    return data.dtype.kind != "f" or bool(np.isfinite(data).all())
