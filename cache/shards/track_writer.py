"""Write the datasets of one track to their places in a shard."""

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flsep.cache.format import SILENCE_DB, SPLITS, Dataset, Layout, track_datasets

_BYTES_AT_ONCE = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackPlan:
    """Identity and length of a track in samples and teacher windows; its datasets follow."""

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


@dataclass(slots=True)
class _AudioPass:
    """How far the audio of one signal has been written."""

    scale: float = 0.0
    num_samples: int = 0
    peak: float = 0.0  # largest magnitude so far; an earlier pass counts too


class TrackWriter:
    """Fill the datasets of one track, each entry of axis 0 (signal) from front to back.

    The bytes go straight to their place in the file, past HDF5. `audio_scale`, float64 [signal], is
    the factor that turns the int16 samples into the waveform.
    """

    def __init__(
        self, plan: TrackPlan, layout: Layout, descriptor: int, offsets: dict[str, int]
    ) -> None:
        self._descriptor = descriptor
        self._offsets = offsets
        self.datasets = plan.datasets(layout)
        self._written: dict[tuple[str, int], int] = {}  # bytes
        self._hashes = {
            (name, entry): hashlib.sha256()
            for name, dataset in self.datasets.items()
            for entry in range(dataset.shape[0])
        }
        self._audio = [_AudioPass() for _ in layout.signals]
        self.audio_scale = np.zeros(len(layout.signals))

    def append(self, name: str, entry: int, block: npt.ArrayLike) -> None:
        """Write the next rows of one entry (axis 0) of a dataset.

        `block` [row, ...] continues where the last one of this entry ended, and is cast to the
        dataset's dtype. Raises ValueError if it does not fit, or holds NaN or infinity.
        """
        dataset = self.datasets[name]
        data = np.ascontiguousarray(block, dtype=dataset.dtype)
        row_bytes = dataset.num_bytes // (dataset.shape[0] * dataset.shape[1])
        written = self._written.get((name, entry), 0)
        start = written // row_bytes
        if data.shape[1:] != dataset.shape[2:] or start + len(data) > dataset.shape[1]:
            raise ValueError(
                f"block {data.shape} at row {start} of {name}[{entry}] does not fit {dataset.shape}"
            )
        if not _is_finite(data):
            raise ValueError(f"{name}[{entry}] would hold NaN or infinity from row {start}")
        # Entries are contiguous and filled from front to back, so the hash grows with the file.
        raw = data.data.cast("B")
        self._hashes[name, entry].update(raw)
        self._written[name, entry] = written + len(raw)
        _write_at(self._descriptor, raw, self._start_of(name, entry) + written)

    def append_embedding(
        self,
        signal: int,
        embedding: npt.NDArray[np.float32],
        activity_db: npt.NDArray[np.float32],
    ) -> None:
        """Write one signal's embeddings, [window, dim], levels, [window], and their moments."""
        self.append("embedding", signal, embedding)
        self.append("activity", signal, activity_db)
        # In float64: the variance of a corpus is a small difference of large sums.
        active = embedding[activity_db >= SILENCE_DB].astype(np.float64)
        self.append("embedding_moments", signal, [active.sum(axis=0), (active**2).sum(axis=0)])

    def append_audio(self, signal: int, block: npt.NDArray[np.float32]) -> None:
        """Write the next samples of one signal, float32 [channel, sample], as int16.

        The scale is 1 / 32768, which keeps 16-bit audio exactly. A signal beyond full scale has
        the scale peak / 32767 instead, so that nothing clips. The first block decides: if a later
        block turns out to need a larger scale, the remaining blocks are only searched for the peak.
        `needs_audio_again` is then true at the end, and a second pass over the same blocks writes
        the signal.
        """
        _, num_channels, num_samples = self.datasets["audio"].shape
        state = self._audio[signal]
        if len(block) != num_channels or state.num_samples + block.shape[1] > num_samples:
            raise ValueError(
                f"block {block.shape} at sample {state.num_samples} of audio[{signal}] does not "
                f"fit {self.datasets['audio'].shape}"
            )
        if not block.size:
            return
        state.peak = max(state.peak, float(np.abs(block).max()))
        needed = 1 / 32768 if state.peak <= 32767 / 32768 else state.peak / 32767
        if state.num_samples == 0:
            state.scale = needed
        if state.scale == needed:
            rounded = np.round(block / np.float32(state.scale)).astype(np.int16, order="C")
            # Channels lie one after the other in the file, so a block has one place in each.
            for channel, samples in enumerate(rounded):
                position = 2 * (channel * num_samples + state.num_samples)
                _write_at(
                    self._descriptor,
                    samples.data.cast("B"),
                    self._start_of("audio", signal) + position,
                )
        state.num_samples += block.shape[1]
        if state.num_samples == num_samples:
            if state.scale == needed:
                self._finish_audio(signal)
            else:
                state.num_samples = 0  # the second pass begins here

    def needs_audio_again(self, signal: int) -> bool:
        """Tell whether a signal's audio is to be appended a second time: its peak came late."""
        state = self._audio[signal]
        return state.peak > 0 and state.num_samples == 0

    def _finish_audio(self, signal: int) -> None:
        """Hash the samples in their order in the file, channel by channel."""
        dataset = self.datasets["audio"]
        num_bytes = dataset.num_bytes // dataset.shape[0]
        start = self._start_of("audio", signal)
        for offset in range(0, num_bytes, _BYTES_AT_ONCE):
            size = min(_BYTES_AT_ONCE, num_bytes - offset)
            self._hashes["audio", signal].update(os.pread(self._descriptor, size, start + offset))
        self._written["audio", signal] = num_bytes
        self.audio_scale[signal] = self._audio[signal].scale

    def _start_of(self, name: str, entry: int) -> int:
        """Return where in the file an entry of a dataset begins."""
        dataset = self.datasets[name]
        return self._offsets[name] + entry * dataset.num_bytes // dataset.shape[0]

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


def _write_at(descriptor: int, raw: memoryview, position: int) -> None:
    while raw:  # a write may be short
        count = os.pwrite(descriptor, raw, position)
        raw, position = raw[count:], position + count


def _is_finite(data: npt.NDArray[Any]) -> bool:
    if data.dtype == np.float16:
        # All exponent bits set means NaN or infinity; np.isfinite takes ten times as long.
        return bool(np.bitwise_and(data.view(np.uint16), 0x7FFF).max(initial=0) < 0x7C00)
    return data.dtype.kind != "f" or bool(np.isfinite(data).all())
