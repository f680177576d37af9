"""The teacher's embeddings in a batch of excerpts, and how they are standardised."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flsep.cache import Layout, Statistics
from flsep.trainer.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherWindows:
    """Embeddings of the teacher's windows in a batch of excerpts.

    Attributes
    ----------
    embeddings : Tensor
        Standardised, float32 [batch, window, dim] of the mixture, or [source, batch, window, dim]
        of the stems, in the separator's order of sources.
    activity_db : Tensor
        RMS of each window of that signal in dBFS, float32, shaped as `embeddings` without dim.
    bounds : Tensor
        First and one-past-last latent frame of each window, relative to the excerpt, int64
        [(source,) batch, window, 2]. A window may reach beyond the excerpt.
    inside : Tensor
        Whether the window lies fully inside the excerpt, bool, shaped as `bounds` without 2.
    held : Tensor
        Index of the window that each latent frame lies in, int64 [batch, frame].
    """

    embeddings: Tensor
    activity_db: Tensor
    bounds: Tensor
    inside: Tensor
    held: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TeacherWindows:
        """Copy all tensors to a device."""
        return TeacherWindows(
            **{
                field.name: getattr(self, field.name).to(device, non_blocking=non_blocking)
                for field in dataclasses.fields(self)
            }
        )


def held_windows(
    layout: Layout, frames: npt.NDArray[np.int64], num_windows: int
) -> npt.NDArray[np.int64]:
    """Return the window that each frame of a track lies in: the last one that has started."""
    seconds = frames * (layout.hop_samples / layout.sample_rate_hz)
    # The margin keeps the first frame of a window from being rounded into the one before.
    window = np.floor(seconds / layout.window_hop_seconds + 1e-6).astype(np.int64)
    clipped: npt.NDArray[np.int64] = np.clip(window, 0, num_windows - 1)
    return clipped


@dataclass(frozen=True, slots=True)
class Standard:
    """Mean and inverse standard deviation of a teacher's embeddings, float32 [dim]."""

    mean: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]

    @classmethod
    def of(cls, statistics: Statistics, teacher_signal: str) -> Standard:
        """Pool the statistics of the mixtures, or of all stems; refuse them if all are silent."""
        # Row 0 of the statistics is the mixture, the others are the stems.
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
        # The variance of a union is the variance within its parts plus that between them.
        deviation = np.sqrt((share * (deviations**2 + (means - mean) ** 2)).sum(0))
        # A dimension that never moves carries nothing: set it to 0 instead of amplifying noise.
        moves = deviation > 1e-6 * deviation.max()
        scale = np.divide(1, deviation, out=np.zeros_like(deviation), where=moves)
        return cls(mean.astype(np.float32), scale.astype(np.float32))

    def __call__(self, embeddings: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Standardise embeddings, float32 [..., dim]."""
        standardised: npt.NDArray[np.float32] = (embeddings - self.mean) * self.scale
        return standardised
