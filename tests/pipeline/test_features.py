import itertools
import math
import tracemalloc
from collections.abc import Iterable, Iterator

import librosa
import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from flsep.pipeline.corpus.media import AudioStream, decode
from flsep.pipeline.features import (
    MagnitudeMoments,
    MonoStream,
    Pieces,
    Stft,
    activity_db,
    pack,
    widen,
)


def noise(num_samples: int, num_channels: int = 2, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.2 * rng.standard_normal((num_channels, num_samples))).astype(np.float32)


def split(waveform: np.ndarray, sizes: Iterable[int]) -> Iterator[np.ndarray]:
    """Cut a waveform into blocks of these sizes, over and over."""
    start = 0
    for size in itertools.cycle(sizes):
        yield waveform[..., start : start + size]
        start += size
        if start >= waveform.shape[-1]:
            return


def stft_blocks(
    waveform: np.ndarray, sizes: Iterable[int] = (10_000,), **options
) -> Iterator[np.ndarray]:
    transform = Stft(**options)
    for block in split(waveform, sizes):
        yield from transform.add(block)
    yield from transform.finish()


def stft(waveform: np.ndarray, **options) -> np.ndarray:
    return np.concatenate(list(stft_blocks(waveform, **options)))


# --- short-time Fourier transform -----------------------------------------------------------------


