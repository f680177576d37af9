"""Settings that decide what the shards hold."""

from dataclasses import asdict, dataclass
from typing import Any

from flsep.cache import SPLITS
from flsep.cache.format import STFT_DTYPES
from flsep.pipeline.errors import SettingsError

WORKER_BYTES = 9 << 28
"""Memory of a worker with VGGish, whatever the length of its tracks: 1.5 GiB measured, and room for
more channels and sources. Dask gives no new task to a worker that uses 80 % of its limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """How audio becomes the arrays of a shard.

    Attributes
    ----------
    sample_rate_hz, num_channels : int
        Audio of another rate is resampled, and mono is copied to all channels. Files with any
        other number of channels are rejected.
    n_fft, hop_samples : int
        Window and hop of the STFT.
    stft_dtype : {"float16", "float32"}
        float16 keeps about 80 dB through the inverse transform, at half the size.
    audio_splits : tuple of str
        Splits whose audio is stored too, which evaluation needs.
    valid_fraction : float, optional
        Fraction of the training tracks to hold out for validation; None leaves it to the corpus.
    test_fraction : float
        Fraction to hold out for testing, for a corpus without test tracks.
    seed : int
        Draws the tracks that are held out.
    """

    sample_rate_hz: int = 44100
    num_channels: int = 2
    n_fft: int = 4096
    hop_samples: int = 1024
    stft_dtype: str = "float16"
    audio_splits: tuple[str, ...] = ("test",)
    valid_fraction: float | None = None
    test_fraction: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sample_rate_hz < 8000:
            raise SettingsError(f"--sample-rate {self.sample_rate_hz}: expected at least 8000 Hz")
        if self.num_channels < 1:
            raise SettingsError(f"--channels {self.num_channels}: expected at least 1")
        if self.n_fft < 64 or self.n_fft % 2:
            raise SettingsError(f"--n-fft {self.n_fft}: expected an even number of at least 64")
        if not 1 <= self.hop_samples <= self.n_fft // 2:
            raise SettingsError(
                f"--hop {self.hop_samples}: expected 1 to {self.n_fft // 2}, half of --n-fft"
            )
        if self.stft_dtype not in STFT_DTYPES:
            raise SettingsError(f"--stft-dtype {self.stft_dtype}: expected one of {STFT_DTYPES}")
        if unknown := set(self.audio_splits) - set(SPLITS):
            raise SettingsError(f"--audio-splits {sorted(unknown)}: expected some of {SPLITS}")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return {**asdict(self), "audio_splits": list(self.audio_splits)}
