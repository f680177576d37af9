"""CrossNet-Open-Unmix (X-UMX).

Shape suffixes: S sources, B batch, C channels, N frames, F bins, D latent, E embedding dimensions;
H hidden units, X features of a layer, M rows: frames of all excerpts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from flsep.trainer.parallel import BatchNorm
from flsep.trainer.separators.interface import Separation

# Buffers of the public implementation's own transform; here the transform has no state.
PUBLIC_WINDOWS = ("encoder.0.window", "decoder.window")


class XUMX(nn.Module):
    """CrossNet-Open-Unmix for any number of sources and channels.

    Sawata et al., "All for one and one for all: improving music separation by bridging networks",
    ICASSP 2021. Encoders and decoders of all sources are computed together: their parameters are
    stacked over the sources, so that a layer is one product. `public_state` and
    `load_public_state` translate to the names of the public PyTorch implementation and back.

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

        def stack(num_inputs: int, num_outputs: int) -> nn.Parameter:
            layers = [nn.Linear(num_inputs, num_outputs, bias=False) for _ in sources]
            return nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))

        def repeat(vector_F: Tensor) -> nn.Parameter:
            return nn.Parameter(vector_F.repeat(len(sources), 1))

        self.input_mean_SF = repeat(_statistic("input_mean", input_mean, 0.0, max_bin))
        self.input_scale_SF = repeat(_statistic("input_scale", input_scale, 1.0, max_bin))
        self.encoder_SHX = stack(num_channels * max_bin, hidden_size)
        self.encoder_norm = BatchNorm(len(sources) * hidden_size)
        self.lstms = nn.ModuleList(
            nn.LSTM(
                hidden_size,
                hidden_size // 2,
                num_layers=num_layers,
                dropout=dropout,
                bidirectional=True,
            )
            for _ in sources
        )
        self.decoder_SHD = stack(self.latent_size + condition_size, hidden_size)
        self.decoder_norm = BatchNorm(len(sources) * hidden_size)
        self.output_SXH = stack(hidden_size, num_channels * num_bins)
        self.output_norm = BatchNorm(len(sources) * num_channels * num_bins)
        self.output_mean_SF = repeat(torch.ones(num_bins))
        self.output_scale_SF = repeat(torch.ones(num_bins))
        self._streams: list[torch.cuda.Stream] = []

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
        encoded_NBSH = self._encode(mixture_NBCF)
        recurrent_SNBH = self._recur(encoded_NBSH.mean(2))  # bridge 1
        latents_SNBD = torch.cat([encoded_NBSH.movedim(2, 0), recurrent_SNBH], dim=-1)
        shared_NBD = latents_SNBD.mean(0)  # bridge 2
        decoder_input = shared_NBD
        if condition_NBE is not None:
            decoder_input = torch.cat([shared_NBD, condition_NBE.to(shared_NBD.dtype)], dim=-1)
        masks_NBSCF = self._decode(decoder_input)
        estimates_NBSCF = masks_NBSCF * mixture_NBCF[:, :, None]
        return Separation(estimates_NBSCF.movedim(2, 0), shared_NBD, latents_SNBD)

    def compile_layers(self) -> None:
        """Let `torch.compile` fuse encoders and decoders; it cannot do the BLSTMs any better."""
        self._encode = torch.compile(self._encode)  # type: ignore[method-assign]
        self._decode = torch.compile(self._decode)  # type: ignore[method-assign]

    def _encode(self, mixture_NBCF: Tensor) -> Tensor:
        # Scale and shift go into the product, (x + m) s W = x (s W) + m (s W), so that all
        # sources share one input instead of each standardising its own copy.
        weight_SHCF = self.encoder_SHX.unflatten(-1, (self.num_channels, self.max_bin))
        weight_SHCF = weight_SHCF * self.input_scale_SF[:, None, None]
        shift_SH = torch.einsum("shcf,sf->sh", weight_SHCF, self.input_mean_SF)
        input_NBX = mixture_NBCF[..., : self.max_bin].flatten(-2)
        encoded_NBX = F.linear(input_NBX, weight_SHCF.flatten(0, 1).flatten(1), shift_SH.flatten())
        encoded_NBSH: Tensor = torch.tanh(self.encoder_norm(encoded_NBX)).unflatten(
            -1, shift_SH.shape
        )
        return encoded_NBSH

    def _recur(self, bridged_NBH: Tensor) -> Tensor:
        if not bridged_NBH.is_cuda:
            return torch.stack([lstm(bridged_NBH)[0] for lstm in self.lstms])
        # One BLSTM leaves most of a GPU idle; autograd runs each backward on its own stream too.
        if not self._streams:
            self._streams = [torch.cuda.Stream(bridged_NBH.device) for _ in self.lstms]
        current = torch.cuda.current_stream(bridged_NBH.device)
        outputs = []
        for lstm, stream in zip(self.lstms, self._streams, strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                outputs.append(lstm(bridged_NBH)[0])
        for output, stream in zip(outputs, self._streams, strict=True):
            current.wait_stream(stream)
            bridged_NBH.record_stream(stream)
            output.record_stream(current)
        return torch.stack(outputs)

    def _decode(self, latent_NBX: Tensor) -> Tensor:
        num_sources, size = len(self.sources), latent_NBX.shape[:2]
        hidden_NBX = self.decoder_norm(F.linear(latent_NBX, self.decoder_SHD.flatten(0, 1)))
        hidden_MSH = torch.relu(hidden_NBX).unflatten(-1, (num_sources, -1)).flatten(0, 1)
        output_SMX = torch.bmm(hidden_MSH.transpose(0, 1), self.output_SXH.mT)
        output_NBX = output_SMX.transpose(0, 1).flatten(1).unflatten(0, size)
        # Scale and shift go into batch norm's own, (g y + b) s + m = (g s) y + (b s + m).
        shape = (num_sources, self.num_channels, self.num_bins)
        scale_SCF, mean_SCF = self.output_scale_SF[:, None], self.output_mean_SF[:, None]
        gain_SCF = self.output_norm.weight.view(shape) * scale_SCF
        shift_SCF = self.output_norm.bias.view(shape) * scale_SCF + mean_SCF
        output_NBX = self.output_norm(output_NBX, gain_SCF.flatten(), shift_SCF.flatten())
        masks_NBSCF: Tensor = torch.relu(output_NBX).unflatten(-1, shape)
        return masks_NBSCF

    def public_state(self) -> dict[str, Tensor]:
        """Return the state under the names of the public implementation, source by source.

        The tensors are views of the separator's own, but for the counts of batches.
        """
        state: dict[str, Tensor] = {}
        num_sources = len(self.sources)
        for number, source in enumerate(self.sources):
            own = {
                f"layer_enc.{source}.enc.0.weight": self.encoder_SHX[number],
                f"layer_dec.{source}.dec.0.weight": self.decoder_SHD[number],
                f"layer_dec.{source}.dec.3.weight": self.output_SXH[number],
                f"mean_scale.input_mean_{source}": self.input_mean_SF[number],
                f"mean_scale.input_scale_{source}": self.input_scale_SF[number],
                f"mean_scale.output_mean_{source}": self.output_mean_SF[number],
                f"mean_scale.output_scale_{source}": self.output_scale_SF[number],
            }
            norms = {
                f"layer_enc.{source}.enc.1": self.encoder_norm,
                f"layer_dec.{source}.dec.1": self.decoder_norm,
                f"layer_dec.{source}.dec.4": self.output_norm,
            }
            for prefix, norm in norms.items():
                for name, value in norm.state_dict().items():
                    part = value.view(num_sources, -1)[number] if value.ndim else value.clone()
                    own[f"{prefix}.{name}"] = part
            for name, value in self.lstms[number].state_dict().items():
                own[f"layer_lstm.{source}.{name}"] = value
            state |= {name: value.detach() for name, value in own.items()}
        return state

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
        found = {name: tuple(value.shape) for name, value in state.items()}
        for name in PUBLIC_WINDOWS:
            found.pop(name, None)
        wanted = {name: tuple(value.shape) for name, value in self.public_state().items()}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"the state does not fit this X-UMX (sources {', '.join(self.sources)}): "
                    f"{name} has shape {found.get(name, 'none')}, "
                    f"expected {wanted.get(name, 'none')}"
                )
        for name, value in self.public_state().items():
            value.copy_(state[name])
        counted = state[f"layer_enc.{self.sources[0]}.enc.1.num_batches_tracked"]
        for norm in (self.encoder_norm, self.decoder_norm, self.output_norm):
            norm.num_batches_tracked.copy_(counted)

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
