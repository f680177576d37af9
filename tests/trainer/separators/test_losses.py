"""The one-pass loss against a plain loop over combinations, hand-worked values and references."""

import itertools
import math

import pytest
import torch

from flsep.trainer.separators.losses import combinations, magnitude_loss, time_loss

# The plain twins: one pass over the data for each combination.


def chosen_sources(num_sources, combine):
    sizes = range(1, num_sources) if combine else [1]
    return [c for size in sizes for c in itertools.combinations(range(num_sources), size)]


def plain_magnitude_loss(estimates, references, combine=True):
    losses = [
        (sum(estimates[i] for i in chosen) - sum(references[i] for i in chosen)).square().mean()
        for chosen in chosen_sources(len(estimates), combine)
    ]
    return sum(losses) / len(losses)


def plain_weighted_sdr(estimate, reference, mixture, epsilon=1e-10):
    def energy(signal):
        return signal.square().sum(-1)

    def cosine(first, second):
        norms = (energy(first) + epsilon).sqrt() * (energy(second) + epsilon).sqrt()
        return (first * second).sum(-1) / (norms + epsilon)

    noise, noise_estimate = mixture - reference, mixture - estimate
    weight = energy(reference) / (energy(reference) + energy(noise) + epsilon)
    return weight * cosine(estimate, reference) + (1 - weight) * cosine(noise_estimate, noise)


def plain_time_loss(estimates, references, mixture, combine=True):
    losses = [
        1
        - plain_weighted_sdr(
            sum(estimates[i] for i in chosen), sum(references[i] for i in chosen), mixture
        ).mean()
        for chosen in chosen_sources(len(estimates), combine)
    ]
    return sum(losses) / len(losses)


def value_and_gradient(loss, estimates, *others):
    estimates = estimates.clone().requires_grad_()
    value = loss(estimates, *others)
    value.backward()
    return value.detach(), estimates.grad


def assert_equal_loss(fast, plain, estimates, *others):
    value, gradient = value_and_gradient(fast, estimates, *others)
    expected, expected_gradient = value_and_gradient(plain, estimates, *others)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
    assert gradient.isfinite().all()
    assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()


# Magnitudes take the absolute values of the same signals.
def signals(case, num_sources):
    generator = torch.Generator().manual_seed(num_sources)
    shape = (num_sources, 2, 2, 1000)
    references = 0.1 * torch.randn(shape, generator=generator)
    estimates = references + 0.05 * torch.randn(shape, generator=generator)
    mixture = references.sum(0)
    if case == "mixture is not the sum":
        mixture = mixture + 0.02 * torch.randn(shape[1:], generator=generator)
    elif case == "a silent reference":
        mixture = mixture - references[0]
        references[0] = 0
    elif case == "a silent estimate":
        estimates[-1] = 0
    elif case == "a silent source":
        mixture = mixture - references[0]
        references[0] = estimates[0] = 0
    elif case == "a silent channel":
        for tensor in (references, estimates, mixture):
            tensor[..., 1, :] = 0
    elif case == "silent mixture":
        references, mixture = torch.zeros(shape), torch.zeros(shape[1:])
    elif case == "identical sources":
        references = references[:1].expand(shape).clone()
        mixture = references.sum(0)
    elif case == "identical estimates":
        estimates = estimates[:1].expand(shape).clone()
    elif case == "every estimate near the mixture":
        estimates = mixture + 1e-3 * torch.randn(shape, generator=generator)
    elif case == "sources of unequal level":
        level = 10.0 ** -torch.arange(num_sources).reshape(-1, 1, 1, 1)
        references, estimates = references * level, estimates * level
        mixture = references.sum(0)
    return estimates, references, mixture


CASES = [
    "plain",
    "mixture is not the sum",
    "a silent reference",
    "a silent estimate",
    "a silent source",
    "a silent channel",
    "silent mixture",
    "identical sources",
    "identical estimates",
    "every estimate near the mixture",
    "sources of unequal level",
]


