"""X-UMX as it is usually written: a loop over sources, a loop over combinations. The peer."""

from itertools import combinations

import torch
from torch import Tensor, nn


class PlainXUMX(nn.Module):
    """One branch a source, each standardising its own copy; names of the public implementation."""

    def __init__(
        self,
        sources: tuple[str, ...],
        num_channels: int,
        num_bins: int,
        max_bin: int,
        hidden_size: int,
        num_layers: int = 3,
        dropout: float = 0.4,
    ) -> None:
        super().__init__()
        self.sources, self.max_bin = sources, max_bin
        self.num_channels, self.num_bins = num_channels, num_bins
        self.layer_enc, self.layer_lstm = nn.ModuleDict(), nn.ModuleDict()
        self.layer_dec, self.mean_scale = nn.ModuleDict(), nn.ParameterDict()
        for source in sources:
            encoder = nn.Sequential(
                nn.Linear(num_channels * max_bin, hidden_size, bias=False),
                nn.BatchNorm1d(hidden_size),
                nn.Tanh(),
            )
            decoder = nn.Sequential(
                nn.Linear(2 * hidden_size, hidden_size, bias=False),
                nn.BatchNorm1d(hidden_size),
                nn.ReLU(),
                nn.Linear(hidden_size, num_channels * num_bins, bias=False),
                nn.BatchNorm1d(num_channels * num_bins),
            )
            self.layer_enc[source] = nn.ModuleDict({"enc": encoder})
            self.layer_dec[source] = nn.ModuleDict({"dec": decoder})
            self.layer_lstm[source] = nn.LSTM(
                hidden_size,
                hidden_size // 2,
                num_layers=num_layers,
                dropout=dropout,
                bidirectional=True,
            )
            self.mean_scale[f"input_mean_{source}"] = nn.Parameter(torch.zeros(max_bin))
            self.mean_scale[f"input_scale_{source}"] = nn.Parameter(torch.ones(max_bin))
            self.mean_scale[f"output_mean_{source}"] = nn.Parameter(torch.ones(num_bins))
            self.mean_scale[f"output_scale_{source}"] = nn.Parameter(torch.ones(num_bins))

    def forward(self, mixture: Tensor) -> Tensor:
        """Estimate magnitudes [source, frame, batch, channel, bin] from one [frame, ...]."""
        frames, batch = mixture.shape[:2]
        cropped = mixture[..., : self.max_bin]
        encoded = []
        for name in self.sources:
            mean, scale = (self.mean_scale[f"input_{kind}_{name}"] for kind in ("mean", "scale"))
            flat = ((cropped + mean) * scale).reshape(frames * batch, -1)
            encoded.append(self.layer_enc[name]["enc"](flat).reshape(frames, batch, -1))
        bridged = sum(encoded) / len(encoded)
        latents = [
            torch.cat([own, self.layer_lstm[name](bridged)[0]], -1)
            for name, own in zip(self.sources, encoded, strict=True)
        ]
        shared = (sum(latents) / len(latents)).reshape(frames * batch, -1)
        estimates = []
        for name in self.sources:
            mean, scale = (self.mean_scale[f"output_{kind}_{name}"] for kind in ("mean", "scale"))
            decoded = self.layer_dec[name]["dec"](shared)
            mask = decoded.reshape(frames, batch, self.num_channels, self.num_bins) * scale + mean
            estimates.append(torch.relu(mask) * mixture)
        return torch.stack(estimates)


def plain_waveforms(spectrum: Tensor, hop: int) -> Tensor:
    """Transform [source, frame, batch, channel, bin] back, source by source."""
    n_fft = 2 * (spectrum.shape[-1] - 1)
    window = torch.hann_window(n_fft, device=spectrum.device)
    waves = []
    for source in spectrum:
        flat = source.permute(1, 2, 3, 0).flatten(0, 1)
        wave = torch.istft(flat, n_fft, hop, window=window, center=True)
        waves.append(wave.unflatten(0, source.shape[1:3]))
    return torch.stack(waves)


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


def plain_step(
    model: PlainXUMX, optimizer: torch.optim.Optimizer, stored: Tensor, hop: int
) -> float:
    """Train on stored spectra [signal, frame, batch, channel, bin, 2], mixture first."""
    spectra = torch.view_as_complex(stored.float())
    mixture, sources = spectra[0], spectra[1:]
    references = sources.abs()
    reference_waves = plain_waveforms(sources, hop)
    mixture_wave = plain_waveforms(mixture[None], hop)[0]
    estimates = model(mixture.abs())
    phase = torch.exp(1j * mixture.angle())
    waves = plain_waveforms(estimates * phase, hop)
    loss = plain_loss(estimates, references, waves, reference_waves, mixture_wave)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()
