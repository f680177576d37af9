"""Turn waveforms into what a shard stores: pure functions of arrays, no files, no Dask."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.fft
import soxr
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import DTypeLike, NDArray

SILENCE_DB = -120.0
"""The floor of `activity_db`: the level of digital silence, dBFS."""


def stft_frames(num_samples: int, n_fft: int, hop: int) -> int:
    """Return how many frames `stft_blocks` yields in all: 1 + num_samples // hop.

    Raises
    ------
    ValueError
        If the waveform is too short to be reflected, or a size makes no sense.
    """
    if n_fft < 2 or n_fft % 2 or hop < 1:
        raise ValueError(f"n_fft {n_fft} and hop {hop}: expected an even n_fft and a positive hop")
    if num_samples <= n_fft // 2:
        raise ValueError(
            f"a waveform of {num_samples} samples: expected at least {n_fft // 2 + 1} to reflect "
            f"half a window of n_fft {n_fft}; leave the track out"
        )
    return 1 + num_samples // hop


def stft_blocks(
    waveform: NDArray[np.float32], *, n_fft: int = 4096, hop: int = 1024, block_frames: int = 128
) -> Iterator[NDArray[np.complex64]]:
    """Compute the short-time Fourier transform, a block of frames at a time.

    Periodic Hann window, centred frames (frame k is centred on sample k * hop), reflected at both
    ends, not normalised: what `librosa.stft` and `torch.stft` compute by default.

    Parameters
    ----------
    waveform
        float32 [channel, sample].
    n_fft
        Samples of a window, even.
    hop
        Samples from one frame to the next.
    block_frames
        Frames of every block but the last; the values do not depend on it.

    Returns
    -------
    blocks
        Each complex64 [frame, channel, bin], n_fft // 2 + 1 bins.

    Raises
    ------
    ValueError
        If the waveform has another rank or is too short, or a size makes no sense.
    """
    if waveform.ndim != 2:
        raise ValueError(f"a waveform of shape {waveform.shape}: expected [channel, sample]")
    if block_frames < 1:
        raise ValueError(f"block_frames {block_frames}: expected at least 1")
    num_frames = stft_frames(waveform.shape[1], n_fft, hop)
    window = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)).astype(np.float32)

    def blocks() -> Iterator[NDArray[np.complex64]]:
        for first in range(0, num_frames, block_frames):
            num = min(block_frames, num_frames - first)
            start = first * hop - n_fft // 2
            samples = _reflected(waveform, start, start + (num - 1) * hop + n_fft)
            frames = sliding_window_view(samples, n_fft, axis=1)[:, ::hop].swapaxes(0, 1)
            yield scipy.fft.rfft(frames * window, axis=-1, overwrite_x=True)

    return blocks()


def _reflected(waveform: NDArray[np.float32], start: int, stop: int) -> NDArray[np.float32]:
    """Take samples [start, stop) of a waveform that is reflected beyond both ends."""
    last = waveform.shape[1] - 1
    if start >= 0 and stop <= last + 1:
        return waveform[:, start:stop]
    index = np.abs(np.arange(start, stop))
    reflected: NDArray[np.float32] = waveform[:, last - np.abs(last - index)]
    return reflected


def pack(spectrum: NDArray[np.complex64], dtype: DTypeLike) -> NDArray[Any]:
    """Lay out complex numbers as a shard stores them: real and imaginary part, in one precision.

    Parameters
    ----------
    spectrum
        complex64 [...], contiguous.
    dtype
        float16 or float32.

    Returns
    -------
    packed
        dtype [..., 2]; in float32 a view of the spectrum.

    Raises
    ------
    ValueError
        If a part is NaN, infinite, or beyond what the dtype holds (65504 in float16).
    """
    target = np.dtype(dtype)
    if target not in (np.float16, np.float32):
        raise ValueError(f"dtype {target}: expected float16 or float32")
    parts = spectrum.view(np.float32).reshape(*spectrum.shape, 2)
    peak = np.maximum(parts.max(initial=0), -parts.min(initial=0))
    limit = float(np.finfo(target).max)
    if not peak <= limit:  # so that NaN fails too
        remedy = "; use --stft-dtype float32" if np.isfinite(peak) else "; look at the waveform"
        raise ValueError(f"a spectrum of magnitude {peak:g}: expected at most {limit:g}{remedy}")
    return parts.astype(target, copy=False)


def to_mono(waveform: NDArray[np.float32]) -> NDArray[np.float32]:
    """Average the channels: float32 [channel, sample] to float32 [sample]."""
    mono: NDArray[np.float32] = waveform.mean(axis=0, dtype=np.float32)
    return mono


def resample(waveform: NDArray[np.float32], from_hz: int, to_hz: int) -> NDArray[np.float32]:
    """Resample with soxr at quality HQ: float32 [..., sample] of one or two axes, contiguous."""
    if from_hz == to_hz:
        return waveform
    resampled = soxr.resample(waveform.T, from_hz, to_hz, quality="HQ").T
    return np.ascontiguousarray(resampled, dtype=np.float32)


def activity_db(
    mono: NDArray[np.float32], window_samples: int, hop_samples: int, num_windows: int
) -> NDArray[np.float32]:
    """Measure the level of each of a teacher's windows.

    Parameters
    ----------
    mono
        float32 [sample], full scale 1.
    window_samples
        Samples of a window; one that runs past the end counts the samples that are there.
    hop_samples
        Samples from one window to the next.
    num_windows
        How many windows the teacher made.

    Returns
    -------
    level
        float32 [window]: 10 log10 of the mean square, dBFS, at least `SILENCE_DB`. A sine of
        amplitude 1 has -3.01 dBFS.

    Raises
    ------
    ValueError
        If the last window starts beyond the waveform.
    """
    starts = hop_samples * np.arange(num_windows)
    if num_windows and starts[-1] >= len(mono):
        raise ValueError(
            f"{num_windows} windows every {hop_samples} samples: expected the last to start within "
            f"the waveform's {len(mono)} samples; does the teacher pad?"
        )
    power = [np.square(mono[k : k + window_samples], dtype=np.float64).mean() for k in starts]
    level: NDArray[np.float64] = 10 * np.log10(np.maximum(power, 10 ** (SILENCE_DB / 10)))
    return level.astype(np.float32)


class MagnitudeMoments:
    """Accumulate what a corpus's mean and standard deviation of the magnitude, per bin, need.

    As open-unmix fits its scaler (open-unmix-pytorch, `scripts/train.py`, `get_statistics`): the
    magnitudes are averaged over the channels, and each frame is one sample.

    Attributes
    ----------
    count
        Frames added.
    total
        float64 [bin]: sum of the magnitudes.
    total_squares
        float64 [bin]: sum of their squares.
    """

    def __init__(self, num_bins: int) -> None:
        self.count = 0
        self.total = np.zeros(num_bins)
        self.total_squares = np.zeros(num_bins)

    def add(self, spectrum: NDArray[np.complex64]) -> None:
        """Add a block of frames, complex64 [frame, channel, bin]."""
        magnitude = np.abs(spectrum).mean(axis=1, dtype=np.float64)
        self.count += len(magnitude)
        self.total += magnitude.sum(axis=0)
        self.total_squares += np.square(magnitude).sum(axis=0)
