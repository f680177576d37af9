"""Losses over all combinations of sources, in one pass over the data.

Sawata et al., "All for one and one for all: improving music separation by bridging networks",
ICASSP 2021: a magnitude and a time-domain term (multi-domain loss), each averaged over all
combinations of 1 to S - 1 of the S sources (combination loss).

Shape suffixes: S sources, B batch, C channels, T samples, N frames, F bins, W windows;
K combinations, G signals of a Gram matrix.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

EPSILON = 1e-10  # the public implementation's


def combinations(num_sources: int) -> Tensor:
    """List the combinations of 1 to S - 1 sources, float32 [combination, source] of 0 and 1."""
    if num_sources < 2:
        raise ValueError(f"found {num_sources} source: combinations need two or more")
    # Smaller combinations come first, so that row s < S is source s alone.
    chosen = [
        members
        for size in range(1, num_sources)
        for members in itertools.combinations(range(num_sources), size)
    ]
    table_KS = torch.zeros(len(chosen), num_sources)
    for row_S, members in zip(table_KS, chosen, strict=True):
        row_S[list(members)] = 1
    return table_KS


def magnitude_loss(
    estimates_SNBCF: Tensor, references_SNBCF: Tensor, combine: bool = True
) -> Tensor:
    """Average the mean squared error over all combinations of sources, or over single sources.

    Magnitudes are float [source, frame, batch, channel, bin]; the loss is a float32 scalar.
    """
    _check_shapes(estimates_SNBCF, references_SNBCF)
    with torch.autocast(estimates_SNBCF.device.type, enabled=False):
        errors = estimates_SNBCF.float() - references_SNBCF.float()
        if not combine:
            return errors.square().mean()
        # With errors e_i, the error energy of combination c is the sum of c_i c_j <e_i, e_j>.
        # Averaged over the combinations, <e_i, e_j> has the share of combinations that hold both i
        # and j as its weight: one number p for i = j and another q for all other pairs. The
        # weighted sum is therefore (p - q) sum_i |e_i|^2 + q |sum_i e_i|^2, without any inner
        # product.
        num_sources = len(errors)
        table_KS = combinations(num_sources)
        both_SS = table_KS.T @ table_KS / len(table_KS)
        own, joint = both_SS[0, 0].item(), both_SS[0, 1].item()
        apart = errors.square().mean() * num_sources
        return (own - joint) * apart + joint * errors.sum(0).square().mean()


def time_loss(
    estimates_SBCT: Tensor, references_SBCT: Tensor, mixture_BCT: Tensor, combine: bool = True
) -> Tensor:
    """Average 1 - weighted SDR over all combinations of sources, batch and channels.

    Weighted SDR (Choi et al., "Phase-aware speech enhancement with deep complex U-Net", ICLR 2019,
    eq. 9) of an estimate x of the reference y in the mixture m, with noise n = m - y and its
    estimate k = m - x: a cos(x, y) + (1 - a) cos(k, n), where a = |y|^2 / (|y|^2 + |n|^2).

    Waveforms are float [source, batch, channel, sample], without source for the mixture. The loss
    is a float32 scalar in [0, 2]. Its gradient reaches the estimates and is finite everywhere.
    """
    _check_shapes(estimates_SBCT, references_SBCT)
    _check_shapes(estimates_SBCT[0], mixture_BCT)
    num_sources = len(estimates_SBCT)
    table_KS = combinations(num_sources) if combine else torch.eye(num_sources)
    with torch.autocast(estimates_SBCT.device.type, enabled=False):
        # A combination's signal is a sum of source signals, so that all norms and inner products
        # are quadratic forms of one Gram matrix of {estimates, references, mixture}. It is float64:
        # k is a small difference of large signals when an estimate nears the mixture, and a Gram
        # matrix in float32 would have lost it.
        fixed_BCGT = torch.cat([references_SBCT, mixture_BCT[None]]).double().movedim(0, 2)
        moving_BCST = estimates_SBCT.double().movedim(0, 2)
        crossed_BCSG = moving_BCST @ fixed_BCGT.mT
        gram_BCGG = torch.cat(
            [
                torch.cat([moving_BCST @ moving_BCST.mT, crossed_BCSG], dim=-1),
                torch.cat([crossed_BCSG.mT, fixed_BCGT @ fixed_BCGT.mT], dim=-1),
            ],
            dim=-2,
        )
        sdr_BCK = _weighted_sdr(gram_BCGG, table_KS.to(gram_BCGG))
        return (1 - sdr_BCK.mean()).float()


def _weighted_sdr(gram_BCGG: Tensor, table_KS: Tensor) -> Tensor:
    """Compute the weighted SDR of each combination from {estimates, references, mixture}."""
    # The Gram matrix has S estimates, S references and the mixture, in this order.
    none_KS = torch.zeros_like(table_KS)
    none_K1, mixture_K1 = none_KS[:, :1], torch.ones_like(none_KS[:, :1])
    # Four signals for each combination, as coefficients of the signals of the Gram matrix.
    signals_K4G = torch.stack(
        [
            torch.cat([table_KS, none_KS, none_K1], dim=1),  # estimate
            torch.cat([none_KS, table_KS, none_K1], dim=1),  # reference
            torch.cat([-table_KS, none_KS, mixture_K1], dim=1),  # estimate of the noise
            torch.cat([none_KS, -table_KS, mixture_K1], dim=1),  # noise
        ],
        dim=1,
    )
    products_BCK44 = signals_K4G @ gram_BCGG.unsqueeze(2) @ signals_K4G.mT
    # Rounding can make the energy of silence negative.
    energies_BCK4 = products_BCK44.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    norms_BCK4 = (energies_BCK4 + EPSILON).sqrt()

    def cosine(first: int, second: int) -> Tensor:
        scale_BCK = norms_BCK4[..., first] * norms_BCK4[..., second] + EPSILON
        return products_BCK44[..., first, second] / scale_BCK

    target_BCK, noise_BCK = energies_BCK4[..., 1], energies_BCK4[..., 3]
    weight_BCK = target_BCK / (target_BCK + noise_BCK + EPSILON)
    return weight_BCK * cosine(0, 1) + (1 - weight_BCK) * cosine(2, 3)


def _check_shapes(estimates: Tensor, others: Tensor) -> None:
    if estimates.shape != others.shape:
        raise ValueError(
            f"estimates of shape {tuple(estimates.shape)} against {tuple(others.shape)}: "
            "the loss expects equal shapes"
        )
