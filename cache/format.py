"""The shard format: version, names, dtypes and axes of every dataset.

``docs/reference/shard-format.md`` is the normative text. Writer, reader and verifier all use this
implementation.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from flsep.cache.errors import FieldError, FormatVersionError

FORMAT_NAME = "flsep-shard"
FORMAT_VERSION = 1
INDEX_NAME = "index.json"
MIXTURE = "mixture"
SPLITS = ("train", "valid", "test")
SILENCE_DB = -60.0
"""Teacher windows with a lower RMS (dBFS) count as silent and are left out of statistics."""

STFT_DTYPES = ("float16", "float32")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Description of the data in a folder of shards: all that a reader has to know.

    Attributes
    ----------
    n_fft, hop_samples : int
        Window and hop of the STFT (periodic Hann, centred, reflect-padded, not normalised).
    stft_dtype : {"float16", "float32"}
        Type of the stored real and imaginary parts.
    sources : tuple of str
        Names of the sources. Signal 0 is the mixture, signal ``1 + i`` is ``sources[i]``.
    teacher, teacher_digest : str
        Handle of the teacher as the user gave it, and the SHA-256 of the teacher's files.
    window_seconds, window_hop_seconds : float
        Length of a teacher window, and the hop from one window to the next.
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
            raise FieldError(f"stft_dtype is {self.stft_dtype!r}; expected one of {STFT_DTYPES}")
        if len(set(self.sources)) != len(self.sources) or MIXTURE in self.sources:
            raise FieldError(f"sources must be distinct and not named {MIXTURE!r}: {self.sources}")
        if not self.sources:
            raise FieldError("there must be at least one source")
        counts = ("sample_rate_hz", "num_channels", "n_fft", "hop_samples", "embedding_size")
        require_positive(self, *counts, "window_seconds", "window_hop_seconds")

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals: the mixture, then the sources."""
        return (MIXTURE, *self.sources)

    @property
    def num_bins(self) -> int:
        """Frequency bins of a spectrum."""
        return self.n_fft // 2 + 1

    def num_frames(self, num_samples: int) -> int:
        """Return the number of frames of the centred STFT of `num_samples` samples."""
        return 1 + num_samples // self.hop_samples

    def window_frames(self, window: int) -> tuple[int, int]:
        """Return the first and one-past-last STFT frame whose centre lies in a teacher window.

        Frame ``n`` is centred on ``n * hop_samples / sample_rate_hz`` seconds. Window ``w`` spans
        ``[w * window_hop_seconds, w * window_hop_seconds + window_seconds)``.
        """
        frames_per_second = self.sample_rate_hz / self.hop_samples
        start = window * self.window_hop_seconds
        # The tolerance keeps a boundary that falls on a frame from moving with rounding errors.
        first = math.ceil(start * frames_per_second - 1e-6)
        last = math.ceil((start + self.window_seconds) * frames_per_second - 1e-6)
        return first, last

    def to_json(self) -> dict[str, Any]:
        """Return the layout as plain JSON values."""
        return {**asdict(self), "sources": list(self.sources)}

    def identity(self) -> dict[str, Any]:
        """Return what makes data comparable: all fields except where the teacher came from."""
        # The teacher's digest stays in: the same files may lie in another folder.
        return {name: value for name, value in self.to_json().items() if name != "teacher"}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Layout":
        """Rebuild a layout; raises FieldError for missing fields and for other types."""
        require_fields(cls, values)
        sources = values["sources"]
        if not isinstance(sources, list) or not all(isinstance(name, str) for name in sources):
            raise FieldError(f"Layout.sources is {sources!r}; expected a list of names")
        return cls(**{**values, "sources": tuple(sources)})


def require_fields(kind: type[Any], values: dict[str, Any]) -> None:
    """Raise FieldError unless JSON values have a dataclass's fields and their plain types."""
    # The types are classes: with `from __future__ import annotations` they would be strings, and no
    # value would be checked.
    types = {field.name: field.type for field in fields(kind)}
    if set(values) != set(types):
        raise FieldError(
            f"{kind.__name__} has the fields {sorted(values)}; expected {sorted(types)}"
        )
    for name, expected in types.items():
        # Containers are for the caller to check.
        plain = expected in (bool, int, float, str)
        if plain and not isinstance(values[name], expected):  # type: ignore[arg-type]
            raise FieldError(
                f"{kind.__name__}.{name} is {values[name]!r}; expected {expected.__name__}"  # type: ignore[union-attr]
            )


def require_positive(values: object, *names: str) -> None:
    """Raise FieldError unless the named attributes are positive and finite."""
    for name in names:
        value = getattr(values, name)
        if not 0 < value < math.inf:  # false for NaN too
            raise FieldError(f"{name} is {value}; expected a positive number")


def require_version(path: Path, found: object, expected: int, command: str) -> None:
    """Raise FormatVersionError unless a file has the version that this flsep reads."""
    if found != expected:
        raise FormatVersionError(
            f"{path}: format version {found}, this flsep reads {expected}; use the flsep that "
            f"wrote it, or run {command} again into a new folder"
        )


@dataclass(frozen=True, slots=True)
class Dataset:
    """Type and shape of one dataset of a track; each entry of axis 0 has its own digest."""

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
    # Axis 0 is outermost, so that a signal is contiguous and can be mapped and hashed alone. All
    # numbers are little-endian, whatever the machine that writes them.
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
    """Return the SHA-256 of JSON values in canonical form, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def group_name(number: int) -> str:
    """Return the name of a track's HDF5 group; the track's own name is never a path."""
    return f"track-{number:05d}"
