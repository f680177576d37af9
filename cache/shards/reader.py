"""Random access to a folder of shards, safe in threads, forked processes and pickles."""

import os
import stat
import threading
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flsep.cache.errors import DamagedDataError, MismatchError, MissingDataError
from flsep.cache.format import Layout
from flsep.cache.shards.file import ShardFile
from flsep.cache.shards.index import Index, TrackRecord, read_index

_MAX_MAPPED_SHARDS = 256  # each map holds a file descriptor; the usual limit is 1024
_all_shards: "weakref.WeakSet[Shards]" = weakref.WeakSet()


class Shards:
    """A folder of shards with its index, as a trainer reads it.

    Shards are opened when they are first read. An object can be used from many threads at once
    and in forked children, and can be pickled. With `verify`, each signal of each dataset is
    compared with its digest when it is first read. The constructor raises CacheError if there is
    no index, or it cannot be used.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.index: Index = read_index(self.folder)
        self._verify = verify
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, ShardFile] = {}
        self._mapped: OrderedDict[str, ShardFile] = OrderedDict()  # least recently used first
        self._known: set[tuple[str, int, str]] = set()  # tracks that are those of the index
        _all_shards.add(self)

    @property
    def layout(self) -> Layout:
        """Description of the data."""
        return self.index.layout

    def tracks(self, split: str) -> tuple[TrackRecord, ...]:
        """Return the tracks of one split, in the order of the index."""
        return tuple(track for track in self.index.tracks if track.split == split)

    def check_files(self, *splits: str) -> None:
        """Raise CacheError if shards of the given splits are missing or have another size."""
        # Sizes only: they reveal missing and cut files before hours of training, and cost little.
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

        `flsep.cache.format.track_datasets` lists the names, dtypes and axes. Signal 0 is the
        mixture, ``1 + i`` the i-th source. Raises CacheError if the shard is missing, damaged, or
        not the one that the index describes.
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
        """Return the opened shard of a track, which is the one that the index lists."""
        with self._lock:
            shard = self._open.get(track.shard)
            if shard is None:
                shard = self._open[track.shard] = self._open_shard(track.shard)
            # Opened shards stay known without their map; only maps are limited in number.
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

    # Locks, maps and open files do not travel: each process opens shards for itself.
    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "index": self.index, "_verify": self._verify}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


def _renew_locks() -> None:
    # A thread of the parent may have held a lock, and no such thread exists in the child.
    for shards in _all_shards:
        shards._lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_locks)
