"""Estimate sources to be scored: by a trained model, the mixture or the ideal ratio mask.

The mixture and the mask need no model; they are the floor and the ceiling of a comparison.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from flsep.cache import Shards, TrackRecord
from flsep.cache.format import fingerprint
from flsep.trainer.errors import ScoringError
from flsep.trainer.scoring.engine import Audio


class Estimator(ABC):
    """Estimates the sources of a track of the shards; picklable, to go where tracks are scored.

    `kind` is its name in ``evaluation.json``.
    """

    kind: ClassVar[str]
    wiener: bool = False

    def identity(self) -> str:
        """Identify the estimates: two estimators of one identity give the same ones."""
        return fingerprint([self.kind, None, self.wiener])

    @abstractmethod
    def estimate(
        self,
        shards: Shards,
        track: TrackRecord,
        mixture: NDArray[np.float32],
        references: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Return the estimates of a mixture, float32 [source, sample, channel].

        `mixture`, float32 [sample, channel], and `references`, in the estimates' shape, are the
        track's audio in the shards.
        """


@dataclass(frozen=True)
class TrainedModel(Estimator):
    """The model in a checkpoint."""

    kind = "run"
    checkpoint: Path
    wiener: bool = False

    def identity(self) -> str:
        """Identify the estimates by the content of the checkpoint, not by its path."""
        with open(self.checkpoint, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return fingerprint([self.kind, digest, self.wiener])

    def estimate(
        self,
        shards: Shards,
        track: TrackRecord,
        mixture: NDArray[np.float32],
        references: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Separate the mixture on the CPU, with one thread."""
        import torch

        from flsep.trainer.inference.separate import TrackSeparator

        torch.set_num_threads(1)  # each core scores a track of its own
        separator = TrackSeparator(self.checkpoint, device=torch.device("cpu"), wiener=self.wiener)
        embeddings = shards.read(track, "embedding", 0) if separator.needs_teacher else None
        # The whole track is one block; the separator cuts it into chunks.
        blocks = list(separator.separate([mixture.T], embeddings))
        return np.concatenate(blocks, axis=2).transpose(0, 2, 1)


@dataclass(frozen=True)
class MixtureEstimator(Estimator):
    """The mixture, at full level, as the estimate of every source: the floor of a comparison."""

    kind = "floor"

    def estimate(
        self,
        shards: Shards,
        track: TrackRecord,
        mixture: NDArray[np.float32],
        references: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Return the mixture for every source, a read-only view."""
        # Not divided by the number of sources: BSS Eval v4 does not ignore gain, and the oracle
        # scripts of SiSEC 2018, which do divide it, score higher.
        return np.broadcast_to(mixture, references.shape)


@dataclass(frozen=True)
class IdealRatioMask(Estimator):
    """The ideal ratio mask of the true sources: the ceiling of what a mask can reach."""

    kind = "oracle"

    def estimate(
        self,
        shards: Shards,
        track: TrackRecord,
        mixture: NDArray[np.float32],
        references: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Mask the mixture with the STFT of the shards."""
        layout = shards.layout
        return apply_ideal_ratio_mask(
            references, mixture, n_fft=layout.n_fft, hop_samples=layout.hop_samples
        )


@dataclass(frozen=True, slots=True)
class LoadTrack:
    """Read a track's audio from the shards and estimate its sources; called where it is scored."""

    estimator: Estimator
    shards: Shards
    track: TrackRecord

    def __call__(self) -> Audio:
        """Return references and estimates, float32 [source, sample, channel]."""
        shards = self.shards
        # Signal 0 is the mixture, the others are the sources.
        mixture, *sources = (
            shards.read_audio(self.track, signal).T for signal in range(len(shards.layout.signals))
        )
        references = np.stack(sources)
        return references, self.estimator.estimate(shards, self.track, mixture, references)


def apply_ideal_ratio_mask(
    references: NDArray[np.float32],
    mixture: NDArray[np.float32],
    *,
    n_fft: int,
    hop_samples: int,
) -> NDArray[np.float32]:
    """Separate a mixture with the ideal ratio mask of its true sources.

    The mask of source s is ``|S_s|^2 / sum_j |S_j|^2`` on each channel's STFT (IRM2 of SiSEC 2018,
    power 2: Stoeter, Liutkus, Ito, "The 2018 Signal Separation Evaluation Campaign", LVA/ICA 2018),
    times the mixture's STFT; periodic Hann, centred, reflect-padded, as in the shards.

    `references` and the estimates are float32 [source, sample, channel]; `mixture`, float32
    [sample, channel], need not be the sum of the sources. Raises ScoringError if the track is too
    short to be reflect-padded.
    """
    # Imported here: torch takes seconds to load, and the mixture as an estimate does not need it.
    import torch

    if references.ndim != 3 or references.shape[1:] != mixture.shape:
        raise ValueError(
            f"references {references.shape} must be [source, sample, channel] "
            f"and the mixture {mixture.shape} one of them"
        )
    num_samples, num_channels = mixture.shape
    if num_samples <= n_fft // 2:
        raise ScoringError(
            f"the track has {num_samples} samples; an STFT with n_fft={n_fft} needs more than "
            f"{n_fft // 2}"
        )
    window = torch.hann_window(n_fft)

    def transform(signal: NDArray[np.float32]) -> torch.Tensor:
        samples = torch.from_numpy(np.ascontiguousarray(signal, dtype=np.float32))
        return torch.stft(samples, n_fft, hop_samples, window=window, return_complex=True)

    estimates = np.empty(references.shape, dtype=np.float32)
    for channel in range(num_channels):  # one at a time: a spectrogram takes 4 times its audio
        powers = [transform(signal).abs().square() for signal in references[..., channel]]
        # Where all sources are silent, the mask is 0, not NaN.
        total = torch.stack(powers).sum(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
        mixture_stft = transform(mixture[:, channel])
        for source, power in enumerate(powers):
            masked = mixture_stft * (power / total)
            estimate = torch.istft(masked, n_fft, hop_samples, window=window, length=num_samples)
            estimates[source, :, channel] = estimate.numpy()
    return estimates
