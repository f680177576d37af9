"""X-UMX against the reference numbers, a plain twin and hand-worked cases."""

from pathlib import Path

import numpy as np
import pytest
import torch
from plain_xumx import PlainXUMX
from small_models import build_xumx, make_layout

from flsep.cache import Statistics
from flsep.trainer.errors import ConfigError, DataError
from flsep.trainer.separators.xumx import (
    XUMX,
    MultiDomainLoss,
    XumxConfig,
    XumxSeparation,
    count_bins,
    standardize_input,
    take_phase,
)
from flsep.trainer.stft import analyse, synthesise

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


def reference_separator(reference):
    layout = make_layout(
        sources=tuple(str(name) for name in reference["sources"]),
        num_channels=int(reference["channels"]),
        n_fft=int(reference["n_fft"]),
        sample_rate_hz=44100,
    )
    separator = XUMX(XumxConfig(hidden_size=int(reference["hidden_size"])), layout)
    assert separator.max_bin == int(reference["max_bin"])
    return separator


def small_separator(sources=SOURCES, num_channels=2, **settings):
    return build_xumx(make_layout(sources=sources, num_channels=num_channels), **settings)


def random_mixture(*shape, generator=None):
    """Return a spectrum whose phase is 0, so that its magnitude is exact."""
    return torch.rand(shape, generator=generator).to(torch.complex64)


def relative_error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def test_reference_estimates_and_waveforms(reference):
    separator = reference_separator(reference).eval()
    separator.load_public_state(public_state(reference))
    hop = int(reference["hop"])
    targets = reference["targets"]
    mixture_NBCF = analyse(targets.sum(1), int(reference["n_fft"]), hop)
    with torch.no_grad():
        separation = separator(mixture_NBCF)
        waveforms = synthesise(separation.estimates_SNBCF, hop, targets.shape[-1])
    assert relative_error(separation.magnitudes_SNBCF, reference["masked_spectrogram"]) < 1e-5
    estimates = separation.estimates_SNBCF.abs()
    assert relative_error(estimates, reference["masked_spectrogram"]) < 1e-5
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
    mixture = random_mixture(6, 3, 2, 9, generator=generator)
    weight = torch.rand(num_sources, 6, 3, 2, 9, generator=generator)
    found, expected = separator(mixture).magnitudes_SNBCF, plain(mixture.real)
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
        bandwidth_hz=8000.0,
    )
    separation = separator(random_mixture(6, 3, num_channels, 9))
    assert separation.estimates_SNBCF.shape == (num_sources, 6, 3, num_channels, 9)
    assert separation.estimates_SNBCF.dtype == torch.complex64
    shared, of_sources = separation.latents["shared"], separation.latents["sources"]
    assert of_sources.shape == (num_sources, 6, 3, 8)
    torch.testing.assert_close(shared, of_sources.mean(0))
    assert XUMX.latent_sizes(XumxConfig(hidden_size=4)) == {"shared": 8, "sources": 8}


def test_bridge_1_carries_every_source_to_every_blstm():
    separator = small_separator().eval()
    mixture = random_mixture(6, 1, 2, 9)
    before = separator(mixture).latents["sources"]
    with torch.no_grad():
        separator.input_mean_SF[2] += 1.0
    changed = (separator(mixture).latents["sources"] != before).flatten(1, 2).any(1)
    own_half, blstm_half = changed[:, :4], changed[:, 4:]
    assert not own_half[:2].any()  # another source's encoder
    assert own_half[2].any()
    assert blstm_half.all()


def test_the_mask_covers_bins_above_the_crop_and_scales_the_mixture():
    separator = small_separator().eval()
    mixture = random_mixture(6, 2, 2, 9)
    louder_above = mixture.clone()
    louder_above[..., 5:] *= 2
    estimates = separator(mixture).magnitudes_SNBCF
    doubled = separator(louder_above).magnitudes_SNBCF
    assert (estimates[..., 5:] > 0).any()
    torch.testing.assert_close(doubled[..., 5:], 2 * estimates[..., 5:])
    torch.testing.assert_close(doubled[..., :5], estimates[..., :5])


def test_full_masks_give_the_mixture_back_and_silence_is_finite():
    waveform = torch.randn(2, 1, 320, generator=torch.Generator().manual_seed(0))
    waveform[1] = 0
    mixture = analyse(waveform, 64, 16)
    magnitudes = mixture.abs().expand(2, *mixture.shape).clone().requires_grad_()
    signals = synthesise(take_phase(magnitudes, mixture), 16, 320)
    torch.testing.assert_close(signals, waveform.expand(2, -1, -1, -1))
    signals.square().sum().backward()
    assert magnitudes.grad.isfinite().all()


def test_condition_widens_the_decoders_only_and_changes_the_estimates():
    separator = small_separator(condition_size=3).eval()
    assert separator.decoder_SHD.shape == (3, 4, 8 + 3)
    mixture = random_mixture(6, 2, 2, 9)
    first = separator(mixture, torch.zeros(6, 2, 3))
    second = separator(mixture, torch.ones(6, 2, 3))
    assert (first.estimates_SNBCF != second.estimates_SNBCF).any()
    assert torch.equal(first.latents["shared"], second.latents["shared"])


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
        separator(random_mixture(6, 2, 2, 9), condition)


@pytest.mark.parametrize("shape", [(6, 2, 1, 9), (6, 2, 2, 8), (6, 2, 9)])
def test_mixture_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match=r"expects \(frames, batch, 2 channels, 9 bins\)"):
        small_separator()(random_mixture(*shape))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 5}, "separator.hidden_size is 5; expected an even number"),
        ({"num_layers": 0}, "separator.num_layers is 0"),
        ({"dropout": 1.0}, "separator.dropout is 1.0"),
        ({"num_layers": 1, "dropout": 0.1}, "dropout is 0.1; expected 0 with one"),
        ({"bandwidth_hz": 0.0}, "bandwidth_hz is 0.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        XumxConfig(**changes)


def test_loss_settings_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"loss.time_weight is -1.0; expected 0 or more"):
        MultiDomainLoss(time_weight=-1.0)


