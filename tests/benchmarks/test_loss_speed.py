"""The loss in one pass against a plain loop over the 14 combinations."""

from collections.abc import Callable
from itertools import combinations

import torch
from torch import Tensor

from flsep.trainer.losses import SeparationLoss


def plain_loss(
    spectra: Tensor, spectra_reference: Tensor, waves: Tensor, reference: Tensor, mixture: Tensor
) -> Tensor:
    """Sum each combination's signals, as the public trainer does."""
    terms = []
    for size in range(1, len(waves)):
        for chosen in combinations(range(len(waves)), size):
            index = list(chosen)
            error = spectra[index].sum(0) - spectra_reference[index].sum(0)
            estimate, target = waves[index].sum(0), reference[index].sum(0)
            noise, estimated_noise = mixture - target, mixture - estimate
            energy, noise_energy = (target**2).sum(-1), (noise**2).sum(-1)
            share = energy / (energy + noise_energy + 1e-10)
            signal = torch.cosine_similarity(estimate, target, dim=-1)
            rest = torch.cosine_similarity(estimated_noise, noise, dim=-1)
            sdr = share * signal + (1 - share) * rest
            terms.append((error**2).mean() + 10 * (1 - sdr.mean()))
    return torch.stack(terms).mean()


def test_loss(
    full_size: bool,
    best_seconds: Callable[..., list[float]],
    print_table: Callable[..., None],
) -> None:
    batch, frames, bins, samples = (2, 259, 2049, 264192) if full_size else (1, 4, 17, 1000)
    generator = torch.Generator().manual_seed(0)
    estimates = torch.rand(4, frames, batch, 2, bins, generator=generator, requires_grad=True)
    references = torch.rand(4, frames, batch, 2, bins, generator=generator)
    waves = torch.randn(4, batch, 2, samples, generator=generator, requires_grad=True)
    sources = torch.randn(4, batch, 2, samples, generator=generator)
    mixture = sources.sum(0)
    loss = SeparationLoss()

    def one_pass() -> Tensor:
        value = loss(
            estimates_SNBCF=estimates,
            references_SNBCF=references,
            estimates_SBCT=waves,
            references_SBCT=sources,
            mixture_BCT=mixture,
        )["total"]
        torch.autograd.grad(value, (estimates, waves))
        return value.detach()

    def plain() -> Tensor:
        value = plain_loss(estimates, references, waves, sources, mixture)
        torch.autograd.grad(value, (estimates, waves))
        return value.detach()

    torch.testing.assert_close(one_pass(), plain(), rtol=1e-4, atol=0)
    fast, slow = best_seconds(one_pass, plain)
    print_table(
        f"loss, forward and backward, batch {batch} x {frames} frames, "
        f"{torch.get_num_threads()} threads",
        ("way", "seconds", "ratio"),
        [
            ("14 passes", f"{slow:.3f}", "1"),
            ("one pass", f"{fast:.3f}", f"{slow / fast:.1f} times faster"),
        ],
    )
