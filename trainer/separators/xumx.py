"""CrossNet-Open-Unmix (X-UMX): its settings, its loss and its network.

Sawata et al., "All for one and one for all: improving music separation by bridging networks",
ICASSP 2021. X-UMX estimates magnitudes and takes the mixture's phase.

Shape suffixes: S sources, B batch, C channels, T samples, N frames, F bins, D latent, E condition;
H hidden units, X features of a layer, M rows: frames of all excerpts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from flsep.cache import Layout, Statistics
from flsep.trainer.config import SeparatorConfig
from flsep.trainer.errors import DataError
from flsep.trainer.parallel import BatchNorm
from flsep.trainer.separators.interface import Separation, SeparationLoss, Separator
from flsep.trainer.separators.losses import magnitude_loss, time_loss
from flsep.trainer.stft import synthesise

# Buffers of the public implementation's own transform; here the transform has no state.
PUBLIC_WINDOWS = ("encoder.0.window", "decoder.window")


@dataclass(frozen=True, kw_only=True, slots=True)
class XumxConfig(SeparatorConfig):
    """X-UMX.

    Attributes
    ----------
    hidden_size : int
        Width of encoders and decoders, even; the BLSTM has half of it in each direction.
    num_layers : int
        Number of layers of the BLSTM.
    dropout : float
        Dropout between the layers of the BLSTM, in [0, 1).
    bandwidth_hz : float
        The encoders see the mixture up to this frequency; the masks cover all of it.
    """

    name: Literal["xumx"] = field(default="xumx", init=False)
    hidden_size: int = 512
    num_layers: int = 3
    dropout: float = 0.4
    bandwidth_hz: float = 16000.0

    def __post_init__(self) -> None:
        self.check_types()
        even = self.hidden_size >= 2 and self.hidden_size % 2 == 0
        self.require("hidden_size", even, "an even number of at least 2")
        self.require("num_layers", self.num_layers >= 1, "1 or more")
        self.require("dropout", 0 <= self.dropout < 1, "in [0, 1)")
        self.require("dropout", self.num_layers > 1 or self.dropout == 0, "0 with one layer")
        self.require("bandwidth_hz", self.bandwidth_hz > 0, "> 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class MultiDomainLoss(SeparationLoss):
    """The loss of X-UMX: magnitude term + `time_weight` x time-domain term.

    Attributes
    ----------
    combine : bool
        Average over all combinations of sources instead of the single sources.
    time_weight : float
        Weight of the time-domain term, 0 or more.
    """

    combine: bool = True
    time_weight: float = 10.0

    def __post_init__(self) -> None:
        self.check_types()
        self.require("time_weight", self.time_weight >= 0, "0 or more")

    def __call__(
        self,
        separation: Separation,
        *,
        references_SNBCF: Tensor,
        references_SBCT: Tensor,
        mixture_BCT: Tensor,
        hop_samples: int,
    ) -> dict[str, Tensor]:
        """Return the unweighted terms `magnitude` and `time`, and the `total`."""
        assert isinstance(separation, XumxSeparation)
        magnitude = magnitude_loss(
            separation.magnitudes_SNBCF, references_SNBCF.abs(), self.combine
        )
        estimates_SBCT = synthesise(separation.estimates_SNBCF, hop_samples)
        time = time_loss(estimates_SBCT, references_SBCT, mixture_BCT, self.combine)
        return {"magnitude": magnitude, "time": time, "total": magnitude + self.time_weight * time}


@dataclass(frozen=True, kw_only=True)
class XumxSeparation(Separation):
    """The output of X-UMX, with the magnitudes that its loss compares: float32, >= 0."""

    magnitudes_SNBCF: Tensor


class XUMX(Separator):
    """CrossNet-Open-Unmix for any number of channels and two sources or more.

    The latent ``sources`` holds, for each source, the outputs of its encoder and of its BLSTM, both
    in (-1, 1). The latent ``shared`` is their mean over the sources, after bridge 2. Data of fewer
    sources, or of a silent corpus, raise DataError.
    """

    Config = XumxConfig
    Loss = MultiDomainLoss

    def __init__(
        self,
        config: SeparatorConfig,
        layout: Layout,
        *,
        statistics: Statistics | None = None,
        condition_size: int = 0,
    ) -> None:
        assert isinstance(config, XumxConfig)
        super().__init__(config, layout, statistics=statistics, condition_size=condition_size)
        sources = layout.sources
        if len(sources) < 2:
            raise DataError(
                f"X-UMX needs two sources or more; the data have {', '.join(sources)} alone"
            )
        hidden_size, num_channels, num_bins = (
            config.hidden_size,
            layout.num_channels,
            layout.num_bins,
        )
        max_bin = count_bins(layout.n_fft, layout.sample_rate_hz, config.bandwidth_hz)
        input_mean, input_scale = np.zeros(max_bin, np.float32), np.ones(max_bin, np.float32)
        if statistics is not None:
            input_mean, input_scale = standardize_input(
                statistics.magnitude_mean, statistics.magnitude_std, max_bin
            )
        self.sources = sources
        self.num_channels = num_channels
        self.num_bins = num_bins
        self.max_bin = max_bin
        self.condition_size = condition_size

        # Encoders and decoders of all sources are computed together: their parameters are stacked
        # over the sources, so that a layer is one product. Each source's weights are drawn as those
        # of a layer of its own.
        def stack(num_inputs: int, num_outputs: int) -> nn.Parameter:
            layers = [nn.Linear(num_inputs, num_outputs, bias=False) for _ in sources]
            return nn.Parameter(torch.stack([layer.weight.detach() for layer in layers]))

        def repeat(vector_F: Tensor) -> nn.Parameter:
            return nn.Parameter(vector_F.repeat(len(sources), 1))

        # The statistics are only the start: mean and scale are trained like all parameters.
        self.input_mean_SF = repeat(torch.from_numpy(input_mean))
        self.input_scale_SF = repeat(torch.from_numpy(input_scale))
        self.encoder_SHX = stack(num_channels * max_bin, hidden_size)
        self.encoder_norm = BatchNorm(len(sources) * hidden_size)
        self.lstms = nn.ModuleList(
            nn.LSTM(
                hidden_size,
                hidden_size // 2,
                num_layers=config.num_layers,
                dropout=config.dropout,
                bidirectional=True,
            )
            for _ in sources
        )
        self.decoder_SHD = stack(2 * hidden_size + condition_size, hidden_size)
        self.decoder_norm = BatchNorm(len(sources) * hidden_size)
        self.output_SXH = stack(hidden_size, num_channels * num_bins)
        self.output_norm = BatchNorm(len(sources) * num_channels * num_bins)
        self.output_mean_SF = repeat(torch.ones(num_bins))
        self.output_scale_SF = repeat(torch.ones(num_bins))
        self._streams: list[torch.cuda.Stream] = []

    @classmethod
    def latent_sizes(cls, config: SeparatorConfig) -> dict[str, int]:
        """Return the sizes of both latents: the outputs of an encoder and of a BLSTM."""
        assert isinstance(config, XumxConfig)
        return dict.fromkeys(("shared", "sources"), 2 * config.hidden_size)

    def describe(self) -> str:
        """Name the network and its sources."""
        return f"X-UMX for {', '.join(self.sources)}"

    def forward(self, mixture_NBCF: Tensor, condition_NBE: Tensor | None = None) -> XumxSeparation:
        """Separate a mixture, complex64 [frame, batch, channel, bin]; refuse other shapes."""
        self._check_input(mixture_NBCF, condition_NBE)
        magnitude_NBCF = mixture_NBCF.abs()
        encoded_NBSH = self._encode(magnitude_NBCF)
        recurrent_SNBH = self._recur(encoded_NBSH.mean(2))  # bridge 1
        latents_SNBD = torch.cat([encoded_NBSH.movedim(2, 0), recurrent_SNBH], dim=-1)
        shared_NBD = latents_SNBD.mean(0)  # bridge 2
        decoder_input = shared_NBD
        if condition_NBE is not None:
            decoder_input = torch.cat([shared_NBD, condition_NBE.to(shared_NBD.dtype)], dim=-1)
        masks_NBSCF = self._decode(decoder_input)
        magnitudes_SNBCF = (masks_NBSCF * magnitude_NBCF[:, :, None]).movedim(2, 0)
        return XumxSeparation(
            estimates_SNBCF=take_phase(magnitudes_SNBCF, mixture_NBCF),
            latents={"shared": shared_NBD, "sources": latents_SNBD},
            magnitudes_SNBCF=magnitudes_SNBCF,
        )

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
            # Memory used on two streams must not be reused before both are done with it.
            bridged_NBH.record_stream(stream)
            output.record_stream(current)
        return torch.stack(outputs)

    def _decode(self, latent_NBX: Tensor) -> Tensor:
        num_sources, size = len(self.sources), latent_NBX.shape[:2]
        # All sources share the input, so the first layer is one product for all of them.
        hidden_NBX = self.decoder_norm(F.linear(latent_NBX, self.decoder_SHD.flatten(0, 1)))
        hidden_MSH = torch.relu(hidden_NBX).unflatten(-1, (num_sources, -1)).flatten(0, 1)
        # In the second layer each source has an input of its own: a product for each source.
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
        """Return the state under the names of the public PyTorch implementation.

        The tensors are views of the separator's own, except for the counts of batches.
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
        """Load a state of the public implementation; ignore the windows of its transform.

        A name that is missing or unknown, or another shape, raises ValueError.
        """
        # Compare all names and shapes before the first copy: a wrong state changes nothing.
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
        # The counts are no views. One count of ours stands for those of all sources, which agree.
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


