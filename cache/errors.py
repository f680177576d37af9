"""Expected failures: bad input, a damaged file, a machine that lacks something."""


class FlsepError(ValueError):
    """An expected failure, which the commands report in one line.

    The message says what was found, what was expected, where, and what to do about it. Any other
    exception except an `OSError` is a bug in flsep.
    """


class FieldError(FlsepError):
    """A field of a layout or configuration is missing, of another type, or out of range."""


class NonFiniteDataError(FlsepError):
    """Data to be stored contains NaN or infinity."""


class CacheError(FlsepError):
    """Stored data cannot be used."""


class MissingDataError(CacheError):
    """A folder, an index or a file of stored data does not exist."""


class DamagedDataError(CacheError):
    """A file is truncated, altered, or not laid out as its format prescribes."""


class FormatVersionError(CacheError):
    """A file has a format version that this flsep does not read."""


class MismatchError(CacheError):
    """Two pieces of data do not belong together, such as shards of different configurations."""
