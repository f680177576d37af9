"""A singing voice for the demo corpus: a source-filter model in NumPy.

A glottal flow pulse train (Rosenberg, 1971, "Effect of glottal pulse shape on the quality of
natural vowels", pulse C) with breath noise is filtered by time-varying formants, a cascade of
second-order resonances as in Klatt (1980), "Software for a cascade/parallel formant synthesizer".
Consonants are bursts of filtered noise. The pitch glides from note to note, with vibrato, drift and
jitter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CONTROL_SAMPLES = 64  # from one point of the pitch, gain and formant contours to the next
_WINDOW_SAMPLES, _HOP_SAMPLES = 1024, 256  # of the short-time spectra that are filtered
_LEAD_SECONDS, _TAIL_SECONDS = 0.4, 0.25  # before a phrase (breath, consonant) and after it

# Formants F1..F5 in Hz of an adult male singer; other voices scale them.
_VOWELS = {
    "a": (700.0, 1150.0, 2600.0, 3300.0, 4000.0),
    "e": (450.0, 1750.0, 2500.0, 3350.0, 4100.0),
    "i": (290.0, 2000.0, 2700.0, 3500.0, 4200.0),
    "o": (460.0, 850.0, 2550.0, 3100.0, 3900.0),
    "u": (330.0, 700.0, 2450.0, 3050.0, 3800.0),
}
_NASAL = (260.0, 1050.0, 2200.0, 3100.0, 3900.0)
_BANDWIDTHS_HZ = (80.0, 110.0, 190.0, 260.0, 340.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Consonant:
    """The beginning of a syllable: share of voice, level, band and duration of noise."""

    voicing: float
    noise: float
    noise_hz: float
    noise_octaves: float
    seconds: float


CONSONANTS = {
    "": Consonant(voicing=1.0, noise=0.0, noise_hz=2000.0, noise_octaves=1.0, seconds=0.03),
    "h": Consonant(voicing=0.05, noise=0.2, noise_hz=1500.0, noise_octaves=1.3, seconds=0.06),
    "s": Consonant(voicing=0.0, noise=0.35, noise_hz=7500.0, noise_octaves=0.4, seconds=0.09),
    "sh": Consonant(voicing=0.0, noise=0.35, noise_hz=3500.0, noise_octaves=0.5, seconds=0.09),
    "f": Consonant(voicing=0.0, noise=0.12, noise_hz=6000.0, noise_octaves=1.2, seconds=0.07),
    "t": Consonant(voicing=0.0, noise=0.55, noise_hz=5000.0, noise_octaves=0.7, seconds=0.025),
    "k": Consonant(voicing=0.0, noise=0.55, noise_hz=2000.0, noise_octaves=0.5, seconds=0.03),
    "d": Consonant(voicing=0.1, noise=0.25, noise_hz=4000.0, noise_octaves=0.7, seconds=0.025),
    "l": Consonant(voicing=0.45, noise=0.0, noise_hz=2000.0, noise_octaves=1.0, seconds=0.05),
    "m": Consonant(voicing=0.4, noise=0.0, noise_hz=2000.0, noise_octaves=1.0, seconds=0.07),
    "n": Consonant(voicing=0.4, noise=0.0, noise_hz=2000.0, noise_octaves=1.0, seconds=0.06),
}
VOWELS = tuple(_VOWELS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Voice:
    """A singer.

    Attributes
    ----------
    lowest, highest : int
        Range as MIDI note numbers.
    formant_scale : float
        Formants relative to those of an adult male.
    vibrato_hz, vibrato_cents : float
        Rate and depth (half the excursion) on long notes.
    breath : float
        Level of aspiration noise relative to the pulse train.
    open_quotient : float
        Fraction of a period in which the glottis is open; a larger one gives a softer voice.
    """

    lowest: int
    highest: int
    formant_scale: float
    vibrato_hz: float
    vibrato_cents: float
    breath: float
    open_quotient: float


VOICES = {
    "baritone": Voice(
        lowest=43, highest=60, formant_scale=0.97, vibrato_hz=5.2, vibrato_cents=35.0,
        breath=0.006, open_quotient=0.55,
    ),
    "tenor": Voice(
        lowest=49, highest=66, formant_scale=1.03, vibrato_hz=5.7, vibrato_cents=45.0,
        breath=0.008, open_quotient=0.5,
    ),
    "alto": Voice(
        lowest=55, highest=71, formant_scale=1.13, vibrato_hz=5.5, vibrato_cents=30.0,
        breath=0.014, open_quotient=0.65,
    ),
    "soprano": Voice(
        lowest=60, highest=77, formant_scale=1.2, vibrato_hz=6.1, vibrato_cents=55.0,
        breath=0.01, open_quotient=0.6,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Syllable:
    """One sung note: MIDI pitch, start and end of its vowel, its sounds, its velocity (1-127)."""

    pitch: int
    start_seconds: float
    end_seconds: float
    consonant: str
    vowel: str
    velocity: int


def sing(
    melody: Sequence[Syllable],
    voice: Voice,
    *,
    num_samples: int,
    rate_hz: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Sing a melody.

    Parameters
    ----------
    melody : sequence of Syllable
        In order of time, without overlaps.
    voice : Voice
        The singer.
    num_samples, rate_hz : int
        Length and sample rate of the result; later syllables are cut.
    rng : numpy.random.Generator
        Source of randomness for breath, jitter and drift.

    Returns
    -------
    float64 [num_samples]
        Mono; vowels have an RMS of about 0.2 at full velocity, pauses are exactly zero.
    """
    out = np.zeros(num_samples)
    for phrase in _phrases(melody):
        first_sample = round((phrase[0].start_seconds - _LEAD_SECONDS) * rate_hz)
        sung = _sing_phrase(phrase, voice, first_sample / rate_hz, rate_hz, rng)
        start, stop = max(first_sample, 0), min(first_sample + len(sung), num_samples)
        if start < stop:
            out[start:stop] += sung[start - first_sample : stop - first_sample]
    return out


