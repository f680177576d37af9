"""Shards loaded once into the memory of the device or the host, and read from there."""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flsep.cache import Layout, Shards, TrackRecord
from flsep.cache.memory import free_host_bytes
from flsep.trainer.errors import DataError

DEVICE_RESERVE_BYTES = 16 << 30
"""What is left free of a GPU's memory, for training."""
HOST_RESERVE_BYTES = 2 << 30
"""What is left free of the host's memory, for training."""

_BLOCK_BYTES = 32 << 20


def wanted_signals(
    layout: Layout, mixing: str, train: Sequence[TrackRecord], valid: Sequence[TrackRecord]
) -> list[tuple[TrackRecord, range]]:
    """Return what a training reads: of the training tracks, mixing needs the sources alone."""
    num_signals = len(layout.signals)
    trained = range(num_signals) if mixing == "original" else range(1, num_signals)
    return [(track, trained) for track in train] + [(track, range(num_signals)) for track in valid]


class Resident:
    """Spectra, embeddings and levels of some tracks, loaded; `Reader` takes it for `Shards`.

    The spectra keep their stored dtype. Excerpts are gathered from where they lie if that is where
    training computes; from host memory to a GPU they go through a buffer, as from shards.
    Embeddings and levels, which are small, always are in host memory.

    Parameters
    ----------
    shards : Shards
        Where from; they compare digests as they are read.
    wanted : iterable of (TrackRecord, range)
        Tracks, and the signals of each that are loaded; see `wanted_signals`.
    device : torch.device
        Where to.
    teacher_signal : {'mixture', 'stems'} or None
        Whose embeddings to load.
    num_threads : int
        Threads that load.
    report : callable, optional
        Called with the bytes loaded so far, and all there are.
    reserve_bytes : int, optional
        What to leave free; `DEVICE_RESERVE_BYTES` or `HOST_RESERVE_BYTES` when not given.
    num_processes : int
        How many on this machine load as much into its memory; each GPU has one.

    Attributes
    ----------
    frames : Tensor
        float16 or float32 [frame, channel, bin, 2]: the loaded signals, one after the other.
    num_bytes : int
        Size of all that is loaded.

    Raises
    ------
    DataError
        If it does not fit; nothing has been loaded then.
    CacheError
        If a shard is missing or damaged.
    """

    def __init__(
        self,
        shards: Shards,
        wanted: Iterable[tuple[TrackRecord, range]],
        device: torch.device,
        *,
        teacher_signal: str | None,
        num_threads: int,
        report: Callable[[int, int], None] | None = None,
        reserve_bytes: int | None = None,
        num_processes: int = 1,
    ) -> None:
        self.folder, self.index, self.layout = shards.folder, shards.index, shards.layout
        self._teacher_signal = teacher_signal
        parts = [(track, signal) for track, signals in wanted for signal in signals]
        self._first_frames: dict[tuple[str, int, int], int] = {}
        num_frames = 0
        for track, signal in parts:
            self._first_frames[track.shard, track.position, signal] = num_frames
            num_frames += track.num_frames
        self.num_bytes = sum(self._count_bytes(*part) for part in parts)
        require_room(self.num_bytes, device, reserve_bytes, num_processes)
        self.frames = torch.empty(
            (num_frames, self.layout.num_channels, self.layout.num_bins, 2),
            dtype=getattr(torch, self.layout.stft_dtype),
            device=device,
        )
        self._small: dict[tuple[str, int, str, int], npt.NDArray[Any]] = {}
        self._stopping = threading.Event()
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="flsep-load")
        try:
            done = 0
            for job in as_completed([pool.submit(self._load, shards, *part) for part in parts]):
                done += job.result()
                if report is not None:
                    report(done, self.num_bytes)
        finally:
            self._stopping.set()
            pool.shutdown(cancel_futures=True)

    def _is_taught(self, signal: int) -> bool:
        return self._teacher_signal is not None and (
            (self._teacher_signal == "mixture") == (signal == 0)
        )

    def _count_bytes(self, track: TrackRecord, signal: int) -> int:
        layout = self.layout
        frame_bytes = (
            layout.num_channels * layout.num_bins * 2 * np.dtype(layout.stft_dtype).itemsize
        )
        window_bytes = (layout.embedding_size + 1) * 4 if self._is_taught(signal) else 0
        return track.num_frames * frame_bytes + track.num_windows * window_bytes

    def _load(self, shards: Shards, track: TrackRecord, signal: int) -> int:
        if self._is_taught(signal):
            for name in ("embedding", "activity"):
                key = track.shard, track.position, name, signal
                self._small[key] = shards.read(track, name, signal).copy()
        stored = shards.read(track, "stft", signal)
        first = self.first_frame(track, signal)
        place = self.frames[first : first + track.num_frames]
        num_rows = min(len(stored), max(1, _BLOCK_BYTES // stored[0].nbytes))
        staging = None
        if place.is_cuda:
            staging = torch.empty_like(place[:num_rows], device="cpu", pin_memory=True)
        for start in range(0, len(stored), num_rows):
            if self._stopping.is_set():
                break
            block = stored[start : start + num_rows]
            target = place[start : start + len(block)]
            if staging is None:
                np.copyto(target.numpy(), block)
            else:
                np.copyto(staging.numpy()[: len(block)], block)
                target.copy_(staging[: len(block)])  # returns when it is copied
        return self._count_bytes(track, signal)

    def first_frame(self, track: TrackRecord, signal: int) -> int:
        """Return where in `frames` a signal of a track begins."""
        return self._first_frames[track.shard, track.position, signal]

    def read(self, track: TrackRecord, name: str, signal: int) -> npt.NDArray[Any]:
        """Return one signal of a dataset of a track, as `Shards.read` does.

        The datasets are ``stft``, where it is in host memory, ``embedding`` and ``activity``.
        """
        if name != "stft":
            return self._small[track.shard, track.position, name, signal]
        first = self.first_frame(track, signal)
        spectra: npt.NDArray[Any] = self.frames[first : first + track.num_frames].numpy()
        return spectra


def require_room(
    num_bytes: int, device: torch.device, reserve_bytes: int | None, num_processes: int
) -> None:
    """Refuse to load more than there is room for; raises DataError with the figures."""
    if device.type == "cuda":
        free, place = torch.cuda.mem_get_info(device)[0], f"memory of {device}"
        reserve = DEVICE_RESERVE_BYTES if reserve_bytes is None else reserve_bytes
        remedy = "use --resident host, or none"
    else:
        free, place = free_host_bytes() // num_processes, "host memory"
        if num_processes > 1:
            place += f" for each of {num_processes} processes"
        reserve = HOST_RESERVE_BYTES if reserve_bytes is None else reserve_bytes
        remedy = "train without --resident, from the shards"
    if num_bytes + reserve > free:
        raise DataError(
            f"the shards to load are {num_bytes / 1e9:.2f} GB; {free / 1e9:.2f} GB of {place} are "
            f"free, of which training keeps {reserve / 1e9:.2f} GB: {remedy}"
        )
