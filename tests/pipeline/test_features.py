import itertools
import math
import tracemalloc

import librosa
import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from flsep.pipeline.features import (
    MagnitudeMoments,
    activity_db,
    pack,
    resample,
    stft_blocks,
    stft_frames,
    to_mono,
)
from flsep.pipeline.media import AudioStream, decode


def noise(num_samples: int, num_channels: int = 2, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (0.2 * rng.standard_normal((num_channels, num_samples))).astype(np.float32)


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
)
def test_blocks_of_any_size_give_the_same_bytes(num_samples, num_channels, block_frames, hop):
    waveform = noise(num_samples, num_channels)
    options = {"n_fft": 64, "hop": hop}
    blocks = list(stft_blocks(waveform, **options, block_frames=block_frames))
    whole = stft(waveform, **options, block_frames=10_000)
    assert np.concatenate(blocks).tobytes() == whole.tobytes()
    assert {len(block) for block in blocks[:-1]} <= {block_frames}
    assert len(whole) == stft_frames(num_samples, 64, hop) == 1 + num_samples // hop


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
    blocks = stft_blocks(waveform, block_frames=64)
    tracemalloc.start()
    try:
        block_bytes = max(block.nbytes for block in blocks)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert block_bytes == 64 * 2 * 2049 * 8
    assert peak_bytes < 4 * block_bytes  # the whole is 20 blocks


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 2048), {}, r"2048 samples: expected at least 2049 to reflect .* n_fft 4096"),
        ((5000,), {}, r"shape \(5000,\): expected \[channel, sample\]"),
        ((2, 5000), {"n_fft": 63}, r"n_fft 63 and hop 1024: expected an even n_fft"),
        ((2, 5000), {"hop": 0}, r"hop 0: expected an even n_fft and a positive hop"),
        ((2, 5000), {"block_frames": 0}, r"block_frames 0: expected at least 1"),
    ],
)
def test_stft_refuses(shape, options, message):
    with pytest.raises(ValueError, match=message):  # at the call, not at the first block
        stft_blocks(np.zeros(shape, np.float32), **options)


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
    mixture = decode(AudioStream(example_track, 0))
    snr_db = {}
    for dtype in (np.float16, np.float32):
        packed = np.concatenate([pack(block, dtype) for block in stft_blocks(mixture)])
        again = invert(packed.astype(np.float64).view(np.complex128)[..., 0], mixture.shape[1])
        snr_db[dtype] = 10 * np.log10(np.sum(mixture**2) / np.sum((mixture - again) ** 2))
    assert 79.5 < snr_db[np.float16] < 80  # the design's 79.8
    assert snr_db[np.float32] > 120


# --- waveforms ------------------------------------------------------------------------------------


def test_to_mono_averages():
    mono = to_mono(np.array([[1, 2, -1], [0, 2, 1]], np.float32))
    assert mono.dtype == np.float32
    np.testing.assert_array_equal(mono, [0.5, 2, 0])


def test_resamples_each_channel():
    waveform = noise(5000)
    resampled = resample(waveform, 44100, 16000)
    assert resampled.shape == (2, 1814)
    assert resampled.flags.c_contiguous
    for channel in range(2):
        expected = soxr.resample(waveform[channel], 44100, 16000, quality="HQ")
        np.testing.assert_array_equal(resampled[channel], expected)
        np.testing.assert_array_equal(resample(waveform[channel], 44100, 16000), expected)
    assert resample(waveform, 16000, 16000) is waveform


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
