"""The ideal ratio mask."""

import numpy as np
import pytest

from flsep.trainer.errors import ScoringError
from flsep.trainer.scoring.estimators import apply_ideal_ratio_mask


def make_track(num_samples: int = 20000) -> tuple[np.ndarray, np.ndarray]:
    """Return references, float32 [2, sample, 2], and their sum."""
    rng = np.random.default_rng(0)
    references = 0.1 * rng.standard_normal((2, num_samples, 2)).astype(np.float32)
    return references, references.sum(axis=0)


def mask(
    references: np.ndarray, mixture: np.ndarray, n_fft: int = 4096, hop_samples: int = 1024
) -> np.ndarray:
    return apply_ideal_ratio_mask(references, mixture, n_fft=n_fft, hop_samples=hop_samples)


def test_masks_of_all_sources_sum_to_the_mixture():
    references, mixture = make_track()
    estimates = mask(references, mixture)
    assert estimates.shape == references.shape
    assert estimates.dtype == np.float32
    np.testing.assert_allclose(estimates.sum(axis=0), mixture, atol=1e-6)


def test_mask_is_the_share_of_power():
    """A source and its double share every bin as 1 : 4, so the mask is known by hand."""
    references, _ = make_track()
    references[1] = 2 * references[0]
    mixture = references.sum(axis=0)
    estimates = mask(references, mixture, n_fft=512, hop_samples=128)
    np.testing.assert_allclose(estimates[0], mixture / 5, atol=1e-6)
    np.testing.assert_allclose(estimates[1], mixture * 4 / 5, atol=1e-6)


def test_sources_apart_in_frequency_are_found_again():
    time = np.arange(22050) / 44100
    tones = np.stack([np.sin(2 * np.pi * f * time) for f in (440.0, 4400.0)])
    references = np.repeat(tones[..., None], 2, axis=2).astype(np.float32)
    estimates = mask(references, references.sum(axis=0))
    inside = slice(2048, -2048)
    np.testing.assert_allclose(estimates[:, inside], references[:, inside], atol=1e-2)


def test_channels_are_masked_apart():
    references, _ = make_track()
    references[0, :, 1] = 0
    references[1, :, 0] = 0
    estimates = mask(references, references.sum(axis=0))
    np.testing.assert_allclose(estimates, references, atol=1e-6)


def test_the_mixture_need_not_be_the_sum():
    references, mixture = make_track()
    np.testing.assert_allclose(
        mask(references, 0.5 * mixture), 0.5 * mask(references, mixture), atol=1e-6
    )


def test_silence_gives_silence():
    references, mixture = make_track()
    assert not mask(np.zeros_like(references), mixture).any()
    assert not mask(references, np.zeros_like(mixture)).any()


def test_refuses_what_does_not_fit():
    references, mixture = make_track()
    with pytest.raises(ValueError, match=r"references \(2, 20000, 2\) must be"):
        mask(references, mixture[:-1])
    with pytest.raises(ScoringError, match="has 2048 samples; an STFT with n_fft=4096 needs more"):
        mask(references[:, :2048], mixture[:2048])
