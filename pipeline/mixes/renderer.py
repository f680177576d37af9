"""Render mixes of precomputed spectra as waveforms at the teacher's sample rate."""

import numpy as np
from numpy.typing import NDArray

from flsep.cache import Draw, Grid, Shards
from flsep.pipeline.features import MonoStream, inverse_stft, widen
from flsep.pipeline.stopwatch import Stopwatch
from flsep.pipeline.teachers.interface import TeacherInfo

# Beyond this many bins above the teacher's highest frequency, a window's main lobe has decayed.
_SPARE_BINS = 16


class Renderer:
    """Renders one mix after the other in the same memory.

    `num_signals` is 1 for the mixture alone, 1 + the number of sources for the scaled sources too.
    `seconds` takes the times of ``mix`` and ``invert``.
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
        self._num_samples = count_teacher_samples(grid, teacher)
        # The last axis holds real and imaginary part, as the shards do; `_invert` views them as one
        # complex number.
        self._spectra = np.empty((num_signals, grid.num_frames, layout.num_bins, 2), np.float32)
        # Each region has its scratch memory for `widen`, which is reused for every source and mix.
        self._regions = [
            (frames, bins, np.empty(self._spectra[0, frames, bins].shape, np.int32))
            for frames, bins in _audible_regions(grid, teacher.sample_rate_hz)
        ]

    def render(self, draw: Draw) -> NDArray[np.float32]:
        """Render a mix, float32 [signal, sample], at the teacher's sample rate.

        The mixture comes first, then the scaled sources if wanted. They are mono, so that a channel
        swap makes no difference.
        """
        with self._seconds.measure("mix"):
            self._mix(draw)
        with self._seconds.measure("invert"):
            return np.stack([self._invert(spectrum) for spectrum in self._spectra])

    def _mix(self, draw: Draw) -> None:
        grid, spectra = self._grid, self._spectra
        num_channels = self._shards.layout.num_channels
        # Only excerpts with the track's own mixture have no gains.
        assert draw.gains is not None
        spectra.fill(0)
        recipe = zip(draw.places, draw.gains, strict=True)
        for source, ((track, window), gain) in enumerate(recipe, start=1):
            first = grid.first_frame(window)
            stored = self._shards.read(track, "stft", source)[first : first + grid.num_frames]
            for frames, bins, scratch in self._regions:
                # The mean over the channels is the mono downmix, since the transform is linear.
                for channel in range(num_channels):
                    scaled = widen(stored[frames, channel, bins], gain / num_channels, scratch)
                    spectra[0, frames, bins] += scaled
                    if len(spectra) > 1:
                        spectra[source, frames, bins] += scaled

    def _invert(self, spectrum: NDArray[np.float32]) -> NDArray[np.float32]:
        layout = self._shards.layout
        waveform = inverse_stft(
            spectrum.view(np.complex64)[..., 0], n_fft=layout.n_fft, hop=layout.hop_samples
        )
        mono = MonoStream(layout.sample_rate_hz, self._teacher.sample_rate_hz, self._num_samples)
        return np.concatenate([mono.add(waveform[None]), mono.finish()])


def count_teacher_samples(grid: Grid, teacher: TeacherInfo) -> int:
    """Return the length of an excerpt at the teacher's sample rate."""
    layout = grid.layout
    num_samples = (grid.num_frames - 1) * layout.hop_samples
    return num_samples * teacher.sample_rate_hz // layout.sample_rate_hz


def _audible_regions(grid: Grid, rate_hz: int) -> list[tuple[slice, slice]]:
    """Return the frames and bins that reach a teacher of some sample rate.

    Resampling removes what lies above the teacher's highest frequency, so most bins need not be
    mixed. Where the excerpt is cut out, however, the edge is a step that all bins shape together:
    the first and last frames need every bin.
    """
    layout, num_frames = grid.layout, grid.num_frames
    highest = rate_hz / 2 * layout.n_fft / layout.sample_rate_hz
    bins = slice(min(layout.num_bins, int(highest) + 1 + _SPARE_BINS))
    edge = min(-(-layout.n_fft // layout.hop_samples), num_frames // 2)
    inside = slice(edge, num_frames - edge)
    ends = (slice(edge), slice(num_frames - edge, num_frames))
    return [(inside, bins), *((frames, slice(None)) for frames in ends)]
