"""A folder of rendered mixes: its index, and its mixes as excerpts of shards."""

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from flsep.cache.draws import Draw, Grid, Heard
from flsep.cache.errors import CacheError, DamagedDataError, MismatchError, MissingDataError
from flsep.cache.files import write_json
from flsep.cache.format import fingerprint
from flsep.cache.index import TrackRecord
from flsep.cache.mixes_file import (
    FORMAT_NAME,
    FORMAT_VERSION,
    MIXES_PER_FILE,
    REMEDY,
    Arrays,
    MixesConfig,
    MixesFile,
    digest_tracks,
    require_version,
)
from flsep.cache.reader import Shards

INDEX_NAME = "mixes.json"

_FILES_IN_MEMORY = 4


def holds_mixes(folder: Path) -> bool:
    """Say whether a folder holds mixes, with their index or without, and not shards."""
    return (folder / INDEX_NAME).exists() or next(folder.glob("epoch-*.h5"), None) is not None


def write_mixes_index(folder: Path, config: MixesConfig, num_epochs: int) -> None:
    """Read all files of some epochs and write the index of them.

    Raises
    ------
    CacheError
        If a file is missing, damaged, or of another configuration.
    """
    files: dict[str, dict[str, Any]] = {}
    packages: dict[str, str] = {}
    for epoch in range(num_epochs):
        for name in config.files_of_epoch(epoch):
            file = MixesFile.read(folder / name)
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
    write_json(folder / INDEX_NAME, {**content, "sha256": fingerprint(content)})


class Mixes:
    """A folder of rendered mixes.

    Parameters
    ----------
    folder : path
        Where ``flsep-precompute mixes`` wrote.

    Attributes
    ----------
    config : MixesConfig
        What decided them.
    num_epochs : int
        How many epochs there are.
    packages : dict of str to str
        Versions of the packages that made them.
    num_bytes : dict of str to int
        Sizes of the files.
    digest : str
        Of all of it.

    Raises
    ------
    MissingDataError
        If the folder or its index does not exist.
    FormatVersionError
        If it is of another version of the format.
    DamagedDataError
        If it is no index, or was altered.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX_NAME
        if not self.folder.is_dir():
            raise MissingDataError(
                f"{folder}: no such folder; expected the output of flsep-precompute mixes"
            )
        if not path.is_file():
            raise MissingDataError(
                f"{path}: no index; flsep-precompute mixes writes it last, run it again to finish"
            )
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT_NAME:
                raise ValueError(f"format {content['format']!r}")
            require_version(path, content["version"])
            self.digest = content.pop("sha256")
            if self.digest != fingerprint(content):
                raise ValueError("altered, its digest does not hold")
            self.config = MixesConfig.from_json(content["config"])
            self.num_epochs: int = content["num_epochs"]
            self.packages: dict[str, str] = content["packages"]
            self.num_bytes: dict[str, int] = {k: v["bytes"] for k, v in content["files"].items()}
            self._digests = {name: file["sha256"] for name, file in content["files"].items()}
            names = [n for e in range(self.num_epochs) for n in self.config.files_of_epoch(e)]
            if names != list(self._digests) or not names:
                raise ValueError("does not list the files of its epochs")
        except CacheError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedDataError(
                f"{path}: not readable as an index of mixes ({error}); {REMEDY}"
            ) from error
        self._load = lru_cache(_FILES_IN_MEMORY)(self._read)

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
        """Refuse missing or truncated files, cheaply."""
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
        """Return the mixes as excerpts of the shards that they were rendered from.

        Raises
        ------
        MismatchError
            If they were rendered from other shards.
        """
        config = self.config
        if config.shards != shards.index.fingerprint:
            raise MismatchError(
                f"{self.folder}: rendered from shards of another configuration or with another "
                f"teacher than {shards.folder}; run flsep-precompute mixes {shards.folder} with "
                "a folder of its own"
            )
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
        """Return the arrays of one mix; epochs beyond the last begin again with the first."""
        number, place = divmod(index, MIXES_PER_FILE)
        arrays = self._load(epoch % self.num_epochs, number)
        return {name: array[place] for name, array in arrays.items()}


class RenderedMixes:
    """Rendered mixes as excerpts of shards; `Mixes.of` makes it."""

    def __init__(self, mixes: Mixes, grid: Grid, tracks: Sequence[TrackRecord]) -> None:
        self.mixes = mixes
        self._grid, self._tracks = grid, tracks

    def __len__(self) -> int:
        return self.mixes.config.num_mixes

    def draw(self, epoch: int, index: int) -> Draw:
        """Return one mix of an epoch, in 0, 1, ...; raises CacheError for damaged files."""
        mix = self.mixes.mix(epoch, index)
        places = []
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
            Heard(mix["embedding"].astype(np.float32), mix["activity"]),
        )