def stft_by_definition(waveform, n_fft, hop):
    """Plain loops over frame, bin and sample; reflection by walking to and fro."""
    num_channels, num_samples = waveform.shape
    walk = [*range(num_samples), *range(num_samples - 2, 0, -1)]
    frames = 1 + num_samples // hop
    result = np.zeros((frames, num_channels, n_fft // 2 + 1), complex)
    for frame, channel, freq in itertools.product(
        range(frames), range(num_channels), range(n_fft // 2 + 1)
    ):
        for k in range(n_fft):
            sample = waveform[channel, walk[(frame * hop - n_fft // 2 + k) % len(walk)]]
            hann = math.sin(math.pi * k / n_fft) ** 2
            angle = -2 * math.pi * freq * k / n_fft
            result[frame, channel, freq] += (
                sample * hann * complex(math.cos(angle), math.sin(angle))
            )
    return result


@pytest.mark.parametrize(("num_samples", "n_fft", "hop"), [(50, 16, 4), (9, 16, 5), (33, 8, 8)])
def test_stft_equals_its_definition(num_samples, n_fft, hop):
    waveform = noise(num_samples)
    expected = stft_by_definition(waveform, n_fft, hop)
    spectrum = stft(waveform, n_fft=n_fft, hop=hop, block_frames=3)
    assert spectrum.dtype == np.complex64
    np.testing.assert_allclose(spectrum, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_samples", [2049, 4096, 30_000, 88_200])
def test_stft_equals_librosa(num_samples):
    waveform = noise(num_samples)
    padded = np.pad(waveform, ((0, 0), (2048, 2048)), mode="reflect")
    expected = librosa.stft(padded, n_fft=4096, hop_length=1024, center=False)
    if num_samples >= 4096:  # for shorter ones librosa warns
        whole = librosa.stft(waveform, n_fft=4096, hop_length=1024, center=True, pad_mode="reflect")
        np.testing.assert_array_equal(whole, expected)
    spectrum = stft(waveform)
    error = np.linalg.norm(spectrum - expected.transpose(2, 0, 1)) / np.linalg.norm(expected)
    assert spectrum.shape == (1 + num_samples // 1024, 2, 2049)
    assert error < 1e-6


@settings(deadline=None, max_examples=40)
@given(
    num_samples=st.integers(33, 3000),
    num_channels=st.integers(1, 3),
    block_frames=st.integers(1, 200),
    hop=st.sampled_from([8, 16, 30, 64]),
    sizes=st.lists(st.integers(0, 500), min_size=1, max_size=5).filter(any),
)
def test_blocks_of_any_size_give_the_same_bytes(
    num_samples, num_channels, block_frames, hop, sizes
):
    waveform = noise(num_samples, num_channels)
    options = {"n_fft": 64, "hop": hop}
    blocks = list(stft_blocks(waveform, sizes, **options, block_frames=block_frames))
    whole = stft(waveform, sizes=[num_samples], **options, block_frames=10_000)
    assert np.concatenate(blocks).tobytes() == whole.tobytes()
    assert {len(block) for block in blocks[:-1]} <= {block_frames}
    assert len(whole) == 1 + num_samples // hop


def test_a_sine_peaks_in_its_bin():
    rate_hz, freq = 44100, 100
    time = np.arange(rate_hz) / rate_hz
    sine = 0.5 * np.cos(2 * np.pi * freq * rate_hz / 4096 * time)
    frame = np.abs(stft(sine[None].astype(np.float32))[20, 0])
    # amplitude 0.5 / 2 sidebands * sum of the window, 4096 / 2; half of it in the bins beside
    np.testing.assert_allclose(frame[freq - 2 : freq + 3], [0, 256, 512, 256, 0], atol=0.02)
    assert np.argmax(frame) == freq


def test_stft_streams():
    waveform = noise(44100 * 30)
    blocks = stft_blocks(waveform, [65536], block_frames=64)
    tracemalloc.start()
    try:
        block_bytes = max(block.nbytes for block in blocks)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert block_bytes == 64 * 2 * 2049 * 8
    assert peak_bytes < 4 * block_bytes  # the whole is 20 blocks


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_fft": 63}, r"n_fft 63 and hop 1024: expected an even n_fft"),
        ({"hop": 0}, r"hop 0: expected an even n_fft and a positive hop"),
        ({"block_frames": 0}, r"block_frames 0: expected at least 1"),
    ],
)
def test_stft_refuses_sizes(options, message):
    with pytest.raises(ValueError, match=message):
        Stft(**options)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 2048), r"2048 samples: expected at least 2049 to reflect .* n_fft 4096"),
        ((2, 0), r"0 samples: expected at least 2049"),
        ((5000,), r"shape \(700,\): expected \[channel, sample\]"),
    ],
)
def test_stft_refuses_waveforms(shape, message):
    with pytest.raises(ValueError, match=message):
        stft(np.zeros(shape, np.float32), sizes=[700])


# --- pieces ---------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    num_samples=st.integers(0, 200),
    size=st.integers(1, 40),
    step=st.integers(1, 60),
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any),
)
def test_pieces_are_slices(num_samples, size, step, sizes):
    waveform = noise(num_samples, 2)
    cutter = Pieces(size, step)
    pieces = [piece.copy() for block in split(waveform, sizes) for piece in cutter.add(block)]
    starts = [start for start in range(0, num_samples, step) if start + size <= num_samples]
    assert len(pieces) == len(starts)
    for piece, start in zip(pieces, starts, strict=True):
        np.testing.assert_array_equal(piece, waveform[:, start : start + size])
    np.testing.assert_array_equal(cutter.rest(), waveform[:, len(starts) * step :])


# --- packing --------------------------------------------------------------------------------------


def test_packs_real_and_imaginary_parts():
    spectrum = np.array([[1 + 2j, -0.5j], [65504, -65504j]], np.complex64)
    expected = [[[1, 2], [0, -0.5]], [[65504, 0], [0, -65504]]]
    for dtype in (np.float16, "float32"):
        packed = pack(spectrum, dtype)
        assert packed.dtype == dtype
        np.testing.assert_array_equal(packed, expected)
    assert np.shares_memory(pack(spectrum, np.float32), spectrum)
    assert pack(np.zeros((0, 2, 5), np.complex64), np.float16).shape == (0, 2, 5, 2)


