"""The loss in one pass against a plain loop over the 14 combinations."""

from collections.abc import Callable
from typing import Any

import torch
from plain_xumx import plain_loss
from torch import Tensor

from flsep.trainer.separators.losses import magnitude_loss, time_loss


def test_loss(
    full_size: bool,
    best_seconds: Callable[..., list[float]],
    peak_bytes: Callable[[Callable[[], Any]], int],
    print_table: Callable[..., None],
) -> None:
    device = torch.device("cuda" if full_size and torch.cuda.is_available() else "cpu")
    batch, frames, bins, samples = (2, 259, 2049, 264192) if full_size else (1, 4, 17, 1000)
    if device.type == "cuda":
        batch = 16
    torch.manual_seed(0)
    estimates = torch.rand(4, frames, batch, 2, bins, device=device, requires_grad=True)
    references = torch.rand(4, frames, batch, 2, bins, device=device)
    waves = torch.randn(4, batch, 2, samples, device=device, requires_grad=True)
    sources = torch.randn(4, batch, 2, samples, device=device)
    mixture = sources.sum(0)

    def one_pass() -> Tensor:
        value = magnitude_loss(estimates, references) + 10 * time_loss(waves, sources, mixture)
        torch.autograd.grad(value, (estimates, waves))
        return value.detach().cpu()

    def plain() -> Tensor:
        value = plain_loss(estimates, references, waves, sources, mixture)
        torch.autograd.grad(value, (estimates, waves))
        return value.detach().cpu()

    torch.testing.assert_close(one_pass(), plain(), rtol=1e-4, atol=0)
    fast, slow = best_seconds(one_pass, plain)
    less, more = (peak_bytes(function) / 1e9 for function in (one_pass, plain))
    print_table(
        f"loss, forward and backward, batch {batch} x {frames} frames, {device}, "
        f"{torch.get_num_threads()} threads",
        ("way", "seconds", "ratio", "peak GB beside its input"),
        [
            ("14 passes", f"{slow:.3f}", "1", f"{more:.2f}"),
            ("one pass", f"{fast:.3f}", f"{slow / fast:.1f} times faster", f"{less:.2f}"),
        ],
    )
