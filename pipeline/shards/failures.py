"""Remember which tracks of a shard failed, and of what, beside the shard.

A rerun need not try a track again whose files have not changed, and the index can be made without
those who tried.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flsep.cache import MismatchError, write_json
from flsep.pipeline.corpus.tracks import Track
from flsep.pipeline.shards.plan import PlannedTrack

_SUFFIX = ".failed.json"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a track could not be stored, and the files that this was seen with."""

    reason: str
    stamps: tuple[tuple[int, int] | None, ...]


def stamp_files(track: Track) -> tuple[tuple[int, int] | None, ...]:
    """Return size and time of change (ns) of each file of a track, None for one that is missing."""
    signals = [*filter(None, [track.mixture]), *track.sources]
    stamps: list[tuple[int, int] | None] = []
    for path in dict.fromkeys(signal.path for signal in signals):
        try:
            status = path.stat()
        except OSError:
            stamps.append(None)
        else:
            stamps.append((status.st_size, status.st_mtime_ns))
    return tuple(stamps)


def read_failures(shard: Path) -> dict[str, Failure]:
    """Return what failed when a shard was last made, by the track's name.

    Raises
    ------
    MismatchError
        If the record is there but not readable.
    """
    path = shard.with_suffix(_SUFFIX)
    try:
        stored = json.loads(path.read_bytes())
        return {
            name: Failure(str(reason), tuple(stamp and (stamp[0], stamp[1]) for stamp in stamps))
            for name, (reason, stamps) in stored.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise MismatchError(f"{path}: not readable ({error}); delete it and run again") from error


def write_failures(shard: Path, failures: dict[str, Failure]) -> None:
    """Replace the record of a shard; without failures there is none."""
    path = shard.with_suffix(_SUFFIX)
    if failures:
        content = {name: [fail.reason, fail.stamps] for name, fail in sorted(failures.items())}
        write_json(path, content)
    else:
        path.unlink(missing_ok=True)


def still_failed(
    tracks: Iterable[PlannedTrack], failures: dict[str, Failure]
) -> list[tuple[str, Failure]]:
    """Return the tracks that failed before and whose files have not changed since."""
    return [
        (planned.track.name, failures[planned.track.name])
        for planned in tracks
        if planned.track.name in failures
        and failures[planned.track.name].stamps == stamp_files(planned.track)
    ]
