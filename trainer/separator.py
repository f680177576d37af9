"""CrossNet-Open-Unmix (X-UMX) and the short-time Fourier transform around it.

Shape suffixes: S sources, B batch, C channels, T samples, N frames, F bins, W windows, D latent,
E embedding dimensions; H hidden units. A spectrum is NBCF, a stack of them SNBCF.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

# Buffers of the public implementation's own transform; here the transform has no state.
PUBLIC_WINDOWS = ("encoder.0.window", "decoder.window")


class Separation(NamedTuple):
    """What the separator gives for a batch of mixtures.

    Attributes
    ----------
    estimates_SNBCF : Tensor
        Magnitudes of the sources, float32 [source, frame, batch, channel, bin], >= 0.
    shared_latent_NBD : Tensor
        Latent after bridge 2, the mean of `source_latents_SNBD` over the sources.
    source_latents_SNBD : Tensor
        Each source's own latent before bridge 2: its encoder's output and its BLSTM's, both
        in (-1, 1); D is twice the hidden size.
    """

    estimates_SNBCF: Tensor  # noqa: N815
    shared_latent_NBD: Tensor  # noqa: N815
    source_latents_SNBD: Tensor  # noqa: N815


class XUMX(nn.Module):
    """CrossNet-Open-Unmix for any number of sources and channels.

    Sawata et al., "All for one and one for all: improving music separation by bridging networks",
    ICASSP 2021. Parameters carry the names of the public PyTorch implementation, so that its
    checkpoints load by name (`load_public_state`).

    Parameters
    ----------
    sources : tuple of str
        Names of the sources, two or more, in the order of the estimates.
    num_channels : int
        Audio channels, 1 or more.
    n_fft : int
        Length of the Fourier transform in samples; the mixture has n_fft // 2 + 1 bins.
    max_bin : int, optional
        Number of lowest bins that the encoders see (`count_bins`); all when not given.
    hidden_size : int
        Width of encoders and decoders; the BLSTM has half of it in each direction.
    num_layers : int
        Layers of the BLSTM.
    dropout : float
        Dropout between the layers of the BLSTM.
    input_mean, input_scale : array_like, optional
        float [max_bin]; added to, then multiplied with, each source's cropped input
        (`standardize_input`). Zeros and ones when not given.
    condition_size : int
        Number of extra features for each frame that are concatenated to the shared latent.

    Raises
    ------
    ValueError
        If an argument is out of its range.
    """

    def __init__(
        self,
        *,
        sources: tuple[str, ...],
        num_channels: int,
        n_fft: int,
        max_bin: int | None = None,
        hidden_size: int = 512,
        num_layers: int = 3,
        dropout: float = 0.4,
        input_mean: ArrayLike | None = None,
        input_scale: ArrayLike | None = None,
        condition_size: int = 0,
    ) -> None:
        super().__init__()
        num_bins = n_fft // 2 + 1
        max_bin = num_bins if max_bin is None else max_bin
        _check_sources(sources)
        _check(n_fft >= 2 and n_fft % 2 == 0, "n_fft", n_fft, "an even number >= 2")
        _check(num_channels >= 1, "num_channels", num_channels, ">= 1")
        _check(1 <= max_bin <= num_bins, "max_bin", max_bin, f"1 to {num_bins} at n_fft {n_fft}")
        _check(hidden_size >= 2 and hidden_size % 2 == 0, "hidden_size", hidden_size, "even, >= 2")
        _check(num_layers >= 1, "num_layers", num_layers, ">= 1")
        _check(0 <= dropout < 1, "dropout", dropout, "in [0, 1)")
        _check(num_layers > 1 or dropout == 0, "dropout", dropout, "0 with one BLSTM layer")
        _check(condition_size >= 0, "condition_size", condition_size, ">= 0")
        self.sources = tuple(sources)
        self.num_channels = num_channels
        self.num_bins = num_bins
        self.max_bin = max_bin
        self.hidden_size = hidden_size
        self.condition_size = condition_size

        self.layer_enc = nn.ModuleDict()
        self.layer_lstm = nn.ModuleDict()
        self.layer_dec = nn.ModuleDict()
        self.mean_scale = nn.ParameterDict()
        mean_F = _statistic("input_mean", input_mean, 0.0, max_bin)
        scale_F = _statistic("input_scale", input_scale, 1.0, max_bin)
        for source in self.sources:
            encoder = nn.Sequential(
                nn.Linear(num_channels * max_bin, hidden_size, bias=False),
                nn.BatchNorm1d(hidden_size),
                nn.Tanh(),
            )
            decoder = nn.Sequential(
                nn.Linear(self.latent_size + condition_size, hidden_size, bias=False),
                nn.BatchNorm1d(hidden_size),
                nn.ReLU(),
                nn.Linear(hidden_size, num_channels * num_bins, bias=False),
                nn.BatchNorm1d(num_channels * num_bins),
            )
            self.layer_enc[source] = nn.ModuleDict({"enc": encoder})
            self.layer_lstm[source] = nn.LSTM(
                hidden_size,
                hidden_size // 2,
                num_layers=num_layers,
                dropout=dropout,
                bidirectional=True,
            )
            self.layer_dec[source] = nn.ModuleDict({"dec": decoder})
            self.mean_scale[f"input_mean_{source}"] = nn.Parameter(mean_F.clone())
            self.mean_scale[f"input_scale_{source}"] = nn.Parameter(scale_F.clone())
            self.mean_scale[f"output_mean_{source}"] = nn.Parameter(torch.ones(num_bins))
            self.mean_scale[f"output_scale_{source}"] = nn.Parameter(torch.ones(num_bins))

    @property
    def latent_size(self) -> int:
        """Number of features of the latents: encoder and BLSTM output of a source."""
        return 2 * self.hidden_size

    def forward(self, mixture_NBCF: Tensor, condition_NBE: Tensor | None = None) -> Separation:
        """Estimate the magnitude of each source.

        Parameters
        ----------
        mixture_NBCF : Tensor
            Magnitude of the mixture, float32 [frame, batch, channel, bin], >= 0.
        condition_NBE : Tensor, optional
            Extra features, float [frame, batch, condition_size]; needed when the separator was
            built with a `condition_size`, refused otherwise.

        Returns
        -------
        Separation
            Estimates and latents.

        Raises
        ------
        ValueError
            If a shape does not fit the separator.
        """
        self._check_input(mixture_NBCF, condition_NBE)
        cropped_NBCF = mixture_NBCF[..., : self.max_bin]
        encoded = [self._encode(source, cropped_NBCF) for source in self.sources]
        bridged_NBH = torch.stack(encoded).mean(0)  # bridge 1
        latents_SNBD = torch.stack(
            [
                torch.cat([own_NBH, self.layer_lstm[source](bridged_NBH)[0]], dim=-1)
                for source, own_NBH in zip(self.sources, encoded, strict=True)
            ]
        )
        shared_NBD = latents_SNBD.mean(0)  # bridge 2
        decoder_input = shared_NBD
        if condition_NBE is not None:
            decoder_input = torch.cat([shared_NBD, condition_NBE.to(shared_NBD.dtype)], dim=-1)
        masks_SNBCF = torch.stack([self._decode(name, decoder_input) for name in self.sources])
        return Separation(masks_SNBCF * mixture_NBCF, shared_NBD, latents_SNBD)

    def load_public_state(self, state: Mapping[str, Tensor]) -> None:
        """Load a state of the public implementation, strictly by name.

        Parameters
        ----------
        state : mapping of str to Tensor
            Its parameters and buffers. The windows of its transform are passed over.

        Raises
        ------
        ValueError
            If a name is missing or unknown, or a shape differs.
        """
        own = {name: value for name, value in state.items() if name not in PUBLIC_WINDOWS}
        try:
            self.load_state_dict(own)
        except RuntimeError as error:
            reason = str(error).split("\n\t", 2)[1].strip()
            raise ValueError(
                f"the state does not fit this X-UMX (sources {', '.join(self.sources)}): {reason}"
            ) from error

    def _encode(self, source: str, cropped_NBCF: Tensor) -> Tensor:
        mean_F = self.mean_scale[f"input_mean_{source}"]
        scale_F = self.mean_scale[f"input_scale_{source}"]
        input_NBX = ((cropped_NBCF + mean_F) * scale_F).flatten(-2)
        return _per_frame(self.layer_enc[source]["enc"], input_NBX)  # type: ignore[index]

    def _decode(self, source: str, latent_NBX: Tensor) -> Tensor:
        decoded_NBX = _per_frame(self.layer_dec[source]["dec"], latent_NBX)  # type: ignore[index]
        decoded_NBCF = decoded_NBX.unflatten(-1, (self.num_channels, self.num_bins))
        scale_F = self.mean_scale[f"output_scale_{source}"]
        mean_F = self.mean_scale[f"output_mean_{source}"]
        return torch.relu(decoded_NBCF * scale_F + mean_F)

    def _check_input(self, mixture_NBCF: Tensor, condition_NBE: Tensor | None) -> None:
        wanted = (self.num_channels, self.num_bins)
        if mixture_NBCF.ndim != 4 or tuple(mixture_NBCF.shape[2:]) != wanted:
            raise ValueError(
                f"the mixture has shape {tuple(mixture_NBCF.shape)}: the separator expects "
                f"(frames, batch, {wanted[0]} channels, {wanted[1]} bins)"
            )
        found = None if condition_NBE is None else tuple(condition_NBE.shape)
        if found != (
            (*mixture_NBCF.shape[:2], self.condition_size) if self.condition_size else None
        ):
            raise ValueError(
                f"the condition has shape {found}: a separator of condition size "
                f"{self.condition_size} at {mixture_NBCF.shape[0]} frames x "
                f"{mixture_NBCF.shape[1]} expects "
                + ("(frames, batch, condition size)" if self.condition_size else "none")
            )


def count_bins(n_fft: int, sample_rate_hz: int, bandwidth_hz: float = 16000.0) -> int:
    """Count the bins from 0 Hz up to a bandwidth.

    Parameters
    ----------
    n_fft : int
        Length of the Fourier transform in samples.
    sample_rate_hz : int
        Sample rate in Hz.
    bandwidth_hz : float
        Highest frequency to keep, in Hz; X-UMX crops its input at 16 kHz.

    Returns
    -------
    int
        Number of bins, at most n_fft // 2 + 1.
    """
    return min(int(bandwidth_hz * n_fft / sample_rate_hz), n_fft // 2) + 1


def standardize_input(
    mean_F: ArrayLike, deviation_F: ArrayLike, max_bin: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Turn statistics of the mixture into what `XUMX` adds and multiplies.

    Deviations are floored at 1e-4 of their maximum, as in Open-Unmix: bins that are always
    silent stay finite.

    Parameters
    ----------
    mean_F, deviation_F : array_like
        Mean and standard deviation of the mixture's magnitude, float [bin].
    max_bin : int
        Number of bins that the encoders see.

    Returns
    -------
    input_mean, input_scale : ndarray
        float32 [max_bin].

    Raises
    ------
    ValueError
        If the deviations are all zero: the corpus is silent.
    """
    mean = np.asarray(mean_F, np.float64)[:max_bin]
    deviation = np.asarray(deviation_F, np.float64)[:max_bin]
    if not deviation.max() > 0:
        raise ValueError("the mixtures' standard deviation is 0 in every bin: the corpus is silent")
    scale = 1 / np.maximum(deviation, 1e-4 * deviation.max())
    return (-mean).astype(np.float32), scale.astype(np.float32)


