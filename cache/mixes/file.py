"""Files of rendered mixes: the recipe of each mix, and the teacher's embeddings of it.

``docs/reference/mixes-format.md`` is the normative text.
"""

import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from flsep.cache.errors import (
    DamagedDataError,
    FieldError,
    MissingDataError,
    NonFiniteDataError,
)
from flsep.cache.files import write_bytes
from flsep.cache.format import (
    Dataset,
    canonical_json,
    fingerprint,
    require_fields,
    require_positive,
    require_version,
)
from flsep.cache.hdf5 import is_hard_link, open_hdf5
from flsep.cache.shards.index import TrackRecord

FORMAT_NAME = "flsep-mixes"
FORMAT_VERSION = 1
EMBEDDING_DTYPES = ("float16", "float32")
MIXES_PER_FILE = 1024

COMMAND = "flsep-precompute mixes"
REMEDY = f"delete it and run {COMMAND} again"
Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class MixesConfig:
    """Configuration of rendered mixes: all that decides them, except the number of epochs.

    Attributes
    ----------
    shards : str
        Fingerprint of the shards' configuration, which includes the teacher.
    tracks : str
        `digest_tracks` of the mixed tracks.
    excerpts_per_track : int
        Number of mixes per track in an epoch.
    min_gain, max_gain, swap_probability : float
        See `flsep.cache.RandomMixes`.
    with_stems : bool
        Store embeddings of the scaled stems too.
    """

    shards: str
    tracks: str
    num_tracks: int
    split: str
    num_sources: int
    seed: int
    excerpt_seconds: float
    excerpts_per_track: int
    min_gain: float
    max_gain: float
    swap_probability: float
    with_stems: bool
    embedding_dtype: str
    num_windows: int
    embedding_size: int

    def __post_init__(self) -> None:
        if self.embedding_dtype not in EMBEDDING_DTYPES:
            raise FieldError(
                f"embedding_dtype is {self.embedding_dtype!r}; expected one of {EMBEDDING_DTYPES}"
            )
        counts = ("num_tracks", "num_sources", "excerpts_per_track")
        require_positive(self, *counts, "excerpt_seconds", "num_windows", "embedding_size")
        if not 0 <= self.min_gain <= self.max_gain < math.inf:
            raise FieldError(
                f"gains from {self.min_gain} to {self.max_gain}: expected 0 <= least <= most"
            )
        if not 0 <= self.swap_probability <= 1:
            raise FieldError(f"swap_probability is {self.swap_probability}; expected one in [0, 1]")
        if self.seed < 0:
            raise FieldError(f"seed is {self.seed}; expected 0 or more")

    @property
    def num_mixes(self) -> int:
        """Number of mixes in an epoch."""
        return self.num_tracks * self.excerpts_per_track

    def files_of_epoch(self, epoch: int) -> dict[str, range]:
        """Return the files of an epoch by name, with the indices of their mixes."""
        # The names say nothing of the number of epochs, so that epochs can be added later.
        return {
            f"epoch-{epoch:06d}-{first:07d}.h5": range(
                first, min(first + MIXES_PER_FILE, self.num_mixes)
            )
            for first in range(0, self.num_mixes, MIXES_PER_FILE)
        }

    def datasets(self, num_mixes: int) -> dict[str, Dataset]:
        """Return every dataset of a file by name.

        ============= ================= =============================================
        name          dtype             axes
        ============= ================= =============================================
        ``track``     uint32            [mix, source], position among the mixed tracks
        ``frame``     uint32            [mix, source], first frame of the excerpt
        ``gain``      float32           [mix, source]
        ``swap``      uint8             [mix, source], 1 where channels are reversed
        ``embedding`` float16 / float32 [mix, signal, window, dim]
        ``activity``  float32           [mix, signal, window], dBFS
        ============= ================= =============================================

        The signals are the mixture, then, with `with_stems`, the scaled sources.
        """
        recipe = (num_mixes, self.num_sources)
        heard = (num_mixes, 1 + self.num_sources * self.with_stems, self.num_windows)
        kinds: dict[str, tuple[Any, tuple[int, ...]]] = {
            "track": ("<u4", recipe),
            "frame": ("<u4", recipe),
            "gain": ("<f4", recipe),
            "swap": ("u1", recipe),
            "embedding": (
                np.dtype(self.embedding_dtype).newbyteorder("<"),
                (*heard, self.embedding_size),
            ),
            "activity": ("<f4", heard),
        }
        return {name: Dataset(np.dtype(kind), shape) for name, (kind, shape) in kinds.items()}

    def num_bytes(self, num_mixes: int) -> int:
        """Return the size of the datasets of some mixes."""
        return sum(dataset.num_bytes for dataset in self.datasets(num_mixes).values())

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "MixesConfig":
        """Rebuild a configuration; raises FieldError for missing fields and for other types."""
        require_fields(cls, values)
        return cls(**values)