def _phrases(melody: Sequence[Syllable]) -> Iterator[list[Syllable]]:
    """Split a melody at rests that are long enough to breathe."""
    phrase: list[Syllable] = []
    for syllable in melody:
        if phrase and syllable.start_seconds - phrase[-1].end_seconds > 0.2:
            yield phrase
            phrase = []
        phrase.append(syllable)
    if phrase:
        yield phrase


def _sing_phrase(
    phrase: list[Syllable],
    voice: Voice,
    origin_seconds: float,
    rate_hz: int,
    rng: np.random.Generator,
) -> NDArray[np.float64]:
    """Sing one phrase whose first sample is at ``origin_seconds``."""
    length = round((phrase[-1].end_seconds - origin_seconds + _TAIL_SECONDS) * rate_hz)
    control_hz = rate_hz / _CONTROL_SAMPLES
    t = origin_seconds + np.arange(length // _CONTROL_SAMPLES + 2) / control_hz
    starts = np.array([syllable.start_seconds for syllable in phrase])
    ends = np.array([syllable.end_seconds for syllable in phrase])
    consonants = [CONSONANTS[syllable.consonant] for syllable in phrase]
    onsets = starts - [consonant.seconds for consonant in consonants]  # they precede the vowel
    which = np.maximum(np.searchsorted(onsets, t, side="right") - 1, 0)
    consonant_now = (t >= onsets[which]) & (t < starts[which])

    # Pitch in semitones: steps smoothed into glides, a scoop into the phrase, vibrato, instability.
    pitch = np.array([float(syllable.pitch) for syllable in phrase])[which]
    pitch = _smooth(pitch, 0.09 * control_hz)
    pitch -= 1.5 * np.exp(-np.maximum(t - starts[0], 0.0) / 0.05)
    depth = np.clip((t - starts[which] - 0.2) / 0.3, 0.0, 1.0) * voice.vibrato_cents / 100
    vibrato_phase = 2 * np.pi * (voice.vibrato_hz * t + rng.uniform())
    pitch += _smooth(depth, 0.1 * control_hz) * np.sin(vibrato_phase)
    pitch += 0.5 * _smooth(rng.standard_normal(len(t)), 0.25 * control_hz)  # drift
    pitch += 0.05 * rng.standard_normal(len(t))  # jitter
    f0_hz = 440.0 * 2.0 ** ((pitch - 69.0) / 12)

    # Loudness of the voice, and of consonant and breath noise.
    velocity = np.array([syllable.velocity / 127 for syllable in phrase])[which]
    arch = 1 - 0.3 * ((t - starts[which]) / (ends - starts)[which] - 0.3) ** 2
    sounding = (t >= onsets[which]) & (t < ends[which])
    voicing = np.where(consonant_now, np.array([c.voicing for c in consonants])[which], arch)
    gain = _smooth(sounding * voicing * velocity, 0.045 * control_hz)
    noise_gain = consonant_now * np.array([c.noise for c in consonants])[which] * velocity
    noise_gain = _smooth(noise_gain, 0.012 * control_hz)
    inhaling = (t > onsets[0] - 0.3) & (t < onsets[0] - 0.08)
    inhale = 0.004 * _smooth(inhaling.astype(np.float64), 0.12 * control_hz)

    # Formants: those of a nasal while it sounds; F1 stays above the pitch, as singers tune it.
    targets = np.array([_VOWELS[syllable.vowel] for syllable in phrase])[which]
    nasal = np.array([syllable.consonant in ("m", "n") for syllable in phrase])[which]
    targets = np.where((nasal & consonant_now)[:, None], _NASAL, targets)
    formants_hz = voice.formant_scale * _smooth(targets, 0.05 * control_hz)
    formants_hz[:, 0] = np.maximum(formants_hz[:, 0], 1.05 * f0_hz)

    # Source (glottal pulses, breath) and consonant noise, each filtered frame by frame.
    control_at = np.arange(len(t)) * _CONTROL_SAMPLES
    sample_at = np.arange(length)
    frame_at = np.arange(0, length + _WINDOW_SAMPLES, _HOP_SAMPLES)  # the frames' centres
    phase = np.cumsum(np.interp(sample_at, control_at, f0_hz)) / rate_hz
    aspiration = voice.breath * rng.standard_normal(length)
    source = _glottal_flow(phase % 1.0, voice.open_quotient) + aspiration
    source *= np.interp(sample_at, control_at, gain)
    source += np.interp(sample_at, control_at, inhale) * rng.standard_normal(length)
    frames = np.clip(frame_at // _CONTROL_SAMPLES, 0, len(t) - 1)
    tract = _formant_response(formants_hz[frames], f0_hz[frames], rate_hz)
    noise = rng.standard_normal(length) * np.interp(sample_at, control_at, noise_gain)
    bands = _noise_bands(rate_hz, consonants)[which[frames]]
    return _filter_frames(source, tract) + _filter_frames(noise, bands)


def _smooth(values: NDArray[np.float64], width: float) -> NDArray[np.float64]:
    """Average along axis 0 with a Hann window of ``width`` steps; the end values are repeated."""
    size = max(3, round(width) | 1)
    window = np.hanning(size + 2)[1:-1]
    window /= window.sum()
    edges = [(size // 2, size // 2)] + [(0, 0)] * (values.ndim - 1)
    padded = np.pad(values, edges, mode="edge")
    views = np.lib.stride_tricks.sliding_window_view(padded, size, axis=0)
    smoothed: NDArray[np.float64] = np.einsum("...w,w->...", views, window)
    return smoothed


def _glottal_flow(cycle: NDArray[np.float64], open_quotient: float) -> NDArray[np.float64]:
    """Return the flow at points of the glottal cycle in [0, 1): pulse C of Rosenberg (1971)."""
    peak = 0.67 * open_quotient
    rising = 0.5 * (1 - np.cos(np.pi * cycle / peak))
    falling = np.cos(0.5 * np.pi * (cycle - peak) / (open_quotient - peak))
    return np.where(cycle < peak, rising, np.where(cycle < open_quotient, falling, 0.0))


def _bins_hz(rate_hz: int) -> NDArray[np.float64]:
    return np.arange(_WINDOW_SAMPLES // 2 + 1, dtype=np.float64) * (rate_hz / _WINDOW_SAMPLES)


def _formant_response(
    formants_hz: NDArray[np.float64], f0_hz: NDArray[np.float64], rate_hz: int
) -> NDArray[np.float64]:
    """Return vocal tract times lip radiation, float64 [frame, bin], from float64 [frame, 5].

    The cascade continues with fixed resonances every 1.1 kHz from 5.2 kHz. Each frame is scaled so
    that vowels are about equally loud at any pitch.
    """
    f = _bins_hz(rate_hz)
    fixed = f / (1 + f / 2500.0)  # lip radiation, and the spectral tilt of a relaxed voice
    for centre_hz in np.arange(5200.0, rate_hz / 2, 1100.0):
        fixed *= centre_hz**2 / np.hypot(centre_hz**2 - f**2, 0.12 * centre_hz * f)
    damping = np.ones((len(formants_hz), len(f)))
    for formant_hz, bandwidth_hz in zip(formants_hz.T, _BANDWIDTHS_HZ, strict=True):
        ratio = (f / formant_hz[:, None]) ** 2
        damping *= (1 - ratio) ** 2 + ratio * (bandwidth_hz / formant_hz[:, None]) ** 2
    response = fixed / np.sqrt(damping)
    slope = 1 / (1 + (f / f0_hz[:, None]) ** 2)  # spectrum of the flow: -12 dB an octave
    loudness = np.sqrt(np.mean((response * slope * (f >= 0.8 * f0_hz[:, None])) ** 2, axis=1))
    scaled: NDArray[np.float64] = response / loudness[:, None] * 0.045
    return scaled


def _noise_bands(rate_hz: int, consonants: list[Consonant]) -> NDArray[np.float64]:
    """Return the noise spectrum of each consonant, float64 [consonant, bin]: bumps over octaves."""
    octaves = np.log2(np.maximum(_bins_hz(rate_hz), 20.0))
    bumps = [(octaves - np.log2(c.noise_hz)) / c.noise_octaves for c in consonants]
    return np.exp(-0.5 * np.array(bumps) ** 2)


def _filter_frames(
    signal: NDArray[np.float64], response: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Filter a signal by one zero-phase magnitude response a frame (weighted overlap-add)."""
    window = np.hanning(_WINDOW_SAMPLES + 1)[:-1]
    overlap = _WINDOW_SAMPLES // _HOP_SAMPLES
    half = _WINDOW_SAMPLES // 2
    num_frames = len(response)
    padded = np.zeros((num_frames + overlap - 1) * _HOP_SAMPLES)
    padded[half : half + len(signal)] = signal
    views = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW_SAMPLES)[::_HOP_SAMPLES]
    filtered = np.fft.irfft(np.fft.rfft(views * window, axis=1) * response, axis=1) * window
    # Cut each frame into blocks of a hop: block k of all frames is added in one step, k hops later.
    out = np.zeros((num_frames + overlap - 1, _HOP_SAMPLES))
    for block in range(overlap):
        out[block : block + num_frames] += filtered.reshape(num_frames, overlap, -1)[:, block]
    return out.ravel()[half : half + len(signal)] / 1.5  # squared Hann windows add up to 1.5