def analyse(waveform_BCT: Tensor, n_fft: int, hop: int) -> Tensor:
    """Transform waveforms: periodic Hann window, centred, reflect-padded, not normalised.

    Parameters
    ----------
    waveform_BCT : Tensor
        float32 [..., batch, channel, sample].
    n_fft, hop : int
        Length of the transform and distance between frames, in samples.

    Returns
    -------
    Tensor
        complex64 [..., frame, batch, channel, bin], with 1 + samples // hop frames.

    Raises
    ------
    ValueError
        If the waveform is too short to be reflected.
    """
    num_samples = waveform_BCT.shape[-1]
    if num_samples <= n_fft // 2:
        raise ValueError(
            f"a waveform of {num_samples} samples is too short for n_fft {n_fft}: "
            f"it needs more than {n_fft // 2} samples; pad it"
        )
    window_T = torch.hann_window(n_fft, dtype=waveform_BCT.dtype, device=waveform_BCT.device)
    spectrum_XFN = torch.stft(
        waveform_BCT.reshape(-1, num_samples),
        n_fft,
        hop_length=hop,
        window=window_T,
        center=True,
        pad_mode="reflect",
        normalized=False,
        onesided=True,
        return_complex=True,
    )
    spectrum_BCFN: Tensor = spectrum_XFN.unflatten(0, waveform_BCT.shape[:-1])
    return spectrum_BCFN.movedim(-1, -4)


