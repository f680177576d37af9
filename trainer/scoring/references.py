"""The two estimates that need no model: the floor and the ceiling of a comparison."""

import numpy as np
import torch
from numpy.typing import NDArray


def mixture_floor(mixture: NDArray[np.float32], num_sources: int) -> NDArray[np.float32]:
    """Return the mixture as the estimate of every source: the floor of a comparison.

    The mixture is not divided by the number of sources. (BSS Eval v4 does not ignore gain, and the
    oracle scripts of SiSEC 2018 do divide it, which scores higher.)

    Parameters
    ----------
    mixture
        float32 [sample, channel].
    num_sources
        How many estimates to return.

    Returns
    -------
    NDArray
        float32 [source, sample, channel], a read-only view.
    """
    return np.broadcast_to(mixture, (num_sources, *mixture.shape))


def oracle_irm(
    references: NDArray[np.float32],
    mixture: NDArray[np.float32],
    *,
    n_fft: int = 4096,
    hop: int = 1024,
) -> NDArray[np.float32]:
    """Separate a mixture with the ideal ratio mask of its true sources: the ceiling of a mask.

    The mask of source s is ``|S_s|^2 / sum_j |S_j|^2`` on each channel's STFT (IRM2 of SiSEC 2018,
    power 2), times the mixture's STFT; periodic Hann, centred, reflect-padded, as in the shards.

    Parameters
    ----------
    references
        float32 [source, sample, channel], the true sources.
    mixture
        float32 [sample, channel], which need not be the sum of the sources.
    n_fft, hop
        Samples of the STFT's window and hop.

    Returns
    -------
    NDArray
        float32 [source, sample, channel].

    Raises
    ------
    ValueError
        If the shapes do not fit, or the track is too short to be reflect-padded.

    References
    ----------
    Stoeter, Liutkus, Ito, "The 2018 Signal Separation Evaluation Campaign", LVA/ICA 2018.
    """
    if references.ndim != 3 or references.shape[1:] != mixture.shape:
        raise ValueError(
            f"references {references.shape} must be [source, sample, channel] "
            f"and the mixture {mixture.shape} one of them"
        )
    num_samples, num_channels = mixture.shape
    if num_samples <= n_fft // 2:
        raise ValueError(f"a track of {num_samples} samples is too short for n_fft={n_fft}")
    window = torch.hann_window(n_fft)

    def transform(signal: NDArray[np.float32]) -> torch.Tensor:
        samples = torch.from_numpy(np.ascontiguousarray(signal, dtype=np.float32))
        return torch.stft(samples, n_fft, hop, window=window, return_complex=True)

    estimates = np.empty(references.shape, dtype=np.float32)
    for channel in range(num_channels):  # one at a time: a spectrogram is 4 times its audio
        powers = [transform(signal).abs().square() for signal in references[..., channel]]
        total = torch.stack(powers).sum(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
        mixture_stft = transform(mixture[:, channel])
        for source, power in enumerate(powers):
            masked = mixture_stft * (power / total)
            estimate = torch.istft(masked, n_fft, hop, window=window, length=num_samples)
            estimates[source, :, channel] = estimate.numpy()
    return estimates
