"""X-UMX and its transform against the reference numbers and hand-worked cases."""

from pathlib import Path

import numpy as np
import pytest
import torch

from flsep.trainer.separator import (
    XUMX,
    analyse,
    count_bins,
    standardize_input,
    synthesise,
    time_signals,
)

REFERENCE = Path(__file__).parents[1] / "data" / "xumx.npz"
SOURCES = ("drums", "bass", "vocals")


@pytest.fixture(scope="module")
def reference():
    with np.load(REFERENCE) as arrays:
        return {
            name: torch.from_numpy(np.asarray(value)) if value.dtype.kind in "fi" else value
            for name, value in arrays.items()
        }


def public_state(reference):
    return {
        name.removeprefix("state/"): value
        for name, value in reference.items()
        if name.startswith("state/")
    }


def reference_separator(reference, **changes):
    settings = {
        "sources": tuple(str(name) for name in reference["sources"]),
        "num_channels": int(reference["channels"]),
        "n_fft": int(reference["n_fft"]),
        "max_bin": int(reference["max_bin"]),
        "hidden_size": int(reference["hidden_size"]),
    }
    return XUMX(**settings | changes)


def small_separator(**changes):
    settings = {
        "sources": SOURCES,
        "num_channels": 2,
        "n_fft": 16,
        "max_bin": 5,
        "hidden_size": 4,
        "num_layers": 2,
        "dropout": 0.0,
    }
    torch.manual_seed(0)
    return XUMX(**settings | changes)


def relative_error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_reference_estimates_and_waveforms(reference):
    separator = reference_separator(reference).eval()
    separator.load_public_state(public_state(reference))
    hop = int(reference["hop"])
    targets = reference["targets"]
    mixture_NBCF = analyse(targets.sum(1), int(reference["n_fft"]), hop)
    with torch.no_grad():
        separation = separator(mixture_NBCF.abs())
        waveforms = time_signals(separation.estimates_SNBCF, mixture_NBCF, hop, targets.shape[-1])
    assert relative_error(separation.estimates_SNBCF, reference["masked_spectrogram"]) < 1e-5
    assert relative_error(waveforms, reference["time_signals"]) < 1e-5


def test_state_has_the_public_names_but_the_windows(reference):
    own = set(reference_separator(reference).state_dict())
    assert own == set(public_state(reference)) - {"encoder.0.window", "decoder.window"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("layer_dec.bass.dec.0.weight", None, r'Missing key.*"layer_dec.bass.dec.0.weight"'),
        ("layer_dec.piano.dec.0.weight", torch.ones(1), r'Unexpected key.*"layer_dec.piano'),
        ("mean_scale.input_mean_bass", torch.ones(7), r"size mismatch for mean_scale.input_mean_b"),
    ],
)
def test_public_state_that_does_not_fit_is_refused(reference, name, change, message):
    state = public_state(reference)
    state.pop(name, None)
    if change is not None:
        state[name] = change
    with pytest.raises(ValueError, match=message) as caught:
        reference_separator(reference).load_public_state(state)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_sources", [2, 5])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_shapes_for_any_number_of_sources_and_channels(num_sources, num_channels):
    separator = small_separator(
        sources=tuple(f"source {index}" for index in range(num_sources)),
        num_channels=num_channels,
        max_bin=None,
    )
    separation = separator(torch.rand(6, 3, num_channels, 9))
    assert separation.estimates_SNBCF.shape == (num_sources, 6, 3, num_channels, 9)
    assert separation.source_latents_SNBD.shape == (num_sources, 6, 3, 8)
    torch.testing.assert_close(separation.shared_latent_NBD, separation.source_latents_SNBD.mean(0))
    assert separator.latent_size == 8


def test_bridge_1_carries_every_source_to_every_blstm():
    separator = small_separator().eval()
    mixture = torch.rand(6, 1, 2, 9)
    before = separator(mixture).source_latents_SNBD
    with torch.no_grad():
        separator.mean_scale["input_mean_vocals"].add_(1.0)
    changed = (separator(mixture).source_latents_SNBD != before).flatten(1, 2).any(1)
    own_half, blstm_half = changed[:, :4], changed[:, 4:]
    assert not own_half[:2].any()  # another source's encoder
    assert own_half[2].any()
    assert blstm_half.all()


def test_the_mask_covers_bins_above_the_crop_and_scales_the_mixture():
    separator = small_separator().eval()
    mixture = torch.rand(6, 2, 2, 9)
    louder_above = mixture.clone()
    louder_above[..., 5:] *= 2
    estimates = separator(mixture).estimates_SNBCF
    doubled = separator(louder_above).estimates_SNBCF
    assert (estimates[..., 5:] > 0).any()
    torch.testing.assert_close(doubled[..., 5:], 2 * estimates[..., 5:])
    torch.testing.assert_close(doubled[..., :5], estimates[..., :5])


def test_condition_widens_the_decoders_only_and_changes_the_estimates():
    separator = small_separator(condition_size=3).eval()
    assert separator.layer_dec["bass"]["dec"][0].weight.shape == (4, 8 + 3)
    mixture = torch.rand(6, 2, 2, 9)
    first = separator(mixture, torch.zeros(6, 2, 3))
    second = separator(mixture, torch.ones(6, 2, 3))
    assert (first.estimates_SNBCF != second.estimates_SNBCF).any()
    assert torch.equal(first.shared_latent_NBD, second.shared_latent_NBD)


