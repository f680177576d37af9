"""Indexes: JSON files that carry their format, its version and a digest of their content."""

import json
from pathlib import Path
from typing import Any

from flsep.cache.errors import DamagedDataError, MissingDataError
from flsep.cache.files import write_json
from flsep.cache.format import fingerprint, require_version


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write JSON values atomically, with their `fingerprint` as the field ``sha256``."""
    write_json(path, {**content, "sha256": fingerprint(content)})


def read_sealed(path: Path, *, format_name: str, version: int, command: str) -> dict[str, Any]:
    """Read a file of `write_sealed` with the expected format and version, written by `command`.

    The digest protects against damage, not against forgery: the caller still has to check fields
    and types. Raises MissingDataError, FormatVersionError for another version of the format, and
    DamagedDataError for another format or an altered file.
    """
    if not path.parent.is_dir():
        raise MissingDataError(f"{path.parent}: no such folder; expected the output of {command}")
    if not path.is_file():
        raise MissingDataError(
            f"{path}: no index; if {command} was stopped, run it again to finish, as it writes the "
            "index last; otherwise give the folder that it wrote"
        )
    remedy = f"run {command} again to renew it"
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        found_format, found_version = content["format"], content["version"]
        digest = fingerprint({key: content[key] for key in content if key != "sha256"})
        is_intact = content["sha256"] == digest
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedDataError(f"{path}: not readable as an index ({error}); {remedy}") from error
    if found_format != format_name:
        raise DamagedDataError(
            f"{path}: not readable as an index (its format is {found_format!r}, expected "
            f"{format_name!r}); {remedy}"
        )
    # The version before the digest: another version may be sealed in another way.
    require_version(path, found_version, version, command)
    if not is_intact:
        raise DamagedDataError(f"{path}: altered, its digest does not match; {remedy}")
    return content
