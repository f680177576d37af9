"""Read shards again and compare every byte with its digest."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flsep.cache.errors import CacheError, MismatchError
from flsep.cache.index import read_index
from flsep.cache.reader import ShardFile


@dataclass(frozen=True, slots=True)
class ShardVerdict:
    """Result for one shard; `problem` is None when all is well."""

    name: str
    num_bytes: int
    problem: str | None


def verify_shards(folder: Path) -> Iterator[ShardVerdict]:
    """Check every shard that the index of `folder` lists, one verdict at a time.

    Raises
    ------
    CacheError
        If the index itself cannot be used.
    """
    index = read_index(folder)
    digests = {(track.shard, track.position): track.digest for track in index.tracks}
    for name, num_bytes in index.shard_bytes.items():
        try:
            shard = ShardFile(folder / name)
            stored = {(name, i): track.digest for i, track in enumerate(shard.tracks)}
            listed = {key: value for key, value in digests.items() if key[0] == name}
            if shard.fingerprint != index.fingerprint or stored != listed:
                raise MismatchError(
                    f"{shard.path}: not the shard that the index lists; "
                    "run flsep-precompute again to renew the index"
                )
            verify_shard(shard)
        except CacheError as error:
            yield ShardVerdict(name, num_bytes, str(error))
        else:
            yield ShardVerdict(name, num_bytes, None)


def verify_shard(shard: ShardFile) -> None:
    """Compare every entry of every dataset with its digest; raises DamagedDataError."""
    for position, track in enumerate(shard.tracks):
        for name, stored in track.datasets.items():
            for entry in range(stored.dataset.shape[0]):
                shard.read(position, name, entry, verify=True)
