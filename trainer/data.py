"""From shards to batches.

What is read are slices of memory maps, copied into one array a batch by threads: a copy does not
hold Python's lock, so that threads read as fast as processes would, without two more copies through
shared memory. The spectra stay as they are stored until `assemble` mixes them on the device.

Shape suffixes: S sources, G signals (the mixture, then the sources), B batch, C channels,
T samples, N frames, F bins, W windows, E embedding dimensions.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flsep.cache import Shards, Statistics, TrackRecord
from flsep.trainer.approaches import TeacherWindows
from flsep.trainer.excerpts import DataError, Draw, Excerpts, Grid, held_windows
from flsep.trainer.separator import synthesise

_BATCHES_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Batch:
    """Excerpts as they lie in the shards; `assemble` makes an `Example` of them.

    Attributes
    ----------
    stft : Tensor
        float16 or float32 [signal, frame, batch, channel, bin, 2]: the mixture and the sources,
        or the sources alone where `gains` are given.
    gains : Tensor or None
        float32 [source, batch].
    windows : TeacherWindows or None
        Where a teacher's signal was asked for.
    names : tuple of str
        Where each excerpt comes from, for messages.
    """

    stft: Tensor
    gains: Tensor | None
    windows: TeacherWindows | None
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)


class Example(NamedTuple):
    """A batch on the device, mixed: what a separator is trained with.

    Attributes
    ----------
    mixture_NBCF : Tensor
        Spectrum, complex64.
    mixture_BCT : Tensor
        Waveform, float32.
    references_SNBCF : Tensor
        Magnitudes of the sources, float32.
    references_SBCT : Tensor
        Their waveforms, float32.
    windows : TeacherWindows or None
        Of the teacher.
    """

    mixture_NBCF: Tensor  # noqa: N815
    mixture_BCT: Tensor  # noqa: N815
    references_SNBCF: Tensor  # noqa: N815
    references_SBCT: Tensor  # noqa: N815
    windows: TeacherWindows | None


@dataclass(frozen=True, slots=True)
class Standard:
    """Standardises a teacher's embeddings: mean and inverse standard deviation, float32 [dim]."""

    mean: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]

    @classmethod
    def of(cls, statistics: Statistics, teacher_signal: str) -> "Standard":
        """Take those of the mixtures, or pool those of all stems.

        Raises
        ------
        DataError
            If every window of that signal is silent.
        """
        used = slice(0, 1) if teacher_signal == "mixture" else slice(1, None)
        count = statistics.num_windows[used].astype(np.float64)[:, None]
        if not count.sum():
            raise DataError(
                f"every teacher window of the training split's {teacher_signal} is silent: "
                "there is no embedding to learn from"
            )
        share = count / count.sum()
        means, deviations = statistics.embedding_mean[used], statistics.embedding_std[used]
        mean = (share * means).sum(0)
        # The variance of a union: that within its parts, and that between them.
        deviation = np.sqrt((share * (deviations**2 + (means - mean) ** 2)).sum(0))
        # A dimension that never moves carries nothing: it becomes 0, not noise blown up.
        moves = deviation > 1e-6 * deviation.max()
        scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=moves)
        return cls(mean.astype(np.float32), scale.astype(np.float32))

    def __call__(self, embeddings: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Standardise embeddings, float32 [..., dim]."""
        standardised: npt.NDArray[np.float32] = (embeddings - self.mean) * self.scale
        return standardised


class Reader:
    """Read excerpts from shards.

    Parameters
    ----------
    shards : Shards
        The data.
    grid : Grid
        How long the excerpts are.
    teacher_signal : {'mixture', 'stems'} or None
        Whose embeddings to give; None for none.

    Attributes
    ----------
    standard : Standard or None
        Standardises the embeddings.

    Raises
    ------
    DataError
        If embeddings are wanted and the shards have no statistics of them.
    """

    def __init__(self, shards: Shards, grid: Grid, teacher_signal: str | None) -> None:
        self.layout, self.grid = shards.layout, grid
        self.teacher_signal = teacher_signal
        self.standard: Standard | None = None
        if teacher_signal is not None:
            if shards.index.statistics is None:
                raise DataError(f"{shards.folder}: no training split, hence no statistics")
            self.standard = Standard.of(shards.index.statistics, teacher_signal)
        self._shards = shards
        self._lock = threading.Lock()

    def allocate(self, draws: Sequence[Draw], *, pin: bool) -> Batch:
        """Make a batch for these excerpts, to be filled by `fill`, one excerpt at a time."""
        layout, batch = self.layout, len(draws)
        mixed = draws[0].gains is not None
        num_signals = len(layout.sources) + (not mixed)
        gains = None
        if mixed:
            gains = torch.tensor([draw.gains for draw in draws], dtype=torch.float32).T.contiguous()
        windows = None
        if self.teacher_signal is not None:
            lead = (len(layout.sources),) if self.teacher_signal == "stems" else ()
            shape = (*lead, batch, self.grid.num_windows)
            windows = TeacherWindows(
                embeddings=torch.zeros(*shape, layout.embedding_size, pin_memory=pin),
                activity_db=torch.full(shape, -torch.inf, pin_memory=pin),
                bounds=torch.zeros(*shape, 2, dtype=torch.int64, pin_memory=pin),
                inside=torch.zeros(shape, dtype=torch.bool, pin_memory=pin),
                held=torch.zeros(batch, self.grid.num_frames, dtype=torch.int64, pin_memory=pin),
            )
        return Batch(
            stft=torch.empty(
                (num_signals, self.grid.num_frames, batch, layout.num_channels, layout.num_bins, 2),
                dtype=getattr(torch, layout.stft_dtype),
                pin_memory=pin,
            ),
            gains=gains,
            windows=windows,
            names=tuple(self._name(draw) for draw in draws),
        )

    def fill(self, batch: Batch, slot: int, draw: Draw) -> None:
        """Copy one excerpt into a batch; raises CacheError for damaged shards."""
        out_GNCFX = batch.stft.numpy()[:, :, slot]
        first_signal = 1 if draw.gains is not None else 0
        for row, out_NCFX in enumerate(out_GNCFX):
            place = row if len(draw.places) > 1 else 0
            track, window = draw.places[place]
            start = self.layout.window_frames(window)[0]
            stored = self._read(track, "stft", first_signal + row)
            excerpt_NCFX = stored[start : start + self.grid.num_frames]
            out_NCFX[:] = excerpt_NCFX[:, ::-1] if draw.swaps[place] else excerpt_NCFX
        if batch.windows is None:
            return
        if self.teacher_signal == "mixture":
            track, window = draw.places[0]
            self._fill_windows(batch.windows, (slot,), track, window, 0)
            start = self.layout.window_frames(window)[0]
            frames = np.arange(start, start + self.grid.num_frames)
            held = held_windows(self.layout, frames, track.num_windows) - window
            batch.windows.held.numpy()[slot] = np.clip(held, 0, self.grid.num_windows - 1)
            return
        for source in range(len(self.layout.sources)):
            track, window = draw.places[source if len(draw.places) > 1 else 0]
            self._fill_windows(batch.windows, (source, slot), track, window, 1 + source)

    def _fill_windows(
        self,
        windows: TeacherWindows,
        entry: tuple[int, ...],
        track: TrackRecord,
        first: int,
        signal: int,
    ) -> None:
        present = slice(first, min(first + self.grid.num_windows, track.num_windows))
        count = present.stop - present.start
        assert self.standard is not None
        embedding = self._read(track, "embedding", signal)[present]
        windows.embeddings.numpy()[entry][:count] = self.standard(embedding)
        windows.activity_db.numpy()[entry][:count] = self._read(track, "activity", signal)[present]
        bounds = self.grid.bounds(first)
        windows.bounds.numpy()[entry] = bounds
        inside = bounds[:, 1] <= self.grid.num_frames
        inside[count:] = False
        windows.inside.numpy()[entry] = inside

    def _read(self, track: TrackRecord, name: str, signal: int) -> npt.NDArray[np.float32]:
        # Looking up a shard is not safe among threads; the copy, which takes the time, is outside.
        with self._lock:
            return self._shards.read(track, name, signal)

    def _name(self, draw: Draw) -> str:
        seconds = self.layout.window_hop_seconds
        return " + ".join(f"{track.name!r} at {k * seconds:.2f} s" for track, k in draw.places)


def load_batches(
    reader: Reader,
    excerpts: Excerpts,
    *,
    epoch: int,
    batch_size: int,
    num_workers: int,
    first: int = 0,
    pin: bool = False,
) -> Iterator[Batch]:
    """Read the batches of an epoch in order, a few ahead of their use.

    Parameters
    ----------
    reader, excerpts
        What to read.
    epoch : int
        Which epoch.
    batch_size : int
        Excerpts in a batch; the last one of an epoch may have fewer.
    num_workers : int
        Threads that read ahead; 0 reads when a batch is asked for. The batches are the same.
    first : int
        Number of the first batch wanted.
    pin : bool
        Allocate page-locked memory, which a GPU copies from faster.

    Raises
    ------
    CacheError
        For damaged shards, when the batch is due.
    """
    numbers = range(first, -(-len(excerpts) // batch_size))

    def start(number: int) -> tuple[Batch, list[Draw]]:
        indices = range(number * batch_size, min((number + 1) * batch_size, len(excerpts)))
        draws = [excerpts.draw(epoch, index) for index in indices]
        return reader.allocate(draws, pin=pin), draws

    if num_workers == 0:
        for number in numbers:
            batch, draws = start(number)
            for slot, draw in enumerate(draws):
                reader.fill(batch, slot, draw)
            yield batch
        return
    pool = ThreadPoolExecutor(num_workers, thread_name_prefix="flsep-read")
    ahead: deque[tuple[Batch, list[Future[None]]]] = deque()
    try:
        for number in numbers:
            batch, draws = start(number)
            filling = [
                pool.submit(reader.fill, batch, slot, draw) for slot, draw in enumerate(draws)
            ]
            ahead.append((batch, filling))
            if len(ahead) > _BATCHES_AHEAD:
                yield _finish(*ahead.popleft())
        while ahead:
            yield _finish(*ahead.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _finish(batch: Batch, filling: list[Future[None]]) -> Batch:
    for part in filling:
        part.result()
    return batch


def assemble(batch: Batch, device: torch.device, hop_samples: int) -> Example:
    """Bring a batch to the device, apply gains, mix, and transform back to waveforms.

    Parameters
    ----------
    batch : Batch
        From `load_batches`.
    device : torch.device
        Where to compute.
    hop_samples : int
        Of the STFT.

    Returns
    -------
    Example
        Waveforms have ``(frames - 1) * hop_samples`` samples.
    """
    stored = batch.stft.to(device, non_blocking=True)
    spectra_GNBCF = torch.view_as_complex(stored.float())
    windows = None if batch.windows is None else batch.windows.to(device, non_blocking=True)
    if batch.gains is None:
        waveforms_GBCT = synthesise(spectra_GNBCF, hop_samples)
        mixture_NBCF, sources_SNBCF = spectra_GNBCF[0], spectra_GNBCF[1:]
        mixture_BCT, sources_SBCT = waveforms_GBCT[0], waveforms_GBCT[1:]
    else:
        gains_SB = batch.gains.to(device, non_blocking=True)
        sources_SNBCF = spectra_GNBCF * gains_SB[:, None, :, None, None]
        sources_SBCT = synthesise(sources_SNBCF, hop_samples)
        mixture_NBCF, mixture_BCT = sources_SNBCF.sum(0), sources_SBCT.sum(0)
    return Example(mixture_NBCF, mixture_BCT, sources_SNBCF.abs(), sources_SBCT, windows)
