"""Open HDF5 files that may be damaged."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import h5py

from flsep.cache.errors import CacheError, DamagedDataError


@contextmanager
def open_hdf5(
    path: Path, *, content: BinaryIO | None = None, what: str, remedy: str
) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading; damage found in the context becomes a DamagedDataError.

    `content` is the content of the file if it was read already. Messages name `what` and `remedy`.
    """
    try:
        with h5py.File(content or path, "r") as file:
            yield file
    except CacheError:  # a ValueError too, and more exact than what follows
        raise
    # h5py reports damaged metadata under many names.
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DamagedDataError(f"{path}: not readable as {what} ({reason}); {remedy}") from error


def is_hard_link(group: h5py.Group, name: str) -> bool:
    """Return whether a member of a group is stored in the same file, not behind a link to it."""
    return isinstance(group.get(name, getlink=True), h5py.HardLink)