@pytest.mark.parametrize(
    ("condition_size", "condition", "message"),
    [
        (0, torch.zeros(6, 2, 3), r"\(6, 2, 3\).*expects none"),
        (3, None, r"None.*condition size 3.*expects \(frames, batch, condition size\)"),
        (3, torch.zeros(6, 2, 4), r"\(6, 2, 4\)"),
        (3, torch.zeros(5, 2, 3), r"\(5, 2, 3\).*6 frames"),
    ],
)
def test_condition_that_does_not_fit_is_refused(condition_size, condition, message):
    separator = small_separator(condition_size=condition_size)
    with pytest.raises(ValueError, match=message):
        separator(torch.rand(6, 2, 2, 9), condition)


@pytest.mark.parametrize("shape", [(6, 2, 1, 9), (6, 2, 2, 8), (6, 2, 9)])
def test_mixture_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"expects \(frames, batch, 2 channels, 9 bins\)"):
        small_separator()(torch.rand(shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ("bass",)}, "two or more"),
        ({"sources": ("bass", "bass")}, "names that differ"),
        ({"sources": ("bass", "lead.vocals")}, "'lead.vocals': expected a word without dots"),
        ({"sources": ("bass", "keys")}, "'keys'"),
        ({"num_channels": 0}, "num_channels is 0"),
        ({"n_fft": 15}, "n_fft is 15"),
        ({"max_bin": 10}, "max_bin is 10: expected 1 to 9"),
        ({"hidden_size": 5}, "hidden_size is 5"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"num_layers": 1, "dropout": 0.1}, "dropout is 0.1: expected 0 with one"),
        ({"condition_size": -1}, "condition_size is -1"),
        ({"input_mean": np.zeros(9)}, r"input_mean has shape \(9,\).*expects 5"),
        ({"input_scale": [1, 1, 1, 1, np.nan]}, "5 finite values"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_separator(**changes)


def test_input_statistics_are_added_then_multiplied():
    mean, scale = standardize_input([2, 3, 4], [0.5, 0.0, 9.0], max_bin=2)
    np.testing.assert_array_equal(mean, np.float32([-2, -3]))
    np.testing.assert_allclose(scale, [2.0, 20000.0])
    separator = small_separator(max_bin=2, input_mean=mean, input_scale=scale)
    assert set(separator.mean_scale["input_mean_bass"].tolist()) == {-2.0, -3.0}
    # The mean itself is what the encoder must see as zero.
    mixture = torch.tensor([2.0, 3.0] + [0.0] * 7).expand(4, 1, 2, 9)
    latent = separator.eval()(mixture).source_latents_SNBD
    assert torch.equal(latent[..., :4], torch.zeros(3, 4, 1, 4))


def test_silent_corpus_is_refused():
    with pytest.raises(ValueError, match="the corpus is silent"):
        standardize_input(np.zeros(4), np.zeros(4), max_bin=3)


@pytest.mark.parametrize(
    ("n_fft", "sample_rate_hz", "expected"),
    [(4096, 44100, 1487), (512, 44100, 186), (512, 32000, 257), (512, 16000, 257)],
)
def test_count_bins(n_fft, sample_rate_hz, expected):
    frequencies_hz = np.arange(n_fft // 2 + 1) * sample_rate_hz / n_fft
    assert count_bins(n_fft, sample_rate_hz) == expected == np.sum(frequencies_hz <= 16000)


@pytest.mark.parametrize("num_samples", [400, 431])
def test_transform_inverts(num_samples):
    waveform = torch.randn(2, 3, 2, num_samples, generator=torch.Generator().manual_seed(0))
    spectrum = analyse(waveform, 64, 16)
    assert spectrum.shape == (2, 1 + num_samples // 16, 3, 2, 33)
    torch.testing.assert_close(synthesise(spectrum, 16, num_samples), waveform)
    torch.testing.assert_close(spectrum[1], analyse(waveform[1], 64, 16))


def test_transform_of_a_cosine_by_hand():
    # A cosine on bin 4 through a Hann window: half the window's sum there, a quarter beside it.
    times = torch.arange(256)
    spectrum = analyse(torch.cos(2 * torch.pi * 4 * times / 64).reshape(1, 1, -1), 64, 16)
    magnitude = spectrum.abs()[8, 0, 0]
    expected = torch.zeros(33)
    expected[3:6] = torch.tensor([8.0, 16.0, 8.0])
    torch.testing.assert_close(magnitude, expected, atol=1e-4, rtol=0)


def test_full_masks_give_the_mixture_back_and_silence_is_finite():
    waveform = torch.randn(2, 1, 320, generator=torch.Generator().manual_seed(0))
    waveform[1] = 0
    mixture = analyse(waveform, 64, 16)
    estimates = mixture.abs().expand(2, *mixture.shape).clone().requires_grad_()
    signals = time_signals(estimates, mixture, 16, 320)
    torch.testing.assert_close(signals, waveform.expand(2, -1, -1, -1))
    signals.square().sum().backward()
    assert estimates.grad.isfinite().all()


def test_short_waveform_is_refused():
    with pytest.raises(ValueError, match=r"32 samples is too short for n_fft 64.*pad it"):
        analyse(torch.zeros(1, 1, 32), 64, 16)


def test_latents_and_estimates_under_autocast():
    separator = small_separator().eval()
    mixture = torch.rand(6, 2, 2, 9)
    with torch.no_grad():
        expected = separator(mixture).estimates_SNBCF
        with torch.autocast("cpu", dtype=torch.bfloat16):
            estimates = separator(mixture).estimates_SNBCF
    assert estimates.dtype == torch.float32
    assert relative_error(estimates, expected) < 0.05
