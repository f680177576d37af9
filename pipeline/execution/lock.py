"""Lock an output folder and bind it to one configuration."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flsep.cache import CacheError, MismatchError, remove_leftovers, write_json
from flsep.cache.format import fingerprint

CONFIG_NAME = "config.json"


@contextmanager
def open_output(folder: Path, config: dict[str, Any], *, shared: bool) -> Iterator[None]:
    """Create, lock and claim an output folder for the time of a run.

    A run that has the folder to itself also removes what killed writers left behind. MismatchError
    means that another run is writing into the folder, or that it belongs to another configuration.
    """
    if folder.exists() and not folder.is_dir():
        raise CacheError(f"{folder}: is a file; choose a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, shared=shared):
        claim(folder, config)
        # What looks like a leftover in a shared folder may be a file that another part is writing.
        if not shared:
            remove_leftovers(folder)
        yield


@contextmanager
def locked(folder: Path, *, shared: bool) -> Iterator[None]:
    """Let one run, or any number of parts, write into a folder; the lock ends with the process.

    The lock relies on `flock` reaching all machines that see the folder. It does so on local disks,
    NFS, GPFS, and Lustre mounted with ``flock``. Elsewhere two runs may do the same work twice, but
    no file is damaged: each run writes under temporary names and renames.
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MismatchError(
                f"{folder}: another run is writing into it; wait for that run, or use another "
                "folder"
            ) from error
        except OSError as error:
            raise MismatchError(
                f"{folder}: its file system cannot lock files ({error.strerror}); mount it with "
                "locks, or use another folder"
            ) from error
        yield
    finally:
        # Closing releases the lock. The file stays: if it were removed, two runs could each lock a
        # file of that name.
        os.close(descriptor)


def claim(folder: Path, config: dict[str, Any]) -> None:
    """Write the configuration into a new folder; refuse a folder of another configuration."""
    path = folder / CONFIG_NAME
    if not path.exists():
        if any(folder.glob("*.h5")):
            raise MismatchError(
                f"{folder}: holds *.h5 files but no {CONFIG_NAME}; expected an empty folder or "
                "one that an earlier run made"
            )
        write_json(path, {"config": config, "fingerprint": fingerprint(config)})
        return
    try:
        stored = json.loads(path.read_bytes())["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise MismatchError(
            f"{path}: not readable ({error}); delete the folder and run again"
        ) from error
    if stored != config:
        changes = "; ".join(dict.fromkeys(_list_changes(stored, config)))
        raise MismatchError(
            f"{folder}: holds files of another configuration ({changes}); "
            "give each configuration its own folder"
        )


def _list_changes(old: Any, new: Any, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _list_changes(old.get(key), new.get(key), key)
    elif old != new:
        yield f"{name} was {old}, now {new}"
