"""The interface of a teacher: a model that maps mono waveforms to one embedding a window."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TeacherInfo:
    """Identity of a teacher, and how it cuts audio into windows.

    `handle` is the address or folder that the teacher was loaded from, `digest` the
    `content_digest` of its folder. Window ``w`` covers ``window_samples`` samples from
    ``w * hop_samples``.
    """

    handle: str
    digest: str
    sample_rate_hz: int
    dim: int
    window_samples: int
    hop_samples: int


class Teacher(ABC):
    """Base class of loaded teachers; `flsep.pipeline.teachers.loading` makes them.

    One call of the model takes at most `batch_windows` windows. TeacherError is raised if an
    embedding is not finite.
    """

    # Subclasses set both when they load the model.
    info: TeacherInfo
    batch_windows: int

    @abstractmethod
    def __call__(self, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embed a waveform.

        Parameters
        ----------
        waveform : float32 [sample]
            Mono, at ``info.sample_rate_hz``, in -1..1, at least one window long.

        Returns
        -------
        float32 [window, dim]
            One embedding for each window that lies inside the waveform.
        """

    def embed_each(self, waveforms: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embed short waveforms of one length, in larger batches if the model can.

        The waveforms are float32 [waveform, sample], each as for a single call. The result is
        float32 [waveform, window, dim].
        """
        # A model that takes several waveforms in one call overrides this.
        return np.stack([self(waveform) for waveform in waveforms])
