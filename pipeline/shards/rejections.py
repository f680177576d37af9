"""Remember beside a shard which of its tracks were rejected, and why.

With this record a later run skips those tracks while their files stay the same, and the index can
be written by a job that has not tried the tracks itself.
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
class Rejection:
    """Why a track could not be stored, and the `stamp_files` of that time."""

    reason: str
    stamps: tuple[tuple[int, int] | None, ...]


def stamp_files(track: Track) -> tuple[tuple[int, int] | None, ...]:
    """Return size and modification time (ns) of each file of a track; None for a missing file."""
    # Signals may share a file, such as the streams of a stem file; each file is stamped once.
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


def read_rejections(shard: Path) -> dict[str, Rejection]:
    """Return the record of a shard by track name; empty if there is none."""
    path = shard.with_suffix(_SUFFIX)
    try:
        # Size and time of a file are a list in JSON, a missing file is null.
        stored = json.loads(path.read_bytes())
        return {
            name: Rejection(str(reason), tuple(stamp and (stamp[0], stamp[1]) for stamp in stamps))
            for name, (reason, stamps) in stored.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise MismatchError(f"{path}: not readable ({error}); delete it and run again") from error


def write_rejections(shard: Path, rejections: dict[str, Rejection]) -> None:
    """Replace the record of a shard, or delete it if no track is rejected."""
    path = shard.with_suffix(_SUFFIX)
    if rejections:
        write_json(path, {name: [r.reason, r.stamps] for name, r in sorted(rejections.items())})
    else:
        # An older record would keep tracks out that are stored by now.
        path.unlink(missing_ok=True)


def still_rejected(
    tracks: Iterable[PlannedTrack], rejections: dict[str, Rejection]
) -> dict[str, Rejection]:
    """Return the rejections of those tracks whose files have not changed since."""
    return {
        planned.track.name: rejections[planned.track.name]
        for planned in tracks
        if planned.track.name in rejections
        and rejections[planned.track.name].stamps == stamp_files(planned.track)
    }
