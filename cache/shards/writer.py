"""Write one shard: under a temporary name, complete, fsynced, then renamed."""

import errno
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from flsep.cache.files import TEMPORARY_SUFFIX, sync_folder
from flsep.cache.format import (
    FORMAT_NAME,
    FORMAT_VERSION,
    Layout,
    canonical_json,
    fingerprint,
    group_name,
)
from flsep.cache.shards.file import ShardFile
from flsep.cache.shards.track_writer import TrackPlan, TrackWriter

_ALIGNMENT_BYTES = 4096  # a page: memory maps of datasets are aligned
_SPARE_BYTES = 1 << 20  # for groups and attributes


class ShardWriter:
    """Write a shard of one or more tracks.

    A context manager. Entering it lays out the file under a temporary name and reserves its space
    on the disk, or raises OSError. Leaving it normally checks the file, flushes it to the disk and
    renames it; an exception removes it.

    Parameters
    ----------
    config : dict
        The resolved configuration, JSON values. Its fingerprint, with the layout's identity added
        as the field ``layout``, ties shards together.

    Attributes
    ----------
    tracks : list of TrackWriter
        One writer for each planned track, to be filled while the context is open.
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
        # HDF5 can crash on a full disk, so look for room before it writes anything.
        if shutil.disk_usage(self.path.parent).free < num_bytes + _SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        try:
            offsets = self._lay_out()
            # The arrays bypass HDF5: their places are known, and their bytes need no conversion.
            self._descriptor = os.open(self._temporary, os.O_RDWR)
            try:
                _reserve(self._descriptor, os.fstat(self._descriptor).st_size, self.path)
            except OSError:
                os.close(self._descriptor)
                raise
        except BaseException:
            self._temporary.unlink(missing_ok=True)
            raise
        self.tracks = [
            TrackWriter(plan, self._layout, self._descriptor, places)
            for plan, places in zip(self._plans, offsets, strict=True)
        ]
        return self

    def _lay_out(self) -> list[dict[str, int]]:
        """Create all groups, datasets and attributes; return where each dataset's bytes go."""
        access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
        # The object headers of HDF5 1.10 carry checksums: damaged metadata is noticed.
        access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
        access.set_alignment(_ALIGNMENT_BYTES, _ALIGNMENT_BYTES)
        creation, group_creation, contiguous = (
            h5py.h5p.create(kind)
            for kind in (h5py.h5p.FILE_CREATE, h5py.h5p.GROUP_CREATE, h5py.h5p.DATASET_CREATE)
        )
        for properties in (creation, group_creation, contiguous):
            properties.set_obj_track_times(False)  # the same content gives the same bytes
        # Space is assigned now, so that offsets are known, but not filled: TrackWriter does that.
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
                    # Placeholders of the final size: `_finish` overwrites them in place.
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
            os.close(self._descriptor)
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        """Store digests and scales, flush, check that the file opens, and rename it."""
        # Digests first: they refuse a track that is not complete before anything is written.
        digests = [track.digests() for track in self.tracks]
        with h5py.File(self._temporary, "r+") as file:
            for number, (track, values) in enumerate(zip(self.tracks, digests, strict=True)):
                group = file[group_name(number)]
                for name, digest in values.items():
                    group[name].attrs.modify("sha256", digest)
                if "audio" in values:
                    group["audio"].attrs.modify("scale", track.audio_scale)
        os.fsync(self._descriptor)
        ShardFile(self._temporary)  # raises if the shard cannot be opened
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)


def _reserve(descriptor: int, num_bytes: int, path: Path) -> None:
    """Take space for a file on the disk; raises OSError, with `path` named, if there is none."""
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        error.filename = str(path)
        raise
