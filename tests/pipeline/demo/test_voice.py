import numpy as np
import pytest

from flsep.pipeline.demo.voice import (
    _BANDWIDTHS_HZ,
    _VOWELS,
    CONSONANTS,
    VOICES,
    Syllable,
    _filter_frames,
    _formant_response,
    _glottal_flow,
    _smooth,
    sing,
)

RATE_HZ = 44100


def hold(pitch: int, vowel: str = "a", consonant: str = "", start: float = 0.5, end: float = 1.5):
    return Syllable(
        pitch=pitch,
        start_seconds=start,
        end_seconds=end,
        consonant=consonant,
        vowel=vowel,
        velocity=110,
    )


def sung(*melody: Syllable, voice: str = "tenor", seconds: float = 2.0, seed: int = 0):
    return sing(
        melody,
        VOICES[voice],
        num_samples=round(seconds * RATE_HZ),
        rate_hz=RATE_HZ,
        rng=np.random.default_rng(seed),
    )


def excerpt(signal, start_seconds, stop_seconds):
    return signal[round(start_seconds * RATE_HZ) : round(stop_seconds * RATE_HZ)]


def measure_f0_hz(signal):
    """Pitch by the highest peak of the autocorrelation from 80 to 1100 Hz."""
    spectrum = np.abs(np.fft.rfft(signal, 2 * len(signal))) ** 2
    correlation = np.fft.irfft(spectrum)
    shortest, longest = RATE_HZ // 1100, RATE_HZ // 80
    return RATE_HZ / (shortest + np.argmax(correlation[shortest:longest]))


def band_energy(signal, low_hz, high_hz):
    power = np.abs(np.fft.rfft(signal)) ** 2
    hz = np.fft.rfftfreq(len(signal), 1 / RATE_HZ)
    return power[(hz >= low_hz) & (hz < high_hz)].sum()


@pytest.mark.parametrize(
    ("voice", "pitch", "expected_hz"),
    [("baritone", 45, 110.0), ("tenor", 57, 220.0), ("alto", 69, 440.0), ("soprano", 76, 659.3)],
)
def test_a_held_note_has_the_pitch_of_its_key(voice, pitch, expected_hz):
    signal = excerpt(sung(hold(pitch), voice=voice), 0.6, 0.75)  # before the vibrato sets in
    assert measure_f0_hz(signal) == pytest.approx(expected_hz, rel=0.03)


def test_long_notes_have_vibrato():
    signal = sung(hold(69, end=2.5), voice="soprano", seconds=3.0)
    times = np.arange(1.2, 2.3, 0.01)
    f0 = np.array([measure_f0_hz(excerpt(signal, t, t + 0.03)) for t in times])
    cents = 1200 * np.log2(f0 / np.median(f0))
    assert 30 < np.ptp(cents) < 250
    spectrum = np.abs(np.fft.rfft((cents - cents.mean()) * np.hanning(len(cents)), 1024))
    rate_hz = np.argmax(spectrum) / 1024 / 0.01
    assert rate_hz == pytest.approx(VOICES["soprano"].vibrato_hz, abs=0.8)


def test_pitch_glides_within_a_phrase():
    melody = (hold(64, "u", start=0.5, end=0.98), hold(76, "u", start=1.0, end=1.6))
    signal = sung(*melody, voice="soprano")
    # The pitch turns where the (empty) consonant begins, 0.03 s before the vowel.
    low, between, high = (
        measure_f0_hz(excerpt(signal, t, t + 0.02)) for t in (0.65, 0.96, 1.1)
    )  # fmt: skip
    assert low == pytest.approx(329.6, rel=0.04)
    assert high == pytest.approx(659.3, rel=0.04)
    assert low * 1.1 < between < high / 1.1


def test_vowels_have_their_formants():
    signals = {vowel: excerpt(sung(hold(45, vowel)), 0.7, 1.4) for vowel in "aiu"}
    share = {
        vowel: {
            band: band_energy(signal, *band) / band_energy(signal, 50, 8000)
            for band in ((150, 450), (600, 1300), (1900, 2400))
        }
        for vowel, signal in signals.items()
    }
    assert share["a"][600, 1300] > 0.5 > share["i"][600, 1300] + share["u"][600, 1300]
    assert share["i"][150, 450] > 2 * share["a"][150, 450]
    assert share["i"][1900, 2400] > 5 * share["u"][1900, 2400]


