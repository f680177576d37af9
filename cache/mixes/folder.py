"""A folder of rendered mixes: its index, and its mixes as excerpts of shards."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from flsep.cache.errors import DamagedDataError, FieldError, MismatchError, MissingDataError
from flsep.cache.mixes.draws import Draw, Grid, MixEmbedding
from flsep.cache.mixes.file import (
    COMMAND,
    FORMAT_NAME,
    FORMAT_VERSION,
    MIXES_PER_FILE,
    REMEDY,
    Arrays,
    MixesConfig,
    MixesFile,
    digest_tracks,
)
from flsep.cache.sealed import read_sealed, write_sealed
from flsep.cache.shards.index import TrackRecord
from flsep.cache.shards.reader import Shards

INDEX_NAME = "mixes.json"

_FILES_IN_MEMORY = 4


def holds_mixes(folder: Path) -> bool:
    """Return whether a folder holds mixes, finished or not, rather than shards."""
    return (folder / INDEX_NAME).exists() or next(folder.glob("epoch-*.h5"), None) is not None


def write_mixes_index(folder: Path, config: MixesConfig, num_epochs: int) -> None:
    """Read all files of the first epochs and write their index; raises CacheError for bad files."""
    files: dict[str, dict[str, Any]] = {}
    packages: dict[str, str] = {}
    for epoch in range(num_epochs):
        for name in config.files_of_epoch(epoch):
            file = MixesFile.read(folder / name)
            # A file of an earlier run may lie here under the same name.
            if (file.config, file.epoch) != (config, epoch):
                raise MismatchError(f"{folder / name}: made with another configuration; {REMEDY}")
            files[name] = {"bytes": file.num_bytes, "sha256": file.sha256}
            packages = packages or file.packages
    content = {
        "format": FORMAT_NAME,
        "version": FORMAT_VERSION,
        "config": config.to_json(),
        "packages": packages,
        "num_epochs": num_epochs,
        "files": files,
    }
    write_sealed(folder / INDEX_NAME, content)


class Mixes:
    """A folder of rendered mixes with its index.

    The constructor raises CacheError as `flsep.cache.sealed.read_sealed` does.

    Attributes
    ----------
    num_bytes : dict of str to int
        Sizes of the files by name.
    digest : str
        Digest of the index, and so of all mixes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX_NAME
        content = read_sealed(
            path, format_name=FORMAT_NAME, version=FORMAT_VERSION, command=COMMAND
        )
        try:
            self._parse(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedDataError(
                f"{path}: not readable as an index ({error}); run {COMMAND} again to renew it"
            ) from error
        # A cache for each object: a decorated method would share one, and keep all objects alive.
        self._load = lru_cache(_FILES_IN_MEMORY)(self._read)

    def _parse(self, content: dict[str, Any]) -> None:
        self.digest: str = content["sha256"]
        self.config = MixesConfig.from_json(content["config"])
        self.num_epochs: int = content["num_epochs"]
        self.packages: dict[str, str] = content["packages"]
        self.num_bytes: dict[str, int] = {k: v["bytes"] for k, v in content["files"].items()}
        self._digests = {name: file["sha256"] for name, file in content["files"].items()}
        names = [n for e in range(self.num_epochs) for n in self.config.files_of_epoch(e)]
        if names != list(self._digests) or not names:
            raise FieldError("does not list the files of its epochs")

    def _read(self, epoch: int, number: int) -> Arrays:
        name = list(self.config.files_of_epoch(epoch))[number]
        return self.read_file(name).arrays

    def read_file(self, name: str) -> MixesFile:
        """Read a file; raises CacheError unless it is the one that the index lists."""
        file = MixesFile.read(self.folder / name)
        if file.sha256 != self._digests[name]:
            raise MismatchError(
                f"{self.folder / name}: not the file that the index lists; run flsep-precompute "
                "mixes again to renew the index"
            )
        return file

    def check_files(self) -> None:
        """Raise CacheError if files are missing or have another size than the index says."""
        for name, expected in self.num_bytes.items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found is None:
                raise MissingDataError(f"{path}: missing; run flsep-precompute mixes again")
            if found != expected:
                raise DamagedDataError(
                    f"{path}: {found} bytes, the index says {expected}; {REMEDY}"
                )

    def of(self, shards: Shards) -> "RenderedMixes":
        """Return the mixes as excerpts of their shards; raises MismatchError for other shards."""
        config = self.config
        if config.shards != shards.index.fingerprint:
            raise MismatchError(
                f"{self.folder}: rendered from shards of another configuration or with another "
                f"teacher than {shards.folder}; run flsep-precompute mixes {shards.folder} with "
                "a folder of its own"
            )
        # Recipes hold positions among the tracks that can hold an excerpt, so list them as the
        # pipeline did, and compare their digest.
        grid = Grid(shards.layout, config.excerpt_seconds)
        tracks, _ = grid.split_by_length(shards, config.split)
        if config.tracks != digest_tracks(tracks):
            raise MismatchError(
                f"{self.folder}: rendered from {config.num_tracks} tracks that are not the "
                f"{len(tracks)} of the split {config.split!r} of {shards.folder} now; run "
                "flsep-precompute mixes again with a folder of its own"
            )
        return RenderedMixes(self, grid, tracks)

    def mix(self, epoch: int, index: int) -> Arrays:
        """Return the arrays of one mix; after the last epoch the first one follows again."""
        number, place = divmod(index, MIXES_PER_FILE)
        arrays = self._load(epoch % self.num_epochs, number)
        return {name: array[place] for name, array in arrays.items()}


class RenderedMixes:
    """Rendered mixes as excerpts of the shards that they were rendered from, see `Mixes.of`."""

    def __init__(self, mixes: Mixes, grid: Grid, tracks: Sequence[TrackRecord]) -> None:
        self.mixes = mixes
        self._grid, self._tracks = grid, tracks

    def __len__(self) -> int:
        return self.mixes.config.num_mixes

    def draw(self, epoch: int, index: int) -> Draw:
        """Return one mix of an epoch; raises CacheError for damaged files."""
        mix = self.mixes.mix(epoch, index)
        places = []
        # A file can be intact and still hold a recipe that these shards cannot follow.
        for number, frame in zip(mix["track"].tolist(), mix["frame"].tolist(), strict=True):
            window = self._grid.last_start(frame)
            track = self._tracks[number] if number < len(self._tracks) else None
            if (
                track is None
                or window not in self._grid.starts(track)
                or self._grid.first_frame(window) != frame
            ):
                raise DamagedDataError(
                    f"{self.mixes.folder}: mix {index} of epoch {epoch} starts at frame {frame} of "
                    f"track {number}, where no excerpt starts; {REMEDY}"
                )
            places.append((track, window))
        return Draw(
            tuple(places),
            tuple(map(bool, mix["swap"])),
            tuple(mix["gain"].tolist()),
            MixEmbedding(mix["embedding"].astype(np.float32), mix["activity"]),
        )
