"""HDF5 shards of precomputed features: the contract between pipeline and trainer."""

from flsep.cache.errors import (
    CacheError,
    DamagedDataError,
    FormatVersionError,
    MismatchError,
    MissingDataError,
)
from flsep.cache.files import remove_leftovers, write_json
from flsep.cache.format import SPLITS, Layout
from flsep.cache.mixes.draws import Draw, Grid, RandomMixes
from flsep.cache.mixes.file import MixesConfig, MixesFile, write_mixes
from flsep.cache.mixes.folder import Mixes, RenderedMixes, write_mixes_index
from flsep.cache.shards.file import ShardFile
from flsep.cache.shards.index import Index, Statistics, TrackRecord, read_index
from flsep.cache.shards.indexing import build_index, write_index
from flsep.cache.shards.reader import Shards
from flsep.cache.shards.track_writer import TrackPlan
from flsep.cache.shards.writer import ShardWriter
from flsep.cache.verify import verify_mixes, verify_shard, verify_shards

__all__ = [
    "SPLITS",
    "CacheError",
    "DamagedDataError",
    "Draw",
    "FormatVersionError",
    "Grid",
    "Index",
    "Layout",
    "MismatchError",
    "MissingDataError",
    "Mixes",
    "MixesConfig",
    "MixesFile",
    "RandomMixes",
    "RenderedMixes",
    "ShardFile",
    "ShardWriter",
    "Shards",
    "Statistics",
    "TrackPlan",
    "TrackRecord",
    "build_index",
    "read_index",
    "remove_leftovers",
    "verify_mixes",
    "verify_shard",
    "verify_shards",
    "write_index",
    "write_json",
    "write_mixes",
    "write_mixes_index",
]
