"""What can be wrong with stored data."""


class CacheError(Exception):
    """Stored data cannot be used; the message names the file and the remedy."""


class MissingDataError(CacheError):
    """A folder, an index or a shard is not where it should be."""


class DamagedDataError(CacheError):
    """A file is truncated, altered, or not laid out as the format prescribes."""


class FormatVersionError(CacheError):
    """A file was written in a format that this version does not read."""


class MismatchError(CacheError):
    """Two things that should belong together do not: another configuration, other shards."""
