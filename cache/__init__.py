"""HDF5 shards of precomputed features: the contract between pipeline and trainer."""

from flsep.cache.draws import Draw, Grid, Heard, RandomMixes
from flsep.cache.errors import (
    CacheError,
    DamagedDataError,
    FlsepError,
    FormatVersionError,
    MismatchError,
    MissingDataError,
)
from flsep.cache.files import remove_leftovers, sync_folder, write_json
from flsep.cache.format import MIXTURE, SILENCE_DB, SPLITS, Layout
from flsep.cache.index import Index, Statistics, TrackRecord, read_index
from flsep.cache.indexing import build_index, write_index
from flsep.cache.mixes_file import MixesConfig, MixesFile, write_mixes
from flsep.cache.mixes_folder import Mixes, RenderedMixes, write_mixes_index
from flsep.cache.reader import ShardFile, Shards
from flsep.cache.track_writer import TrackPlan
from flsep.cache.verify import ShardVerdict, verify_mixes, verify_shard, verify_shards
from flsep.cache.writer import ShardWriter

__all__ = [
    "MIXTURE",
    "SILENCE_DB",
    "SPLITS",
    "CacheError",
    "DamagedDataError",
    "Draw",
    "FlsepError",
    "FormatVersionError",
    "Grid",
    "Heard",
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
    "verify_mixes",
    "verify_shard",
    "verify_shards",
    "write_index",
    "write_json",
    "write_mixes",
    "write_mixes_index",
]