def take_phase(magnitudes_SNBCF: Tensor, mixture_NBCF: Tensor) -> Tensor:
    """Give magnitudes the phase of the mixture; where the mixture is 0, the result is 0."""
    magnitude_NBCF = mixture_NBCF.abs()
    phase_NBCF = mixture_NBCF / magnitude_NBCF.clamp_min(torch.finfo(magnitude_NBCF.dtype).tiny)
    # Real times complex, left to torch, takes twice as long.
    return magnitudes_SNBCF.to(phase_NBCF.dtype) * phase_NBCF


def count_bins(n_fft: int, sample_rate_hz: int, bandwidth_hz: float = 16000.0) -> int:
    """Count the bins from 0 Hz up to a bandwidth: at most n_fft // 2 + 1."""
    return min(int(bandwidth_hz * n_fft / sample_rate_hz), n_fft // 2) + 1


def standardize_input(
    mean_F: ArrayLike, deviation_F: ArrayLike, max_bin: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Turn mean and deviation, float [bin], into XUMX's shift and scale, float32 [max_bin]."""
    mean = np.asarray(mean_F, np.float64)[:max_bin]
    deviation = np.asarray(deviation_F, np.float64)[:max_bin]
    if not deviation.max() > 0:
        raise DataError("the mixtures' standard deviation is 0 in every bin: the corpus is silent")
    # The floor, as in Open-Unmix, keeps the scale of bins that are always silent finite.
    scale = 1 / np.maximum(deviation, 1e-4 * deviation.max())
    return (-mean).astype(np.float32), scale.astype(np.float32)
