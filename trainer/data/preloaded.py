"""Shards that are loaded into the memory of the device or the host before training."""

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
"""Memory of a GPU that loading leaves free for training."""
HOST_RESERVE_BYTES = 2 << 30
"""Memory of the host that loading leaves free for training."""

_BLOCK_BYTES = 32 << 20


def wanted_signals(
    layout: Layout, mixing: str, train: Sequence[TrackRecord], valid: Sequence[TrackRecord]
) -> list[tuple[TrackRecord, range]]:
    """Return the tracks and signals that a training reads."""
    num_signals = len(layout.signals)
    # A mixture of mixed sources is computed: only the sources of the training tracks are read.
    trained = range(num_signals) if mixing == "original" else range(1, num_signals)
    return [(track, trained) for track in train] + [(track, range(num_signals)) for track in valid]


class PreloadedShards:
    """Spectra, embeddings and levels of some tracks in memory; replaces `Shards` in `Reader`.

    The spectra keep their stored dtype and lie on `device`. If training computes there, excerpts
    are gathered from there; from host memory to a GPU, excerpts go through a buffer, as from
    shards. Embeddings and levels, which are small, are always in host memory.

    Parameters
    ----------
    report : callable, optional
        Called with the bytes loaded so far and the total.
    reserve_bytes : int, optional
        Memory to leave free; `DEVICE_RESERVE_BYTES` or `HOST_RESERVE_BYTES` if not given.
    num_processes : int
        Number of processes that load as much into this machine's memory; a GPU has one.

    Attributes
    ----------
    frames : Tensor
        float16 or float32 [frame, channel, bin, 2]: the loaded signals, one after another.

    Raises
    ------
    DataError
        If the data do not fit; nothing has been loaded then.
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
        pairs = [(track, signal) for track, signals in wanted for signal in signals]
        # Signals lie one after another in one tensor, so that one gather finds all excerpts.
        self._first_frames: dict[tuple[str, int, int], int] = {}
        num_frames = 0
        for track, signal in pairs:
            self._first_frames[track.shard, track.position, signal] = num_frames
            num_frames += track.num_frames
        self.num_bytes = sum(self._count_bytes(*pair) for pair in pairs)
        # Refuse before anything is allocated.
        require_room(self.num_bytes, device, reserve_bytes, num_processes)
        self.frames = torch.empty(
            (num_frames, self.layout.num_channels, self.layout.num_bins, 2),
            dtype=getattr(torch, self.layout.stft_dtype),
            device=device,
        )
        self._small: dict[tuple[str, int, str, int], npt.NDArray[Any]] = {}
        self._stopping = threading.Event()  # set when another thread fails, or on Ctrl-C
        pool = ThreadPoolExecutor(num_threads, thread_name_prefix="flsep-load")
        try:
            done = 0
            for job in as_completed([pool.submit(self._load, shards, *pair) for pair in pairs]):
                done += job.result()
                if report is not None:
                    report(done, self.num_bytes)
        finally:
            # Threads that are loading stop at their next block.
            self._stopping.set()
            pool.shutdown(cancel_futures=True)

    def _is_taught(self, signal: int) -> bool:
        """Whether the training needs the embeddings of a signal; signal 0 is the mixture."""
        return self._teacher_signal is not None and (
            (self._teacher_signal == "mixture") == (signal == 0)
        )

    def _count_bytes(self, track: TrackRecord, signal: int) -> int:
        layout = self.layout
        frame_bytes = (
            layout.num_channels * layout.num_bins * 2 * np.dtype(layout.stft_dtype).itemsize
        )
        # An embedding and a level, both float32, for each window.
        window_bytes = (layout.embedding_size + 1) * 4 if self._is_taught(signal) else 0
        return track.num_frames * frame_bytes + track.num_windows * window_bytes

    def _load(self, shards: Shards, track: TrackRecord, signal: int) -> int:
        if self._is_taught(signal):
            for name in ("embedding", "activity"):
                key = track.shard, track.position, name, signal
                self._small[key] = shards.read(track, name, signal).copy()
        # In blocks, so that page-locked memory is bounded and an interrupt is noticed.
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
                target.copy_(staging[: len(block)])  # blocks, so that `staging` can be used again
        return self._count_bytes(track, signal)

    def first_frame(self, track: TrackRecord, signal: int) -> int:
        """Return where in `frames` a signal of a track begins."""
        return self._first_frames[track.shard, track.position, signal]

    def read(self, track: TrackRecord, name: str, signal: int) -> npt.NDArray[Any]:
        """Return one signal of a dataset of a track, as `Shards.read` does.

        ``stft`` can be read only if the spectra are in host memory.
        """
        if name != "stft":
            return self._small[track.shard, track.position, name, signal]
        first = self.first_frame(track, signal)
        spectra: npt.NDArray[Any] = self.frames[first : first + track.num_frames].numpy()
        return spectra


def require_room(
    num_bytes: int, device: torch.device, reserve_bytes: int | None, num_processes: int
) -> None:
    """Raise DataError, with the figures, unless the data and the reserve fit the free memory."""
    if device.type == "cuda":
        free, place = torch.cuda.mem_get_info(device)[0], f"memory of {device}"
        reserve = DEVICE_RESERVE_BYTES if reserve_bytes is None else reserve_bytes
        remedy = "use --resident host, or none"
    else:
        # All processes load at the same time, so that each may count on its part alone.
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
