"""The shard format: version, names, dtypes and axes of every dataset.

``docs/reference/shard-format.md`` is the normative text; this module is its only
implementation, used by the writer, the reader and the verifier alike.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

FORMAT_NAME = "flsep-shard"
FORMAT_VERSION = 1
INDEX_NAME = "index.json"
MIXTURE = "mixture"
SPLITS = ("train", "valid", "test")
SILENCE_DB = -60.0
"""Teacher windows below this RMS (dBFS) count as silent and enter no statistics."""

STFT_DTYPES = ("float16", "float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What the data in a folder of shards is: all that a reader has to know of it.

    Attributes
    ----------
    sample_rate_hz, num_channels : int
        Of the audio and its spectra.
    n_fft, hop_samples : int
        Of the STFT (periodic Hann, centred, reflect-padded, not normalised).
    stft_dtype : {"float16", "float32"}
        Of the stored real and imaginary parts.
    sources : tuple of str
        Names of the sources; signal 0 is the mixture, signal ``1 + i`` is ``sources[i]``.
    teacher : str
        Handle of the teacher, as the user gave it.
    teacher_digest : str
        SHA-256 of the teacher's files.
    embedding_size : int
        Dimensions of an embedding.
    window_seconds, window_hop_seconds : float
        Length of a teacher window, and the distance between two of them.
    """

    sample_rate_hz: int
    num_channels: int
    n_fft: int
    hop_samples: int
    stft_dtype: str
    sources: tuple[str, ...]
    teacher: str
    teacher_digest: str
    embedding_size: int
    window_seconds: float
    window_hop_seconds: float

    def __post_init__(self) -> None:
        if self.stft_dtype not in STFT_DTYPES:
            raise ValueError(f"stft_dtype is {self.stft_dtype!r}; expected one of {STFT_DTYPES}")
        if len(set(self.sources)) != len(self.sources) or MIXTURE in self.sources:
            raise ValueError(f"sources must be distinct and not named {MIXTURE!r}: {self.sources}")
        if not self.sources:
            raise ValueError("there must be at least one source")
        positive = ("sample_rate_hz", "num_channels", "n_fft", "hop_samples", "embedding_size")
        for name in (*positive, "window_seconds", "window_hop_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")

    @property
    def signals(self) -> tuple[str, ...]:
        """The mixture, then the sources."""
        return (MIXTURE, *self.sources)

    @property
    def num_bins(self) -> int:
        """Frequency bins of a spectrum."""
        return self.n_fft // 2 + 1

    def num_frames(self, num_samples: int) -> int:
        """Frames of the centred STFT of `num_samples` samples."""
        return 1 + num_samples // self.hop_samples

    def window_frames(self, window: int) -> tuple[int, int]:
        """First and one-past-last STFT frame whose centre lies in a teacher window.

        Frame ``n`` is centred on ``n * hop_samples / sample_rate_hz`` seconds, window ``w``
        spans ``[w * window_hop_seconds, w * window_hop_seconds + window_seconds)``.
        """
        frames_a_second = self.sample_rate_hz / self.hop_samples
        start = window * self.window_hop_seconds
        # The tolerance keeps a boundary that falls on a frame from moving with rounding errors.
        first = math.ceil(start * frames_a_second - 1e-6)
        last = math.ceil((start + self.window_seconds) * frames_a_second - 1e-6)
        return first, last

    def to_json(self) -> dict[str, Any]:
        """Return the layout as plain JSON values."""
        return {**asdict(self), "sources": list(self.sources)}

    def identity(self) -> dict[str, Any]:
        """Return what makes data comparable: all but the address that the teacher came from."""
        return {name: value for name, value in self.to_json().items() if name != "teacher"}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Layout":
        """Rebuild a layout; raises ValueError when fields are missing or of another kind."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(f"layout has the fields {sorted(values)}; expected {sorted(names)}")
        for field in fields(cls):
            if field.type in (int, float, str) and not isinstance(values[field.name], field.type):
                raise ValueError(f"layout field {field.name} is {values[field.name]!r}")
        if not all(isinstance(name, str) for name in values["sources"]):
            raise ValueError("layout field sources is no list of names")
        return cls(**{**values, "sources": tuple(values["sources"])})


@dataclass(frozen=True, slots=True)
class Dataset:
    """One dataset of a track: its dtype and shape. Each entry of axis 0 has its own digest."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the stored array in bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


def track_datasets(
    layout: Layout, *, num_samples: int, num_windows: int, with_audio: bool
) -> dict[str, Dataset]:
    """Return every dataset of a track by name.

    ===================== ================= ===========================================
    name                  dtype             axes
    ===================== ================= ===========================================
    ``stft``              float16 / float32 [signal, frame, channel, bin, 2]
    ``embedding``         float32           [signal, window, dim]
    ``activity``          float32           [signal, window], dBFS
    ``magnitude_moments`` float64           [2, bin]: sum and sum of squares over frames of
                                            the mixture's magnitude, mean of the channels
    ``embedding_moments`` float64           [signal, 2, dim]: the same over the windows that
                                            are not silent
    ``audio``             int16             [signal, channel, sample]; times ``scale``
    ===================== ================= ===========================================
    """
    signals, channels = len(layout.signals), layout.num_channels
    frames = layout.num_frames(num_samples)
    datasets = {
        "stft": Dataset(
            np.dtype(layout.stft_dtype).newbyteorder("<"),
            (signals, frames, channels, layout.num_bins, 2),
        ),
        "embedding": Dataset(np.dtype("<f4"), (signals, num_windows, layout.embedding_size)),
        "activity": Dataset(np.dtype("<f4"), (signals, num_windows)),
        "magnitude_moments": Dataset(np.dtype("<f8"), (2, layout.num_bins)),
        "embedding_moments": Dataset(np.dtype("<f8"), (signals, 2, layout.embedding_size)),
    }
    if with_audio:
        datasets["audio"] = Dataset(np.dtype("<i2"), (signals, channels, num_samples))
    return datasets


def canonical_json(value: Any) -> str:
    """Serialise JSON values so that equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(value: Any) -> str:
    """SHA-256 of JSON values, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def group_name(number: int) -> str:
    """Name of a track's HDF5 group; its own name is an attribute, never a path."""
    return f"track-{number:05d}"
