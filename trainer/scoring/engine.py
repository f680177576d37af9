"""The interface of a scoring engine, and the tracks that it scores."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

Audio = tuple[NDArray[np.float32], NDArray[np.float32]]
"""References and estimates, float32 [source, sample, channel], full scale 1."""

DEFAULT_ENGINE = "museval"
"""Also the engine of stored scores that name none."""


class FailedTrack(NamedTuple):
    """A track that could not be scored, and the reason in one line; for a bug, its traceback."""

    track: str
    reason: str
    traceback: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackJob:
    """One track to score; the process that scores the track loads its audio.

    `fingerprint` identifies references and estimates: a stored result with another one is
    replaced. `load` must be picklable; `sources` names the sources in the order of its arrays.
    """

    name: str
    sources: tuple[str, ...]
    sample_rate_hz: int
    fingerprint: str
    load: Callable[[], Audio]


class Engine(ABC):
    """Scores the estimates of one track; subclasses take no arguments and must be picklable.

    To add an engine, write a subclass and name it in `flsep.trainer.registry.ENGINES`.
    """

    name: ClassVar[str]
    """The engine's name in the registry and in stored scores."""

    def prepare(self) -> None:  # noqa: B027 - most engines need nothing
        """Make the engine usable in this process and in the processes that it starts.

        Called before each track; a second call in a process must change nothing. Raises
        ScoringError if something that the engine needs is missing on this machine.
        """

    @abstractmethod
    def predict_peak_bytes(self, num_sources: int, num_channels: int, num_samples: int) -> int:
        """Predict the memory that `score` takes for one track, its two input arrays included."""

    @abstractmethod
    def score(
        self,
        references: NDArray[np.float32],
        estimates: NDArray[np.float32],
        *,
        sources: Sequence[str],
        sample_rate_hz: int,
        name: str,
    ) -> dict[str, Any]:
        """Score one track; called after `prepare`.

        `references` and `estimates` are float32 [source, sample, channel], full scale 1, of one
        shape. Raises ScoringError if they cannot be scored.

        Returns
        -------
        dict
            JSON values in museval's format: a list ``targets`` with ``name`` and ``frames`` for
            each source in the given order, and for each frame ``time`` and ``duration`` in
            seconds and ``metrics``, in dB, NaN where a metric is undefined: SDR, SIR, ISR and
            SAR, which ``flsep-train compare`` needs.
        """