def test_one_source_is_refused():
    with pytest.raises(DataError, match="needs two sources or more; the data have bass alone"):
        small_separator(sources=("bass",))


def test_input_statistics_are_added_then_multiplied():
    mean, scale = standardize_input([2, 3, 4], [0.5, 0.0, 9.0], max_bin=2)
    np.testing.assert_array_equal(mean, np.float32([-2, -3]))
    np.testing.assert_allclose(scale, [2.0, 20000.0])
    statistics = Statistics(
        magnitude_mean=np.arange(2.0, 11.0),
        magnitude_std=np.array([0.5, 0.25, *[9.0] * 7]),
        embedding_mean=np.zeros((4, 6)),
        embedding_std=np.ones((4, 6)),
        num_windows=np.ones(4, np.int64),
    )
    separator = small_separator(bandwidth_hz=1000.0, statistics=statistics)
    assert separator.input_mean_SF[1].tolist() == [-2.0, -3.0]
    assert separator.input_scale_SF[1].tolist() == [2.0, 4.0]
    # The mean itself is what the encoder must see as zero.
    mixture = torch.tensor([2.0, 3.0] + [0.0] * 7).expand(4, 1, 2, 9).to(torch.complex64)
    latent = separator.eval()(mixture).latents["sources"]
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
    mixture = random_mixture(6, 2, 2, 9)
    with torch.no_grad():
        expected = separator(mixture).magnitudes_SNBCF
        with torch.autocast("cpu", dtype=torch.bfloat16):
            separation = separator(mixture)
    estimates = separation.magnitudes_SNBCF
    assert estimates.dtype == torch.float32
    assert separation.estimates_SNBCF.dtype == torch.complex64
    assert relative_error(estimates, expected) < 0.05


def make_separation(magnitudes, estimates=None):
    """Return a separation of given magnitudes; the complex estimates have the phase 0 at best."""
    estimates = magnitudes.to(torch.complex64) if estimates is None else estimates
    return XumxSeparation(estimates_SNBCF=estimates, magnitudes_SNBCF=magnitudes)


@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize("time_weight", [0.0, 10.0])
def test_reference_losses(reference, combine, time_weight):
    n_fft, hop = int(reference["n_fft"]), int(reference["hop"])
    magnitudes = reference["masked_spectrogram"]
    references = reference["targets"].movedim(1, 0)
    mixture = analyse(references.sum(0), n_fft, hop)
    terms = MultiDomainLoss(combine=combine, time_weight=time_weight)(
        make_separation(magnitudes, take_phase(magnitudes, mixture)),
        references_SNBCF=analyse(references, n_fft, hop),
        references_SBCT=references[..., : hop * (len(mixture) - 1)],
        mixture_BCT=references.sum(0)[..., : hop * (len(mixture) - 1)],
        hop_samples=hop,
    )
    expected = float(reference[f"loss/combine={combine:d}/multidomain={time_weight > 0:d}"])
    assert terms["total"].item() == pytest.approx(expected, rel=1e-5)
    if combine:
        for name, key in (("magnitude", "frequency"), ("time", "time")):
            single = float(reference[f"loss/{key}_only_combined"])
            assert terms[name].item() == pytest.approx(single, rel=1e-5)


def test_terms_are_float32_under_autocast():
    generator = torch.Generator().manual_seed(0)
    references = torch.randn(3, 2, 2, 320, generator=generator)
    arguments = {
        "references_SNBCF": analyse(references, 16, 4),
        "references_SBCT": references,
        "mixture_BCT": references.sum(0),
        "hop_samples": 4,
    }
    magnitudes = torch.rand(arguments["references_SNBCF"].shape, generator=generator)
    separation = make_separation(magnitudes)
    expected = MultiDomainLoss()(separation, **arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = MultiDomainLoss()(separation, **arguments)
    assert {name: value.dtype for name, value in terms.items()} == dict.fromkeys(
        ("magnitude", "time", "total"), torch.float32
    )
    assert all(torch.equal(terms[name], expected[name]) for name in terms)
    torch.testing.assert_close(terms["total"], terms["magnitude"] + 10 * terms["time"])


def test_a_tiny_separator_overfits_one_batch():
    generator = torch.Generator().manual_seed(0)
    times = torch.arange(4096) / 8000
    tone = torch.sin(2 * torch.pi * 440 * times) + torch.sin(2 * torch.pi * 1320 * times)
    gate = (torch.arange(4096) % 1024 < 300).float()
    hiss = torch.randn(2, 1, 4096, generator=generator) * gate
    references = torch.stack([0.3 * tone.expand(2, 1, -1), 0.3 * hiss])
    n_fft, hop = 256, 64
    spectrum = analyse(references.sum(0), n_fft, hop)
    separator = build_xumx(
        make_layout(sources=("tone", "hiss"), num_channels=1, n_fft=n_fft),
        hidden_size=32,
        num_layers=1,
        bandwidth_hz=8000.0,
    )
    optimizer = torch.optim.Adam(separator.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        terms = MultiDomainLoss()(
            separator(spectrum),
            references_SNBCF=analyse(references, n_fft, hop),
            references_SBCT=references,
            mixture_BCT=references.sum(0),
            hop_samples=hop,
        )
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        losses.append(terms["total"].item())
    assert losses[-1] < losses[0] / 4
