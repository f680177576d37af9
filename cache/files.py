"""Write files atomically: a file is either complete or not there at all."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_SUFFIX = ".part"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a new version of a file under a temporary path, then move it into place.

    `path` always holds the old content or the new one; an exception keeps the old one. An OSError
    has `path` as its `filename`.
    """
    # In the same folder, since files cannot be renamed into another file system.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # the umask decides, even if a library made the file private
        # The content first: after a power failure, a file that was renamed unflushed may be empty.
        _sync(temporary, os.O_RDONLY)
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        # Users know the file by its final name. Errors of libraries have no number and a text of
        # their own; an error about another file keeps its name.
        if error.errno is not None and error.filename in (None, str(temporary)):
            error.filename = str(path)
            del error.filename2
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write a binary file atomically."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically, with its line ends as they are."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically; NaN and infinity raise ValueError."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
    # Names of files may hold bytes that are not UTF-8; JSON can escape them.
    write_bytes(path, f"{text}\n".encode(errors="backslashreplace"))


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed writers; no writer may be active in the folder."""
    for path in folder.glob(f".*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
