"""X-UMX against the reference numbers, a plain twin and hand-worked cases."""

from pathlib import Path

import numpy as np
import pytest
import torch
from plain_xumx import PlainXUMX

from flsep.trainer.separators.xumx import XUMX, count_bins, standardize_input
from flsep.trainer.stft import analyse, time_signals

REFERENCE = Path(__file__).parents[2] / "data" / "xumx.npz"
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


def test_public_state_goes_out_as_it_came_in(reference):
    separator, state = reference_separator(reference), public_state(reference)
    separator.load_public_state(state)
    found = separator.public_state()
    assert set(found) == set(state) - {"encoder.0.window", "decoder.window"}
    for name, value in found.items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0, check_dtype=False)


@pytest.mark.parametrize("num_sources", [2, 4])
def test_batched_products_equal_the_loop_over_sources(num_sources):
    sources = SOURCES[:num_sources] if num_sources < 4 else (*SOURCES, "other")
    separator = small_separator(sources=sources)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in separator.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    plain = PlainXUMX(sources, 2, 9, 5, 4, num_layers=2, dropout=0.0)
    plain.load_state_dict(separator.public_state())
    mixture = torch.rand(6, 3, 2, 9, generator=generator)
    weight = torch.rand(num_sources, 6, 3, 2, 9, generator=generator)
    found, expected = separator(mixture).estimates_SNBCF, plain(mixture)
    torch.testing.assert_close(found, expected)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    state = separator.public_state()  # the running statistics have moved alike
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value)
    for parameter in separator.parameters():
        with torch.no_grad():
            parameter.copy_(parameter.grad)
    gradients = separator.public_state()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("layer_dec.bass.dec.0.weight", None, r"layer_dec.bass.dec.0.weight has shape none"),
        ("layer_dec.piano.dec.0.weight", torch.ones(1), r"layer_dec.piano.* expected none"),
        ("mean_scale.input_mean_bass", torch.ones(7), r"input_mean_bass has shape \(7,\), ex"),
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
        separator.input_mean_SF[2] += 1.0
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
    assert separator.decoder_SHD.shape == (3, 4, 8 + 3)
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
    separator = small_separator(max_bin=2, input_mean=mean, input_scale=[2.0, 4.0])
    assert set(separator.input_mean_SF[1].tolist()) == {-2.0, -3.0}
    # The mean itself is what the encoder must see as zero.
    mixture = torch.tensor([2.0, 3.0] + [0.0] * 7).expand(4, 1, 2, 9)
    latent = separator.eval()(mixture).source_latents_SNBD
    torch.testing.assert_close(latent[..., :4], torch.zeros(3, 4, 1, 4), rtol=0, atol=1e-6)


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


def test_latents_and_estimates_under_autocast():
    separator = small_separator().eval()
    mixture = torch.rand(6, 2, 2, 9)
    with torch.no_grad():
        expected = separator(mixture).estimates_SNBCF
        with torch.autocast("cpu", dtype=torch.bfloat16):
            estimates = separator(mixture).estimates_SNBCF
    assert estimates.dtype == torch.float32
    assert relative_error(estimates, expected) < 0.05