def test_rounds_to_float16_as_numpy_does():
    # All that rounding can do wrong shows at float16's own values and midway between neighbours.
    half = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    edges = np.concatenate([half, (half[1:] + half[:-1]) / 2, [1e-45, 1e-38, 2**-25]])
    edges = np.concatenate([edges, np.nextafter(edges, 0), np.nextafter(edges, 65504)])
    bits = np.random.default_rng(0).integers(0, 65504, 200_000, dtype=np.int64)
    anything = (bits << 15 | bits % 32749).astype(np.int32).view(np.float32)
    values = np.concatenate([edges, anything[anything <= 65504]]).astype(np.float32)
    values = np.concatenate([values, -values])
    spectrum = values[: len(values) // 2 * 2].view(np.complex64)
    expected = values[: len(values) // 2 * 2].astype(np.float16).reshape(-1, 2)
    np.testing.assert_array_equal(
        pack(spectrum, np.float16).view(np.uint16), expected.view(np.uint16)
    )


@pytest.mark.parametrize("value", [65504.004, -65510j, 1e30])
def test_pack_refuses_what_float16_cannot_hold(value):
    spectrum = np.array([0, value, 1], np.complex64)
    with pytest.raises(ValueError, match=r"magnitude .*expected at most 65504; use --stft-dtype"):
        pack(spectrum, np.float16)
    np.testing.assert_array_equal(pack(spectrum, np.float32)[1], spectrum[1:2].view(np.float32))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -1j * np.inf, complex(0, np.nan)])
def test_pack_refuses_what_is_not_finite(value, dtype):
    spectrum = np.array([0, value, 1], np.complex64)
    with pytest.raises(ValueError, match=r"magnitude (nan|inf): expected .*look at the waveform"):
        pack(spectrum, dtype)


def test_pack_refuses_other_dtypes():
    with pytest.raises(ValueError, match="dtype int16: expected float16 or float32"):
        pack(np.zeros(3, np.complex64), np.int16)


def invert(spectrum: np.ndarray, num_samples: int) -> np.ndarray:
    """Overlap and add, float64: the least-squares inverse (Griffin and Lim, 1984, eq. 6)."""
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(4096) / 4096)
    total = np.zeros((2, 1024 * len(spectrum) + 4096))
    weight = np.zeros(total.shape[1])
    for index, frame in enumerate(np.fft.irfft(spectrum)):
        place = slice(1024 * index, 1024 * index + 4096)
        total[:, place] += hann * frame
        weight[place] += hann**2
    inner = slice(2048, 2048 + num_samples)
    return total[:, inner] / weight[inner]


def test_float16_keeps_the_real_track(example_track):
    mixture = np.concatenate(list(decode(AudioStream(example_track, 0))), axis=1)
    snr_db = {}
    for dtype in (np.float16, np.float32):
        packed = np.concatenate([pack(block, dtype) for block in stft_blocks(mixture)])
        again = invert(packed.astype(np.float64).view(np.complex128)[..., 0], mixture.shape[1])
        snr_db[dtype] = 10 * np.log10(np.sum(mixture**2) / np.sum((mixture - again) ** 2))
    assert 79.5 < snr_db[np.float16] < 80  # the design's 79.8
    assert snr_db[np.float32] > 120


# --- waveforms ------------------------------------------------------------------------------------


def mono_of(waveform, from_hz, to_hz, num_samples, sizes=(1000,)):
    stream = MonoStream(from_hz, to_hz, num_samples)
    parts = [stream.add(block) for block in split(waveform, sizes)]
    return np.concatenate([*parts, stream.finish()])


def test_averages_channels():
    waveform = np.array([[1, 2, -1], [0, 2, 1]], np.float32)
    mono = mono_of(waveform, 16000, 16000, 3)
    assert mono.dtype == np.float32
    np.testing.assert_array_equal(mono, [0.5, 2, 0])