def test_an_s_hisses_before_the_vowel_and_has_no_pitch():
    melody = (hold(57, end=1.0), hold(57, consonant="s", start=1.1, end=1.8))
    signal = sung(*melody)
    hiss, vowel = excerpt(signal, 1.03, 1.07), excerpt(signal, 1.3, 1.5)
    assert band_energy(hiss, 5000, 12000) > 5 * band_energy(hiss, 50, 4000)
    assert band_energy(vowel, 5000, 12000) < 0.01 * band_energy(vowel, 50, 4000)


def test_every_consonant_is_sung_without_drowning_the_vowel():
    for consonant in CONSONANTS:
        signal = sung(hold(57, consonant=consonant))
        onset, vowel = excerpt(signal, 0.4, 0.5), excerpt(signal, 0.8, 1.2)
        assert 0.05 < np.sqrt(np.mean(vowel**2)) < 0.5
        assert np.mean(onset**2) < 2 * np.mean(vowel**2)


def test_silence_between_phrases_is_exact():
    signal = sung(hold(57, end=1.0), hold(60, start=3.0, end=3.5), seconds=4.0)
    assert not excerpt(signal, 1.3, 2.5).any()
    assert not excerpt(signal, 3.8, 4.0).any()
    assert excerpt(signal, 3.1, 3.4).any()


def test_phrases_that_cross_the_ends_are_cut():
    whole = sung(hold(57, start=0.1, end=1.5))
    cut = sung(hold(57, start=0.1, end=1.5), seconds=1.0)
    np.testing.assert_array_equal(cut, whole[:RATE_HZ])
    assert not sung(hold(57, start=5.0, end=6.0), seconds=1.0).any()
    assert not sung(seconds=1.0).any()


def test_the_generator_decides():
    np.testing.assert_array_equal(sung(hold(57)), sung(hold(57)))
    assert not np.array_equal(sung(hold(57)), sung(hold(57), seed=1))


def test_glottal_flow_opens_peaks_and_closes():
    open_quotient = 0.6
    peak = 0.67 * open_quotient
    cycle = np.array([0.0, peak / 2, peak, (peak + open_quotient) / 2, open_quotient, 0.9])
    expected = [0.0, 0.5, 1.0, np.cos(np.pi / 4), 0.0, 0.0]
    np.testing.assert_allclose(_glottal_flow(cycle, open_quotient), expected, atol=1e-12)


def test_filtering_with_ones_changes_nothing():
    signal = np.random.default_rng(0).standard_normal(5000)
    signal[:512] = 0
    filtered = _filter_frames(signal, np.ones((25, 513)))
    np.testing.assert_allclose(filtered, signal, atol=1e-12)


def test_filtering_follows_the_response_of_each_frame():
    t = np.arange(20480) / RATE_HZ
    tone = np.sin(2 * np.pi * 20 * RATE_HZ / 1024 * t)  # the centre of bin 20
    response = np.zeros((84, 513))
    response[40:, 20] = 1
    filtered = _filter_frames(tone, response)
    assert np.abs(filtered[: 36 * 256]).max() < 1e-9
    assert np.sqrt(np.mean(filtered[46 * 256 : 76 * 256] ** 2)) > 0.4


def test_formant_response_matches_a_cascade_in_a_loop():
    formants = np.array([_VOWELS["o"]])
    response = _formant_response(formants, np.array([120.0]), RATE_HZ)[0]
    ratios = []
    for bin_ in (10, 20, 60, 200):
        f = bin_ * RATE_HZ / 1024
        expected = f / (1 + f / 2500)
        for centre, bandwidth in zip(_VOWELS["o"], _BANDWIDTHS_HZ, strict=True):
            expected *= centre**2 / abs(complex(centre**2 - f**2, bandwidth * f))
        for k in range(50):
            centre = 5200 + 1100 * k
            if centre < RATE_HZ / 2:
                expected *= centre**2 / abs(complex(centre**2 - f**2, 0.12 * centre * f))
        ratios.append(response[bin_] / expected)
    np.testing.assert_allclose(ratios, ratios[0], rtol=1e-9)


def test_smoothing_keeps_constants_and_rounds_steps():
    constant = np.full((9, 2), 3.0)
    np.testing.assert_allclose(_smooth(constant, 5), constant)
    # Hann weights of three steps: 1/4, 1/2, 1/4.
    np.testing.assert_allclose(_smooth(np.array([0.0, 0, 0, 1, 1]), 3), [0, 0, 0.25, 0.75, 1])
