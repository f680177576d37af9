"""Embed a signal that comes in blocks."""

import numpy as np
from numpy.typing import NDArray

from flsep.pipeline.features import MonoStream, Pieces, activity_db
from flsep.pipeline.stopwatch import Stopwatch
from flsep.pipeline.teachers.interface import Teacher


class EmbeddingStream:
    """Mixes a signal down to mono at the teacher's rate and embeds it in batches of windows.

    Blocks come at `sample_rate_hz`. The signal has `num_samples` samples at the teacher's rate, at
    least one window. `seconds` takes the times of ``decode`` (which includes resampling),
    ``teacher`` and ``write``.
    """

    def __init__(
        self, teacher: Teacher, sample_rate_hz: int, num_samples: int, seconds: Stopwatch
    ) -> None:
        info, batch_windows = teacher.info, teacher.batch_windows
        self._teacher = teacher
        self._seconds = seconds
        self._mono = MonoStream(sample_rate_hz, info.sample_rate_hz, num_samples)
        # Each batch begins where the next window after the last batch begins.
        self._batches = Pieces(
            (batch_windows - 1) * info.hop_samples + info.window_samples,
            batch_windows * info.hop_samples,
        )
        self._embeddings: list[NDArray[np.float32]] = []
        self._levels_db: list[NDArray[np.float32]] = []

    def add(self, block: NDArray[np.float32]) -> None:
        """Take the next samples, float32 [channel, sample]."""
        with self._seconds.measure("decode"):
            samples = self._mono.add(block)
        for batch in self._batches.add(samples):
            self._embed(batch)

    def finish(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return embeddings, float32 [window, dim], and levels, float32 [window], dBFS."""
        for batch in self._batches.add(self._mono.finish()):
            self._embed(batch)
        # The rest begins where the next window would; it may be too short to hold one.
        rest = self._batches.rest()
        if len(rest) >= self._teacher.info.window_samples:
            self._embed(rest)
        return np.concatenate(self._embeddings), np.concatenate(self._levels_db)

    def _embed(self, batch: NDArray[np.float32]) -> None:
        info = self._teacher.info
        with self._seconds.measure("teacher"):
            embedding = self._teacher(batch)
        with self._seconds.measure("write"):
            levels_db = activity_db(batch, info.window_samples, info.hop_samples, len(embedding))
        self._embeddings.append(embedding)
        self._levels_db.append(levels_db)