def synthesise(spectrum_NBCF: Tensor, hop: int, num_samples: int | None = None) -> Tensor:
    """Invert `analyse`.

    Parameters
    ----------
    spectrum_NBCF : Tensor
        complex64 [..., frame, batch, channel, bin].
    hop : int
        Distance between frames in samples.
    num_samples : int, optional
        Length of the result; hop times (frames - 1) when not given.

    Returns
    -------
    Tensor
        float32 [..., batch, channel, sample].
    """
    spectrum_BCFN = spectrum_NBCF.movedim(-4, -1)
    n_fft = 2 * (spectrum_BCFN.shape[-2] - 1)
    window_T = torch.hann_window(n_fft, dtype=spectrum_NBCF.real.dtype, device=spectrum_NBCF.device)
    waveform_XT = torch.istft(
        spectrum_BCFN.flatten(0, -3),
        n_fft,
        hop_length=hop,
        window=window_T,
        center=True,
        normalized=False,
        onesided=True,
        length=num_samples,
    )
    waveform_BCT: Tensor = waveform_XT.unflatten(0, spectrum_BCFN.shape[:-2])
    return waveform_BCT


def time_signals(
    estimates_SNBCF: Tensor, mixture_NBCF: Tensor, hop: int, num_samples: int | None = None
) -> Tensor:
    """Give magnitudes the mixture's phase and transform them back.

    Parameters
    ----------
    estimates_SNBCF : Tensor
        Magnitudes, float32 [source, frame, batch, channel, bin].
    mixture_NBCF : Tensor
        Spectrum of the mixture, complex64 [frame, batch, channel, bin].
    hop, num_samples : int
        As for `synthesise`.

    Returns
    -------
    Tensor
        Waveforms, float32 [source, batch, channel, sample].
    """
    magnitude_NBCF = mixture_NBCF.abs()
    phase_NBCF = mixture_NBCF / magnitude_NBCF.clamp_min(torch.finfo(magnitude_NBCF.dtype).tiny)
    return synthesise(estimates_SNBCF * phase_NBCF, hop, num_samples)


def _per_frame(layer: nn.Module, input_NBX: Tensor) -> Tensor:
    output_NBX: Tensor = layer(input_NBX.flatten(0, 1)).unflatten(0, input_NBX.shape[:2])
    return output_NBX


def _statistic(name: str, value: ArrayLike | None, default: float, max_bin: int) -> Tensor:
    if value is None:
        return torch.full((max_bin,), default)
    statistic_F = torch.from_numpy(np.array(value, np.float32))
    if statistic_F.shape != (max_bin,) or not statistic_F.isfinite().all():
        raise ValueError(
            f"{name} has shape {tuple(statistic_F.shape)}: "
            f"the separator expects {max_bin} finite values, one for each input bin"
        )
    return statistic_F


def _check(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}: expected {expected}")


def _check_sources(sources: tuple[str, ...]) -> None:
    _check(len(sources) >= 2, "sources", sources, "two or more names")
    _check(len(set(sources)) == len(sources), "sources", sources, "names that differ")
    for source in sources:
        # A source names a submodule: torch refuses dots, blanks and its own attributes.
        taken = "." in source or not source or hasattr(nn.ModuleDict(), source)
        _check(not taken, "a source's name", repr(source), "a word without dots; rename the source")
