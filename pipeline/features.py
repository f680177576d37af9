"""Turn waveforms into the arrays of a shard: arrays in, arrays out, no files, no Dask.

Waveforms are processed in blocks, so that memory does not depend on their length.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import scipy.fft
import soxr
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import DTypeLike, NDArray

from flsep.pipeline.errors import SignalError

SILENCE_DB = -120.0
"""Lowest level that `activity_db` returns, in dBFS: that of digital silence."""

_SMALLEST_NORMAL = np.float32(2**-14)  # of float16
_CONVERTED_AT_ONCE = 1 << 15  # numbers; as many as fit into the processor's cache


class Pieces:
    """Cut a waveform that comes in blocks into pieces of `size` samples, `step` samples apart."""

    def __init__(self, size: int, step: int) -> None:
        self._size = size
        self._step = step
        self._buffer = np.empty(0, np.float32)
        self._num_held = 0
        self._num_skipped = 0  # samples still to skip, if there are gaps between pieces

    def add(self, block: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
        """Take the next samples, float32 [..., sample]; yield the pieces that they complete.

        All pieces share one buffer: use or copy a piece before asking for the next.
        """
        if not self._buffer.size:
            self._buffer = np.empty((*block.shape[:-1], self._size), np.float32)
        # Pieces overlap if the step is shorter than a piece, and leave gaps if it is longer.
        start = 0
        while True:
            skipped = min(self._num_skipped, block.shape[-1] - start)
            self._num_skipped -= skipped
            start += skipped
            taken = min(self._size - self._num_held, block.shape[-1] - start)
            self._buffer[..., self._num_held : self._num_held + taken] = block[
                ..., start : start + taken
            ]
            self._num_held += taken
            start += taken
            if self._num_held < self._size:
                return
            yield self._buffer
            # The overlap with the next piece moves to the front of the buffer.
            kept = max(self._size - self._step, 0)
            self._buffer[..., :kept] = self._buffer[..., self._size - kept :]
            self._num_held = kept
            self._num_skipped = max(self._step - self._size, 0)

    def rest(self) -> NDArray[np.float32]:
        """Return the samples of the last, incomplete piece."""
        return self._buffer[..., : self._num_held]


class Stft:
    """Compute the short-time Fourier transform of a waveform that comes in blocks.

    The result is that of `librosa.stft` and `torch.stft`: periodic Hann window, frame k centred on
    sample k * hop, reflection at both ends, no normalisation, 1 + num_samples // hop frames. They
    come in blocks of `block_frames`, on which their values do not depend.
    """

    def __init__(self, *, n_fft: int = 4096, hop: int = 1024, block_frames: int = 128) -> None:
        if n_fft < 2 or n_fft % 2 or hop < 1:
            raise ValueError(
                f"n_fft {n_fft} and hop {hop}: expected an even n_fft and a positive hop"
            )
        if block_frames < 1:
            raise ValueError(f"block_frames {block_frames}: expected at least 1")
        self._n_fft = n_fft
        self._hop = hop
        self._window = _hann(n_fft)
        self._pieces = Pieces((block_frames - 1) * hop + n_fft, block_frames * hop)
        self._ends: NDArray[np.float32] | None = None  # samples to reflect: first start, then end
        self._is_started = False

    def add(self, block: NDArray[np.float32]) -> Iterator[NDArray[np.complex64]]:
        """Take the next samples, float32 [channel, sample]; yield the blocks that they complete.

        A block is complex64 [frame, channel, bin] with n_fft // 2 + 1 bins.
        """
        if block.ndim != 2:
            raise ValueError(f"a waveform of shape {block.shape}: expected [channel, sample]")
        half = self._n_fft // 2
        # `block` grows by the samples before it: at the start all of them, later as many as the
        # reflection at the end needs. `fresh` is what the pieces have not seen yet.
        fresh = block
        if self._ends is not None and (not self._is_started or block.shape[1] <= half):
            block = np.concatenate([self._ends, block], axis=1)
        if not self._is_started:
            # The reflection at the start takes half a window: collect blocks until it is there.
            self._is_started = block.shape[1] > half
            mirrored = np.concatenate([block[:, half:0:-1], block], axis=1)
            fresh = mirrored if self._is_started else block[:, :0]
        self._ends = block[:, -(half + 1) :].copy()
        yield from map(self._transform, self._pieces.add(fresh))

    def finish(self) -> Iterator[NDArray[np.complex64]]:
        """Yield the last blocks; raises SignalError if the waveform was too short."""
        if self._ends is None or not self._is_started:
            num_samples = 0 if self._ends is None else self._ends.shape[1]
            raise SignalError(
                f"a waveform of {num_samples} samples: expected at least {self._n_fft // 2 + 1} to "
                f"reflect half a window of n_fft {self._n_fft}; leave the track out"
            )
        # The last sample is the mirror, so it is not repeated.
        yield from map(self._transform, self._pieces.add(self._ends[:, -2::-1]))
        rest = self._pieces.rest()
        if rest.shape[1] >= self._n_fft:
            yield self._transform(rest)

    def _transform(self, samples: NDArray[np.float32]) -> NDArray[np.complex64]:
        frames = sliding_window_view(samples, self._n_fft, axis=1)[:, :: self._hop].swapaxes(0, 1)
        spectrum: NDArray[np.complex64] = scipy.fft.rfft(
            frames * self._window, axis=-1, overwrite_x=True
        )
        return spectrum


def inverse_stft(spectrum: NDArray[np.complex64], *, n_fft: int, hop: int) -> NDArray[np.float32]:
    """Invert the STFT of one channel, complex64 [frame, bin], with a hop of at most n_fft // 2.

    Overlap-add of windowed frames, divided by the sum of the squared windows, as in
    `librosa.istft`; Griffin and Lim (1984), "Signal estimation from modified short-time Fourier
    transform", equation 6. Missing bins at the top count as 0. Returns float32 [sample],
    (frames - 1) * hop samples.
    """
    frames = scipy.fft.irfft(spectrum, n_fft, axis=-1)
    frames *= _hann(n_fft)
    # Half a window at either end is the reflection that `Stft` added.
    inside = slice(n_fft // 2, n_fft // 2 + (len(frames) - 1) * hop)
    waveform: NDArray[np.float32] = _overlap_add(frames, hop)[inside]
    waveform *= _inverse_weight(len(frames), n_fft, hop)[inside]
    return waveform


def _overlap_add(frames: NDArray[np.float32], hop: int) -> NDArray[np.float32]:
    num_frames, size = frames.shape
    total = np.zeros((num_frames - 1) * hop + size, np.float32)
    for number, frame in enumerate(frames):
        total[number * hop : number * hop + size] += frame
    return total


@lru_cache(maxsize=4)
def _inverse_weight(num_frames: int, n_fft: int, hop: int) -> NDArray[np.float32]:
    weight = _overlap_add(np.broadcast_to(_hann(n_fft) ** 2, (num_frames, n_fft)), hop)
    # The weight is 0 at the very ends, which the caller cuts off.
    return np.reciprocal(np.maximum(weight, _SMALLEST_NORMAL))


def _hann(size: int) -> NDArray[np.float32]:
    # Periodic: the divisor is `size`, not `size - 1` as in a symmetric window.
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    return window.astype(np.float32)


def pack(spectrum: NDArray[np.complex64], dtype: DTypeLike) -> NDArray[Any]:
    """Convert contiguous complex64 [...] to real and imaginary parts, [..., 2], as in a shard.

    The dtype is float16 or float32; the result in float32 is a view of the spectrum. Raises
    SignalError if a part is NaN, infinite, or too large for the dtype (65504 in float16).
    """
    target = np.dtype(dtype)
    if target not in (np.float16, np.float32):
        raise ValueError(f"dtype {target}: expected float16 or float32")
    parts = spectrum.view(np.float32).reshape(*spectrum.shape, 2)
    # Two reductions instead of the maximum of np.abs, which would make a copy; NaN passes through.
    peak = np.maximum(parts.max(initial=0), -parts.min(initial=0))
    limit = float(np.finfo(target).max)
    if not peak <= limit:  # true for NaN too
        remedy = "; use --stft-dtype float32" if np.isfinite(peak) else "; look at the waveform"
        raise SignalError(f"a spectrum of magnitude {peak:g}: expected at most {limit:g}{remedy}")
    return parts if target == np.float32 else _to_float16(parts)


def _to_float16(values: NDArray[np.float32]) -> NDArray[np.float16]:
    """Compute `values.astype(np.float16)`, faster; values are contiguous and below 65536."""
    # NumPy converts one number at a time, and numbers below 2**-14 very slowly. Here a float32
    # addition does the rounding (to nearest, ties to even): in the sum of a number and
    # 2**(exponent + 13), as many bits are left for the number as float16 has. The lowest bits of
    # the sum are then the mantissa with its leading one, which carries into the exponent that is
    # added to it.
    result = np.empty(values.shape, np.float16)
    source, target = values.reshape(-1).view(np.int32), result.reshape(-1).view(np.uint16)
    exponents, numbers = np.empty((2, _CONVERTED_AT_ONCE), np.int32)
    for start in range(0, len(source), _CONVERTED_AT_ONCE):
        bits = source[start : start + _CONVERTED_AT_ONCE]
        exponent, number = exponents[: len(bits)], numbers[: len(bits)]
        magnitude, beside = number.view(np.float32), exponent.view(np.float32)
        np.abs(bits.view(np.float32), out=magnitude)
        np.maximum(magnitude, _SMALLEST_NORMAL, out=beside)
        exponent &= 0x7F800000
        # The bit at 11 turns the exponent's bias into float16's, in the 16 bits that are kept.
        exponent += (13 << 23) + (1 << 11)
        magnitude += beside
        exponent >>= 13
        number += exponent
        np.right_shift(bits, 31, out=exponent)  # the sign, in every bit
        exponent <<= 15
        number |= exponent
        target[start : start + _CONVERTED_AT_ONCE] = number
    return result


def widen(packed: NDArray[Any], factor: float, scratch: NDArray[np.int32]) -> NDArray[np.float32]:
    """Compute ``packed * np.float32(factor)`` for finite float16 or float32 [...], faster.

    The magnitude of the factor is at most 2**15. The result is float32 [...] in the memory of
    `scratch`, int32 [...].
    """
    # NumPy converts one float16 at a time. Here the bits of all numbers are shifted to their places
    # in float32. The exponents are then too small by the difference of the biases, 112, which the
    # factor makes up for.
    product: NDArray[np.float32] = scratch.view(np.float32)
    if packed.dtype != np.float16:
        np.multiply(packed, np.float32(factor), out=product)
        return product
    np.copyto(scratch, packed.view(np.int16))  # extends the sign to all upper bits
    scratch <<= 13
    scratch &= ~0x70000000  # clear these extra signs from the exponent
    product *= np.float32(factor) * np.float32(2.0**112)
    return product


class MonoStream:
    """Average the channels of a waveform in blocks, and resample it (soxr, HQ) to `num_samples`."""

    def __init__(self, from_hz: int, to_hz: int, num_samples: int) -> None:
        self._resampler = (
            None
            if from_hz == to_hz
            else soxr.ResampleStream(from_hz, to_hz, 1, dtype="float32", quality="HQ")
        )
        self._num_missing = num_samples

    def add(self, block: NDArray[np.float32]) -> NDArray[np.float32]:
        """Take the next samples, float32 [channel, sample]; return mono samples, [sample]."""
        mono: NDArray[np.float32] = block.mean(axis=0, dtype=np.float32)
        return self._limit(self._resampler.resample_chunk(mono) if self._resampler else mono)

    def finish(self) -> NDArray[np.float32]:
        """Return the last samples, [sample]."""
        if self._resampler:
            left = self._limit(self._resampler.resample_chunk(np.empty(0, np.float32), last=True))
        else:
            left = np.empty(0, np.float32)
        return np.pad(left, (0, self._num_missing))

    def _limit(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        # The resampler may give a few samples more or fewer than expected: the end is cut here, or
        # filled with zeros in `finish`.
        samples = samples[: self._num_missing]
        self._num_missing -= len(samples)
        return samples


def activity_db(
    mono: NDArray[np.float32], window_samples: int, hop_samples: int, num_windows: int
) -> NDArray[np.float32]:
    """Measure the level of each of a teacher's windows in dBFS, float32 [window].

    The level is 10 log10 of the mean square, at least `SILENCE_DB`; a sine of amplitude 1, which is
    full scale, has -3.01 dBFS. A window that exceeds the waveform is measured up to its end.
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
    """Accumulate the sums of magnitudes and of their squares over frames, float64 [bin].

    As in open-unmix-pytorch, `scripts/train.py`, `get_statistics`: magnitudes are averaged over the
    channels, and each frame is one sample.
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
