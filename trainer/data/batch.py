"""Batches: one buffer each, gathered and mixed on the device.

Shape suffixes: S sources, G signals (the mixture, then the sources), B batch, C channels,
T samples, N frames, F bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flsep.trainer.stft import synthesise
from flsep.trainer.teacher import TeacherWindows

_ALIGNMENT_BYTES = 256


@dataclass(frozen=True, slots=True)
class Batch:
    """Excerpts as they lie in the shards; `assemble` makes an `Example` of them.

    Attributes
    ----------
    frames : Tensor
        float16 or float32 [frame, channel, bin, 2]: frames of the mixture and the sources, or of
        the sources alone where `gains` are given. Those of an excerpt of a signal are neighbours.
        They lie in `buffer`, or are the memory of a `Resident`.
    starts : Tensor
        Where in `frames` each excerpt of each signal starts, int64 [signal, batch].
    swaps : Tensor
        Whether its channels are reversed, bool [signal, batch].
    gains : Tensor or None
        float32 [source, batch].
    windows : TeacherWindows or None
        Where a teacher's signal was asked for.
    buffer : Tensor
        uint8 [byte]: what all of the tensors above are views of, so that they move as one.
    num_frames : int
        Of an excerpt.
    names : tuple of str
        Where each excerpt comes from, for messages.
    num_in_all : int
        Excerpts of the batch in all its parts, of which this may be one.
    """

    frames: Tensor
    starts: Tensor
    swaps: Tensor
    gains: Tensor | None
    windows: TeacherWindows | None
    buffer: Tensor
    num_frames: int
    names: tuple[str, ...]
    num_in_all: int

    def __len__(self) -> int:
        return len(self.names)

    def to(self, device: torch.device) -> Batch:
        """Copy to a device; asynchronously on the current stream where the memory is pinned."""
        return self.over(self.buffer.to(device, non_blocking=True))

    def over(self, buffer: Tensor) -> Batch:
        """Return this batch over a copy of its buffer."""
        begin = self.buffer.data_ptr()

        def follow(tensor: Tensor) -> Tensor:
            start = tensor.data_ptr() - begin
            if not 0 <= start < self.buffer.nbytes:
                return tensor  # a Resident's
            return buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

        windows = self.windows
        if windows is not None:
            names = TeacherWindows.__dataclass_fields__
            windows = TeacherWindows(**{name: follow(getattr(windows, name)) for name in names})
        return replace(
            self,
            frames=follow(self.frames),
            starts=follow(self.starts),
            swaps=follow(self.swaps),
            gains=None if self.gains is None else follow(self.gains),
            windows=windows,
            buffer=buffer,
        )

    @property
    def stft(self) -> Tensor:
        """The spectra, as stored, gathered to [signal, frame, batch, channel, bin, 2]."""
        num_channels, num_bins = self.frames.shape[1:3]
        device = self.frames.device
        channel_C = torch.arange(num_channels, device=device)
        channel_GBC = torch.where(self.swaps[..., None], channel_C.flip(0), channel_C)
        frame_GNB = self.starts[:, None] + torch.arange(self.num_frames, device=device)[:, None]
        row_GNBC = frame_GNB[..., None] * num_channels + channel_GBC[:, None]
        # Real and imaginary part move as one number.
        whole = torch.int32 if self.frames.itemsize == 2 else torch.int64
        rows = self.frames.flatten(0, 1).flatten(1).view(whole)
        gathered = rows.index_select(0, row_GNBC.flatten()).view(self.frames.dtype)
        return gathered.view(*row_GNBC.shape, num_bins, 2)


class Example(NamedTuple):
    """A batch on the device, mixed: what a separator is trained with.

    Attributes
    ----------
    mixture_NBCF : Tensor
        Spectrum, complex64.
    mixture_BCT : Tensor
        Waveform, float32.
    references_SNBCF : Tensor
        Spectra of the sources, complex64.
    references_SBCT : Tensor
        Their waveforms, float32.
    windows : TeacherWindows or None
        Of the teacher.
    """

    mixture_NBCF: Tensor
    mixture_BCT: Tensor
    references_SNBCF: Tensor
    references_SBCT: Tensor
    windows: TeacherWindows | None


def allocate_together(
    pieces: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], *, pin: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Allocate one buffer, and tensors of the given dtypes and shapes that are views of it.

    Page-locked blocks are kept and used again by torch, each after the copies from it are done.
    """
    sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in pieces.values()]
    ends = np.cumsum([-(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for size in sizes])
    buffer = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=pin)
    tensors = {}
    for (name, (dtype, shape)), size, start in zip(
        pieces.items(), sizes, [0, *ends[:-1]], strict=True
    ):
        tensors[name] = buffer[int(start) : int(start) + size].view(dtype).view(shape)
    return buffer, tensors


def assemble(batch: Batch, device: torch.device, hop_samples: int) -> Example:
    """Bring a batch to the device, apply gains, mix, and transform back to waveforms.

    Parameters
    ----------
    batch : Batch
        From `load_batches`.
    device : torch.device
        Where to compute; nothing is copied where the batch is there.
    hop_samples : int
        Of the STFT.

    Returns
    -------
    Example
        Waveforms have ``(frames - 1) * hop_samples`` samples.
    """
    batch = batch.to(device)
    spectra_GNBCF = torch.view_as_complex(batch.stft.float())
    if batch.gains is None:
        waveforms_GBCT = synthesise(spectra_GNBCF, hop_samples)
        mixture_NBCF, sources_SNBCF = spectra_GNBCF[0], spectra_GNBCF[1:]
        mixture_BCT, sources_SBCT = waveforms_GBCT[0], waveforms_GBCT[1:]
    else:
        sources_SNBCF = spectra_GNBCF * batch.gains[:, None, :, None, None]
        sources_SBCT = synthesise(sources_SNBCF, hop_samples)
        mixture_NBCF, mixture_BCT = sources_SNBCF.sum(0), sources_SBCT.sum(0)
    return Example(mixture_NBCF, mixture_BCT, sources_SNBCF, sources_SBCT, batch.windows)