def digest_tracks(tracks: Sequence[TrackRecord]) -> str:
    """Return a digest of the names, the order and the content of tracks."""
    # Recipes refer to tracks by position, so the order counts.
    return fingerprint([[track.name, track.digest] for track in tracks])


def write_mixes(
    path: Path,
    config: MixesConfig,
    epoch: int,
    arrays: Mapping[str, npt.NDArray[Any]],
    packages: dict[str, str],
) -> None:
    """Write one file of mixes atomically; `arrays` are those of `MixesConfig.datasets`.

    Raises NonFiniteDataError for NaN, infinity, and values too large for their dtype.
    """
    data: Arrays = {}
    for name, dataset in config.datasets(len(arrays["track"])).items():
        with np.errstate(over="ignore"):  # too large for float16: infinity, refused below
            data[name] = np.ascontiguousarray(arrays[name], dataset.dtype)
        if data[name].shape != dataset.shape:
            raise ValueError(f"{name} is {data[name].shape}; expected {dataset.shape}")
        if dataset.dtype.kind == "f" and not np.isfinite(data[name]).all():
            raise NonFiniteDataError(f"{name} would hold NaN or infinity as {dataset.dtype}")
    # HDF5 can crash when the disk is full, so it writes to memory, where a file has room: it holds
    # at most MIXES_PER_FILE mixes of a few kilobytes.
    access, creation = (h5py.h5p.create(k) for k in (h5py.h5p.FILE_ACCESS, h5py.h5p.FILE_CREATE))
    image = io.BytesIO()
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, image)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    creation.set_obj_track_times(False)  # the same content gives the same bytes
    with h5py.File(h5py.h5f.create(repr(image).encode(), fcpl=creation, fapl=access)) as file:
        file.attrs.update(
            {
                "format": FORMAT_NAME,
                "version": FORMAT_VERSION,
                "config": canonical_json(config.to_json()),
                "epoch": epoch,
                "packages": canonical_json(packages),
                "sha256": _digest(config, epoch, data),
            }
        )
        for name, array in data.items():
            file.create_dataset(name, data=array, track_times=False)
    write_bytes(path, image.getbuffer())


def _digest(config: MixesConfig, epoch: int, arrays: Arrays) -> str:
    digest = hashlib.sha256(canonical_json([config.to_json(), epoch]).encode())
    # The order is that of `MixesConfig.datasets`, in the writer and in the reader.
    for array in arrays.values():
        digest.update(array.data.cast("B"))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class MixesFile:
    """One file of mixes, read completely and checked; `arrays` as in `MixesConfig.datasets`."""

    config: MixesConfig
    epoch: int
    arrays: Arrays
    packages: dict[str, str]
    sha256: str
    num_bytes: int

    @classmethod
    def read(cls, path: Path) -> "MixesFile":
        """Read and check a file; raises CacheError if it is missing or not as the format says."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise MissingDataError(f"{path}: missing; run flsep-precompute mixes again") from None
        with open_hdf5(path, content=io.BytesIO(content), what="mixes", remedy=REMEDY) as file:
            return cls._read(file, path, len(content))

    @classmethod
    def _read(cls, file: h5py.File, path: Path, num_bytes: int) -> "MixesFile":
        def damaged(problem: str) -> DamagedDataError:
            return DamagedDataError(f"{path}: not readable as mixes ({problem}); {REMEDY}")

        # What is missing raises KeyError here, which `open_hdf5` turns into DamagedDataError.
        attributes = file.attrs
        if attributes["format"] != FORMAT_NAME:
            raise damaged(f"an HDF5 file, but not of the format {FORMAT_NAME}")
        require_version(path, int(attributes["version"]), FORMAT_VERSION, COMMAND)
        config = MixesConfig.from_json(json.loads(attributes["config"]))
        epoch, sha256 = int(attributes["epoch"]), str(attributes["sha256"])
        num_mixes = len(file["track"])
        expected = config.datasets(num_mixes)
        if set(file) != set(expected):
            raise damaged(f"holds {sorted(file)[:8]}; expected {sorted(expected)}")
        arrays = {}
        for name, dataset in expected.items():
            stored = file[name]
            # Links, external storage and virtual datasets can lead to other files.
            if not is_hard_link(file, name) or stored.external or stored.is_virtual:
                raise damaged(f"{name} is not stored in this file")
            if (stored.shape, stored.dtype) != (dataset.shape, dataset.dtype):
                raise damaged(f"{name} is {stored.dtype} {stored.shape}")
            # A few bytes can describe a huge dataset without data; it would fill the memory.
            if dataset.num_bytes > num_bytes:
                raise damaged(f"{name} is larger than the file")
            arrays[name] = stored[()]
        if _digest(config, epoch, arrays) != sha256:
            raise damaged("its content does not have the digest it states")
        packages = json.loads(attributes["packages"])
        return cls(config, epoch, arrays, packages, sha256, num_bytes)
