"""Read all files of a folder again and compare every byte with its digest."""

import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flsep.cache.errors import CacheError, DamagedDataError, MismatchError
from flsep.cache.mixes.folder import Mixes
from flsep.cache.shards.file import ShardFile
from flsep.cache.shards.index import read_index

# HDF5 can crash on a manipulated file, so a child process opens each file first. It answers with a
# line for each path, whatever the file holds: only a crash leaves a path without an answer.
_OPEN_EACH = """
import json, sys
from pathlib import Path
from flsep.cache import CacheError, MixesFile, ShardFile
for line in sys.stdin:
    for open_file in (ShardFile, MixesFile.read):
        try:
            open_file(Path(json.loads(line)))
        except CacheError:
            pass
    print("alive", flush=True)
"""


@dataclass(frozen=True, slots=True)
class FileVerdict:
    """Result of checking one file; `problem` is None for an intact file."""

    name: str
    num_bytes: int
    problem: str | None


def verify_shards(folder: Path) -> Iterator[FileVerdict]:
    """Check every shard that the index of `folder` lists, one verdict at a time.

    Raises CacheError if the index itself cannot be used.
    """
    index = read_index(folder)
    listed: defaultdict[str, dict[int, str]] = defaultdict(dict)
    for track in index.tracks:
        listed[track.shard][track.position] = track.digest
    with _TrialProcess() as trial:
        for name, num_bytes in index.shard_bytes.items():
            try:
                trial.open(folder / name)
                shard = ShardFile(folder / name)
                # The index must list these tracks and no others, in these places.
                stored = {place: track.digest for place, track in enumerate(shard.tracks)}
                if shard.fingerprint != index.fingerprint or stored != listed[name]:
                    raise MismatchError(
                        f"{shard.path}: not the shard that the index lists; "
                        "run flsep-precompute again to renew the index"
                    )
                verify_shard(shard)
            except CacheError as error:
                yield FileVerdict(name, num_bytes, str(error))
            else:
                yield FileVerdict(name, num_bytes, None)


def verify_shard(shard: ShardFile) -> None:
    """Compare every entry of every dataset with its digest; raises DamagedDataError."""
    for position, track in enumerate(shard.tracks):
        for name, stored in track.datasets.items():
            for entry in range(stored.dataset.shape[0]):
                shard.read(position, name, entry, verify=True)


def verify_mixes(mixes: Mixes) -> Iterator[FileVerdict]:
    """Check every file of a folder of mixes, one verdict at a time."""
    with _TrialProcess() as trial:
        for name, num_bytes in mixes.num_bytes.items():
            try:
                trial.open(mixes.folder / name)
                mixes.read_file(name)
            except CacheError as error:
                yield FileVerdict(name, num_bytes, str(error))
            else:
                yield FileVerdict(name, num_bytes, None)


class _TrialProcess:
    """A child process that opens one file after another, and is replaced when one kills it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_TrialProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._process is not None:
            self._process.communicate()  # closes its input, which ends it, and reaps it
            self._process = None

    def open(self, path: Path) -> None:
        """Raise DamagedDataError if opening the file kills the process."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _OPEN_EACH], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(str(path.absolute())).encode() + b"\n")
        self._process.stdin.flush()
        if not self._process.stdout.readline():  # the end of its output: it died
            self.__exit__()
            raise DamagedDataError(
                f"{path}: HDF5 crashes on this file, it was altered; delete it and run "
                "flsep-precompute again"
            )
