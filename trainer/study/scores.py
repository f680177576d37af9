"""Read folders of scores, and find the frames in which they can be compared.

museval gives NaN to every source in a frame where any reference or estimate is silent, so a model
that outputs zeros would choose the frames it is judged by. A comparison therefore counts a frame
of a track and source only if its four metrics are finite in all runs, in the floor and in the
oracle.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flsep.trainer.errors import ComparisonError

METRICS = ("SDR", "SIR", "ISR", "SAR")

TrackScores = dict[str, NDArray[np.float64]]
"""Source -> float64 [metric, frame], dB, NaN where not scored."""

RunScores = dict[str, TrackScores]
"""Track -> scores."""

CommonFrames = Mapping[str, Mapping[str, NDArray[np.bool_]]]
"""Source -> track -> bool [frame]: whether the frame was scored by all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One scored run: a folder with one JSON a track, as `score_tracks` or museval writes it.

    `label` is the run's own name, for messages. Runs of one `approach` make one row and differ by
    `seed`, which is None for floor and oracle.
    """

    label: str
    approach: str
    seed: int | None
    folder: Path


def read_scores(scores: Scores) -> RunScores:
    """Read every track of a run; raises ComparisonError for files that are no scores."""
    paths = sorted(scores.folder.glob("*.json"))
    if not paths:
        raise ComparisonError(
            f"run {scores.label!r}: no scores (*.json) in {scores.folder}; evaluate it first"
        )
    run: RunScores = {}
    for path in paths:
        name, track = _read_track(path, scores.label)
        if name in run:
            raise ComparisonError(
                f"run {scores.label!r}: track {name!r} comes twice in {scores.folder}"
            )
        run[name] = track
    return run


def _read_track(path: Path, label: str) -> tuple[str, TrackScores]:
    """Return the name and the scores of one track."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        # museval itself stores no name.
        name = stored.get("track", path.stem)
        track = {target["name"]: _make_table(target["frames"]) for target in stored["targets"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ComparisonError(
            f"run {label!r}: {path} is not a museval result of a track "
            f"({type(error).__name__}: {error}); remove it or evaluate again"
        ) from error
    # museval gives all sources of a track the same frames.
    if not track or len({table.shape for table in track.values()}) != 1:
        raise ComparisonError(
            f"run {label!r}: {path} holds no sources, or sources with different numbers of "
            "frames; evaluate again"
        )
    return name, track


def _make_table(frames: list[Any]) -> NDArray[np.float64]:
    """Return the metrics of one source, float64 [metric, frame]."""
    rows = [[frame["metrics"][metric] for frame in frames] for metric in METRICS]
    return np.array(rows, dtype=np.float64)


def require_comparable(members: Sequence[Scores], runs: Sequence[RunScores]) -> None:
    """Raise ComparisonError if runs differ in tracks, sources or frames.

    `members` names the runs in messages, in the order of `runs`.
    """
    tracks = sorted(set().union(*runs))
    # Tracks first: what follows looks up every track in every run.
    for member, run in zip(members, runs, strict=True):
        if missing := [track for track in tracks if track not in run]:
            raise ComparisonError(
                f"run {member.label!r} lacks {len(missing)} of the {len(tracks)} tracks that "
                f"others have: {', '.join(map(repr, missing[:5]))}"
                f"{', ...' if len(missing) > 5 else ''}; evaluate them, or leave the run out"
            )
    first = runs[0]
    sources = set(first[tracks[0]])
    for member, run in zip(members, runs, strict=True):
        for track in tracks:
            place = f"run {member.label!r}, track {track!r}"
            if set(run[track]) != sources:
                raise ComparisonError(
                    f"{place}: sources {sorted(run[track])}, but {sorted(sources)} in track "
                    f"{tracks[0]!r} of {members[0].label!r}"
                )
            found, expected = _count_frames(run[track]), _count_frames(first[track])
            if found != expected:
                raise ComparisonError(
                    f"{place}: {found} frames, but {expected} in {members[0].label!r}; evaluate "
                    "both on the same audio"
                )


def _count_frames(track: TrackScores) -> int:
    # Any source will do: `_read_track` refuses a track whose sources differ in it.
    return int(next(iter(track.values())).shape[1])


def find_common_frames(members: Sequence[Scores], runs: Sequence[RunScores]) -> CommonFrames:
    """Return the frames that all runs scored; raises ComparisonError if a source has none.

    Tracks are sorted, sources in the order of the first run.
    """
    tracks = sorted(runs[0])
    # A frame counts if all of its metrics (axis 0) are finite in all runs.
    common = {
        source: {
            track: np.all([np.isfinite(run[track][source]).all(0) for run in runs], axis=0)
            for track in tracks
        }
        for source in runs[0][tracks[0]]
    }
    for source, frames in common.items():
        if not any(of_track.any() for of_track in frames.values()):
            # Name the run to leave out: the one with the fewest scored frames.
            labels = [member.label for member in members]
            fewest, label = min(zip(map(count_scored_frames, runs), labels, strict=True))
            raise ComparisonError(
                f"no frame of source {source!r} was scored in every run; run {label!r} scored the "
                f"fewest ({fewest} frames; silent estimates are not scored): leave it out"
            )
    return common


def count_scored_frames(run: RunScores) -> int:
    """Count the frames of a run in which every source has all four metrics."""
    return sum(
        # [source, metric, frame]
        int(np.isfinite(np.stack(list(track.values()))).all(axis=(0, 1)).sum())
        for track in run.values()
    )
