"""Render mixes of precomputed spectra as a teacher is to hear them."""

import numpy as np
from numpy.typing import NDArray

from flsep.cache import Draw, Grid, Shards
from flsep.pipeline.execution.stopwatch import Stopwatch
from flsep.pipeline.features import MonoStream, inverse_stft, widen
from flsep.pipeline.teachers.teacher import TeacherInfo

# Beyond the teacher's highest frequency: where a window's main lobe has decayed.
_SPARE_BINS = 16


class Renderer:
    """Renders one mix after the other, in memory that it keeps.

    Parameters
    ----------
    shards : Shards
        Hold the sources' spectra.
    grid : Grid
        Length of an excerpt.
    teacher : TeacherInfo
        Says at which rate.
    num_signals : int
        1 for the mixture; as many as sources more for each of them, scaled, too.
    seconds : Stopwatch
        Takes the time of ``mix`` and ``invert``.
    """

    def __init__(
        self,
        shards: Shards,
        grid: Grid,
        teacher: TeacherInfo,
        num_signals: int,
        seconds: Stopwatch,
    ) -> None:
        layout = shards.layout
        self._shards, self._grid, self._teacher, self._seconds = shards, grid, teacher, seconds
        self._num_samples = count_heard_samples(grid, teacher)
        self._spectra = np.empty((num_signals, grid.num_frames, layout.num_bins, 2), np.float32)
        self._parts = [
            (frames, bins, np.empty(self._spectra[0, frames, bins].shape, np.int32))
            for frames, bins in _heard_parts(grid, teacher.sample_rate_hz)
        ]

    def render(self, draw: Draw) -> NDArray[np.float32]:
        """Render a mix.

        Returns
        -------
        float32 [signal, sample]
            The mixture, then the scaled sources if wanted; mono, to which it does not matter which
            channel is which.

        Raises
        ------
        CacheError
            If a shard is damaged.
        """
        with self._seconds.measure("mix"):
            self._mix(draw)
        with self._seconds.measure("invert"):
            return np.stack([self._invert(spectrum) for spectrum in self._spectra])

    def _mix(self, draw: Draw) -> None:
        grid, spectra = self._grid, self._spectra
        num_channels = self._shards.layout.num_channels
        assert draw.gains is not None
        spectra.fill(0)
        recipe = zip(draw.places, draw.gains, strict=True)
        for source, ((track, window), gain) in enumerate(recipe, start=1):
            first = grid.first_frame(window)
            stored = self._shards.read(track, "stft", source)[first : first + grid.num_frames]
            for frames, bins, scratch in self._parts:
                for channel in range(num_channels):
                    part = widen(stored[frames, channel, bins], gain / num_channels, scratch)
                    spectra[0, frames, bins] += part
                    if len(spectra) > 1:
                        spectra[source, frames, bins] += part

    def _invert(self, spectrum: NDArray[np.float32]) -> NDArray[np.float32]:
        layout = self._shards.layout
        waveform = inverse_stft(
            spectrum.view(np.complex64)[..., 0], n_fft=layout.n_fft, hop=layout.hop_samples
        )
        mono = MonoStream(layout.sample_rate_hz, self._teacher.sample_rate_hz, self._num_samples)
        return np.concatenate([mono.add(waveform[None]), mono.finish()])


def count_heard_samples(grid: Grid, teacher: TeacherInfo) -> int:
    """Return the length of an excerpt at a teacher's rate."""
    layout = grid.layout
    num_samples = (grid.num_frames - 1) * layout.hop_samples
    return num_samples * teacher.sample_rate_hz // layout.sample_rate_hz


def _heard_parts(grid: Grid, rate_hz: int) -> list[tuple[slice, slice]]:
    """Return the frames and bins of a spectrum that a teacher at some rate can hear.

    Resampling removes what is above its highest frequency. But where the excerpt is cut out, the
    edge of all frequencies together is heard: there all bins count.
    """
    layout, num_frames = grid.layout, grid.num_frames
    highest = rate_hz / 2 * layout.n_fft / layout.sample_rate_hz
    bins = slice(min(layout.num_bins, int(highest) + 1 + _SPARE_BINS))
    edge = min(-(-layout.n_fft // layout.hop_samples), num_frames // 2)
    inside = slice(edge, num_frames - edge)
    ends = (slice(edge), slice(num_frames - edge, num_frames))
    return [(inside, bins), *((frames, slice(None)) for frames in ends)]
