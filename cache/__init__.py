"""HDF5 shards of precomputed features: the contract between pipeline and trainer."""

from flsep.cache.errors import (
    CacheError,
    DamagedDataError,
    FormatVersionError,
    MismatchError,
    MissingDataError,
)
from flsep.cache.format import MIXTURE, SILENCE_DB, SPLITS, Layout
from flsep.cache.index import Index, Statistics, TrackRecord, build_index, read_index, write_index
from flsep.cache.reader import ShardFile, Shards
from flsep.cache.verify import ShardVerdict, verify_shard, verify_shards
from flsep.cache.writer import ShardWriter, TrackPlan, remove_leftovers, sync_folder, write_json

__all__ = [
    "MIXTURE",
    "SILENCE_DB",
    "SPLITS",
    "CacheError",
    "DamagedDataError",
    "FormatVersionError",
    "Index",
    "Layout",
    "MismatchError",
    "MissingDataError",
    "ShardFile",
    "ShardVerdict",
    "ShardWriter",
    "Shards",
    "Statistics",
    "TrackPlan",
    "TrackRecord",
    "build_index",
    "read_index",
    "remove_leftovers",
    "sync_folder",
    "verify_shard",
    "verify_shards",
    "write_index",
    "write_json",
]
