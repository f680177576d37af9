"""Batches: one buffer each, gathered and mixed on the device.

Shape suffixes: S sources, G signals (the mixture, then the sources), B batch, C channels,
T samples, N frames, F bins.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from flsep.trainer.data.buffer import Buffer
from flsep.trainer.stft import synthesise
from flsep.trainer.teacher import TeacherWindows

WINDOW_FIELDS = tuple(field.name for field in dataclasses.fields(TeacherWindows))


@dataclass(frozen=True, slots=True)
class Batch:
    """Excerpts as they lie in the shards; `assemble` makes an `Example` of them.

    `names` are the track and time of each excerpt, for messages. `num_in_all` is the number of
    excerpts in the batches of all ranks together.
    """

    buffer: Buffer
    # If not None, excerpts are gathered from here, and the buffer has no frames.
    preloaded_frames: Tensor | None
    num_frames: int
    names: tuple[str, ...]
    num_in_all: int

    def __len__(self) -> int:
        return len(self.names)

    @property
    def frames(self) -> Tensor:
        """float16 or float32 [frame, channel, bin, 2]: real and imaginary parts, as stored.

        Frames of the mixture and the sources, or of the sources alone if there are `gains`. The
        frames of one signal of an excerpt are neighbours.
        """
        preloaded = self.preloaded_frames
        return self.buffer.tensors["frames"] if preloaded is None else preloaded

    @property
    def starts(self) -> Tensor:
        """Index in `frames` at which each signal of each excerpt starts, int64 [signal, batch]."""
        return self.buffer.tensors["starts"]

    @property
    def swaps(self) -> Tensor:
        """Whether the channels are reversed, bool [signal, batch]."""
        return self.buffer.tensors["swaps"]

    @property
    def gains(self) -> Tensor | None:
        """Gain of each source, float32 [source, batch]; None leaves the tracks' own mixture."""
        return self.buffer.tensors.get("gains")

    @property
    def windows(self) -> TeacherWindows | None:
        """The teacher's windows; None without a teacher."""
        tensors = self.buffer.tensors
        if "embeddings" not in tensors:
            return None
        return TeacherWindows(**{name: tensors[name] for name in WINDOW_FIELDS})

    def to(self, device: torch.device) -> Batch:
        """Copy the buffer to a device, as `Buffer.to`; preloaded frames are there already."""
        return replace(self, buffer=self.buffer.to(device))

    @property
    def stft(self) -> Tensor:
        """The spectra, as stored, gathered to [signal, frame, batch, channel, bin, 2]."""
        num_channels, num_bins = self.frames.shape[1:3]
        device = self.frames.device
        channel_C = torch.arange(num_channels, device=device)
        # A swap reverses the order in which the channels are gathered, so that it needs no copy.
        channel_GBC = torch.where(self.swaps[..., None], channel_C.flip(0), channel_C)
        frame_GNB = self.starts[:, None] + torch.arange(self.num_frames, device=device)[:, None]
        # A row is one channel of one frame.
        row_GNBC = frame_GNB[..., None] * num_channels + channel_GBC[:, None]
        # Real and imaginary part move as one number.
        whole = torch.int32 if self.frames.itemsize == 2 else torch.int64
        rows = self.frames.flatten(0, 1).flatten(1).view(whole)
        gathered = rows.index_select(0, row_GNBC.flatten()).view(self.frames.dtype)
        return gathered.view(*row_GNBC.shape, num_bins, 2)


class Example(NamedTuple):
    """A mixed batch on the device: spectra are complex64, waveforms float32."""

    mixture_NBCF: Tensor
    mixture_BCT: Tensor
    references_SNBCF: Tensor
    references_SBCT: Tensor
    windows: TeacherWindows | None


def assemble(batch: Batch, device: torch.device, hop_samples: int) -> Example:
    """Bring a batch to the device, apply gains, mix, and transform back to waveforms.

    Waveforms have ``(num_frames - 1) * hop_samples`` samples.
    """
    # A batch that is on the device already is not copied.
    batch = batch.to(device)
    # Shards may store float16, which is too coarse to mix and transform.
    spectra_GNBCF = torch.view_as_complex(batch.stft.float())
    if batch.gains is None:
        # The tracks' own mixture, which need not be the sum of the stems.
        waveforms_GBCT = synthesise(spectra_GNBCF, hop_samples)
        mixture_NBCF, sources_SNBCF = spectra_GNBCF[0], spectra_GNBCF[1:]
        mixture_BCT, sources_SBCT = waveforms_GBCT[0], waveforms_GBCT[1:]
    else:
        # The transform is linear: gains and sums of spectra are those of the waveforms.
        sources_SNBCF = spectra_GNBCF * batch.gains[:, None, :, None, None]
        sources_SBCT = synthesise(sources_SNBCF, hop_samples)
        mixture_NBCF, mixture_BCT = sources_SNBCF.sum(0), sources_SBCT.sum(0)
    return Example(mixture_NBCF, mixture_BCT, sources_SNBCF, sources_SBCT, batch.windows)
