"""The floor and the ideal ratio mask."""

import numpy as np
import pytest

from flsep.trainer.scoring.references import mixture_floor, oracle_irm


def make_track(num_samples: int = 20000) -> tuple[np.ndarray, np.ndarray]:
    """Return references, float32 [2, sample, 2], and their sum."""
    rng = np.random.default_rng(0)
    references = 0.1 * rng.standard_normal((2, num_samples, 2)).astype(np.float32)
    return references, references.sum(axis=0)


def test_floor_is_the_mixture_for_every_source():
    _, mixture = make_track()
    estimates = mixture_floor(mixture, 3)
    assert estimates.shape == (3, *mixture.shape)
    assert estimates.dtype == np.float32
    for estimate in estimates:
        np.testing.assert_array_equal(estimate, mixture)


def test_masks_of_all_sources_sum_to_the_mixture():
    references, mixture = make_track()
    estimates = oracle_irm(references, mixture)
    assert estimates.shape == references.shape
    assert estimates.dtype == np.float32
    np.testing.assert_allclose(estimates.sum(axis=0), mixture, atol=1e-6)


def test_mask_is_the_share_of_power():
    """A source and its double share every bin as 1 : 4, so the mask is known by hand."""
    references, _ = make_track()
    references[1] = 2 * references[0]
    mixture = references.sum(axis=0)
    estimates = oracle_irm(references, mixture, n_fft=512, hop=128)
    np.testing.assert_allclose(estimates[0], mixture / 5, atol=1e-6)
    np.testing.assert_allclose(estimates[1], mixture * 4 / 5, atol=1e-6)


def test_sources_apart_in_frequency_are_found_again():
    time = np.arange(22050) / 44100
    tones = np.stack([np.sin(2 * np.pi * f * time) for f in (440.0, 4400.0)])
    references = np.repeat(tones[..., None], 2, axis=2).astype(np.float32)
    estimates = oracle_irm(references, references.sum(axis=0))
    inside = slice(2048, -2048)
    np.testing.assert_allclose(estimates[:, inside], references[:, inside], atol=1e-2)


def test_channels_are_masked_apart():
    references, _ = make_track()
    references[0, :, 1] = 0
    references[1, :, 0] = 0
    estimates = oracle_irm(references, references.sum(axis=0))
    np.testing.assert_allclose(estimates, references, atol=1e-6)


def test_the_mixture_need_not_be_the_sum():
    references, mixture = make_track()
    np.testing.assert_allclose(
        oracle_irm(references, 0.5 * mixture), 0.5 * oracle_irm(references, mixture), atol=1e-6
    )


def test_silence_gives_silence():
    references, mixture = make_track()
    assert not oracle_irm(np.zeros_like(references), mixture).any()
    assert not oracle_irm(references, np.zeros_like(mixture)).any()


def test_refuses_what_does_not_fit():
    references, mixture = make_track()
    with pytest.raises(ValueError, match=r"references \(2, 20000, 2\) must be"):
        oracle_irm(references, mixture[:-1])
    with pytest.raises(ValueError, match="2048 samples is too short for n_fft=4096"):
        oracle_irm(references[:, :2048], mixture[:2048])
