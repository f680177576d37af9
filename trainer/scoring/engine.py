"""The interface of a scoring engine."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Failure(NamedTuple):
    """A track that could not be scored, and why, in one line."""

    track: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackJob:
    """One track to score; the audio is loaded by the process that scores it.

    Attributes
    ----------
    name
        The track's name, whatever it holds.
    sources
        Names of the sources, in the order of the arrays.
    sample_rate_hz
        Of references and estimates.
    fingerprint
        Identifies references and estimates: a stored result with another fingerprint is replaced.
    load
        Picklable; returns references and estimates, float32 [source, sample, channel].
    """

    name: str
    sources: tuple[str, ...]
    sample_rate_hz: int
    fingerprint: str
    load: Callable[[], tuple[NDArray[np.float32], NDArray[np.float32]]]