@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize("num_sources", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("case", CASES)
def test_one_pass_equals_the_plain_loop(case, num_sources, combine):
    estimates, references, mixture = signals(case, num_sources)
    assert_equal_loss(
        lambda *a: time_loss(*a, combine=combine),
        lambda *a: plain_time_loss(*a, combine=combine),
        estimates,
        references,
        mixture,
    )
    assert_equal_loss(
        lambda *a: magnitude_loss(*a, combine=combine),
        lambda *a: plain_magnitude_loss(*a, combine=combine),
        estimates.abs()[:, None],
        references.abs()[:, None],
    )


@pytest.mark.parametrize("case", ["perfect", "every estimate is the mixture", "all silent"])
def test_values_and_gradients_are_finite_where_a_norm_vanishes(case):
    _, references, mixture = signals("a silent source", 4)
    if case == "all silent":
        references, mixture = torch.zeros_like(references), torch.zeros_like(mixture)
    estimates = (
        references if case != "every estimate is the mixture" else mixture.expand_as(references)
    )
    value, gradient = value_and_gradient(time_loss, estimates, references, mixture)
    expected = plain_time_loss(estimates, references, mixture)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    assert gradient.isfinite().all()
    value, gradient = value_and_gradient(
        magnitude_loss, estimates.abs()[:, None], references.abs()[:, None]
    )
    assert value.isfinite()
    assert gradient.isfinite().all()


def test_an_energy_that_rounds_below_zero_is_silence():
    # Sums of these are exact in float32, so that the noise of the three audible sources is
    # exactly 0; their inner products are too long even for float64.
    generator = torch.Generator().manual_seed(0)
    references = torch.randint(-(2**21), 2**21, (4, 8, 2, 30000), generator=generator).float()
    references[0] = 0
    mixture = references.sum(0)
    value, gradient = value_and_gradient(time_loss, references, references, mixture)
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert gradient.isfinite().all()


def test_combinations_are_the_proper_subsets():
    assert combinations(2).tolist() == [[1, 0], [0, 1]]
    assert combinations(3).tolist() == [
        [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]
    ]  # fmt: skip
    assert [len(combinations(number)) for number in range(2, 7)] == [2, 6, 14, 30, 62]


@pytest.mark.parametrize("number", [0, 1])
def test_combinations_of_fewer_than_two_sources_are_refused(number):
    with pytest.raises(ValueError, match=f"found {number} source.*two or more"):
        combinations(number)


def test_magnitude_loss_by_hand():
    # Errors 1, 2, -3: single sources (1 + 4 + 9) / 3; pairs 3, -2, -1: (9 + 4 + 1) more, over 6.
    estimates = torch.tensor([1.0, 2.0, -3.0]).reshape(3, 1, 1, 1, 1)
    references = torch.zeros_like(estimates)
    assert magnitude_loss(estimates, references, combine=False).item() == pytest.approx(14 / 3)
    assert magnitude_loss(estimates, references).item() == pytest.approx(28 / 6)


def test_time_loss_by_hand():
    # Sources (1, 0) and (0, 1) in the mixture (1, 1); estimates (1, 1) and (0, 2).
    references = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(2, 1, 1, 2)
    estimates = torch.tensor([[1.0, 1.0], [0.0, 2.0]]).reshape(2, 1, 1, 2)
    mixture = torch.ones(1, 1, 2)
    # First: cosine 1/sqrt 2 to the source; its noise estimate is 0, cosine 0; both weigh half.
    first = 0.5 * math.sqrt(0.5)
    # Second: cosine 1; its noise estimate (1, -1) has cosine 1/sqrt 2 to the noise (1, 0).
    second = 0.5 + 0.5 * math.sqrt(0.5)
    value = time_loss(estimates, references, mixture)
    assert value.item() == pytest.approx(1 - (first + second) / 2, abs=1e-5)


def test_perfect_estimates_lose_nothing():
    _, references, mixture = signals("plain", 4)
    assert time_loss(references, references, mixture).item() == pytest.approx(0, abs=1e-6)
    assert magnitude_loss(references[:, None], references[:, None]).item() == 0


def test_unequal_shapes_are_refused():
    estimates, references, mixture = signals("plain", 3)
    with pytest.raises(ValueError, match="equal shapes"):
        magnitude_loss(estimates[:2], references)
    with pytest.raises(ValueError, match="equal shapes"):
        time_loss(estimates, references[..., 1:], mixture)
    with pytest.raises(ValueError, match="equal shapes"):
        time_loss(estimates, references, mixture[:1])
