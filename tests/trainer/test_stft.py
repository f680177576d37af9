"""The transform against torch's own, and hand-worked cases."""

import pytest
import torch

from flsep.trainer.stft import analyse, synthesise


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


def test_short_waveform_is_refused():
    with pytest.raises(ValueError, match=r"32 samples is too short for n_fft 64.*pad it"):
        analyse(torch.zeros(1, 1, 32), 64, 16)


@pytest.mark.parametrize(("n_fft", "hop"), [(64, 16), (64, 20), (32, 16), (16, 12)])
@pytest.mark.parametrize("num_samples", [None, 300, 302])
def test_synthesis_equals_the_inverse_transform_of_torch(n_fft, hop, num_samples):
    generator = torch.Generator().manual_seed(0)
    num_frames = 1 + 300 // hop
    shape = (3, num_frames, 2, 2, n_fft // 2 + 1)
    spectrum = torch.randn(shape, dtype=torch.complex64, generator=generator).requires_grad_()
    found = synthesise(spectrum, hop, num_samples)
    expected = torch.istft(
        spectrum.movedim(1, -1).flatten(0, 2),
        n_fft,
        hop,
        window=torch.hann_window(n_fft),
        length=num_samples,
    ).unflatten(0, (3, 2, 2))
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, generator=generator)
    gradients = [torch.autograd.grad((w * weight).sum(), spectrum)[0] for w in (found, expected)]
    torch.testing.assert_close(*gradients)