@pytest.mark.parametrize("sizes", [[50_000], [1], [0, 17, 4000]])
def test_resamples_in_blocks_as_soxr_does_at_once(sizes):
    waveform = noise(5000)
    expected = soxr.resample(waveform.mean(axis=0), 44100, 16000, quality="HQ")
    assert len(expected) == 1814
    np.testing.assert_array_equal(mono_of(waveform, 44100, 16000, 1814, sizes), expected)


@pytest.mark.parametrize("rates_hz", [(44100, 16000), (16000, 16000)])
def test_cuts_or_fills_the_end(rates_hz):
    waveform = noise(5000)
    whole = mono_of(waveform, *rates_hz, 1814)
    np.testing.assert_array_equal(mono_of(waveform, *rates_hz, 900), whole[:900])
    longer = mono_of(waveform[:, :1814], 16000, 16000, 1820)
    np.testing.assert_array_equal(longer[1814:], np.zeros(6))


# --- activity -------------------------------------------------------------------------------------


def test_activity_of_known_signals():
    time = np.arange(16000) / 16000
    mono = np.concatenate(
        [
            np.sin(2 * np.pi * 1000 * time),  # full scale: 10 log10(1/2)
            np.zeros(16000),
            0.1 * np.sign(np.sin(2 * np.pi * 1000 * time + 0.1)),  # square: its amplitude
            np.full(16000, 1e-7),  # below the floor
        ]
    ).astype(np.float32)
    level = activity_db(mono, 16000, 16000, 4)
    assert level.dtype == np.float32
    np.testing.assert_allclose(level, [-3.0103, -120, -20, -120], atol=1e-4)


def test_activity_of_windows_that_overlap_and_overhang():
    mono = np.array([1, 1, 1, 1, 0, 0, 0, 0, 1, 0], np.float32)
    expected = 10 * np.log10([1, 0.5, 1e-12, 0.25, 0.5])
    np.testing.assert_allclose(activity_db(mono, 4, 2, 5), expected, rtol=1e-6)  # the last has 2
    assert activity_db(mono, 4, 2, 0).shape == (0,)
    with pytest.raises(ValueError, match=r"6 windows every 2 samples: .* waveform's 10 samples"):
        activity_db(mono, 4, 2, 6)


# --- statistics -----------------------------------------------------------------------------------


def test_moments_of_a_hand_worked_spectrum():
    moments = MagnitudeMoments(2)
    moments.add(np.array([[[3 + 4j, 0], [1, 2j]]], np.complex64))  # magnitudes 5, 0 and 1, 2
    moments.add(np.array([[[0, 1], [2, 1]], [[1, 0], [1, 0]]], np.complex64))
    assert moments.count == 3
    np.testing.assert_array_equal(moments.total, [3 + 1 + 1, 1 + 1 + 0])
    np.testing.assert_array_equal(moments.total_squares, [9 + 1 + 1, 1 + 1 + 0])


def test_moments_give_open_unmix_statistics():
    spectrum = stft(noise(30_000))
    moments = MagnitudeMoments(2049)
    for start in range(0, len(spectrum), 7):
        moments.add(spectrum[start : start + 7])
    magnitude = np.abs(spectrum).mean(axis=1)  # [frame, bin], as ComplexNorm(mono=True)
    mean = moments.total / moments.count
    variance = moments.total_squares / moments.count - mean**2
    np.testing.assert_allclose(mean, magnitude.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(np.sqrt(variance), magnitude.std(axis=0), rtol=1e-4)


def test_widening_is_numpys_to_the_bit():
    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    packed = every[np.isfinite(every)].reshape(2, -1, 2)
    for values in (packed, packed[:, ::3], packed.astype(np.float32)):
        for factor in (0.25, 1.2499999, 0.3, 1e-3, 0.0, 3.0):
            scratch = np.empty(values.shape, np.int32)
            found = widen(values, factor, scratch)
            assert np.shares_memory(found, scratch)
            expected = values.astype(np.float32) * np.float32(factor)
            assert np.array_equal(found, expected)
