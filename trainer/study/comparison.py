"""Compare scored runs, over the frames that all of them scored."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flsep.trainer.errors import ComparisonError
from flsep.trainer.scoring.engine import DEFAULT_ENGINE
from flsep.trainer.study.scores import (
    METRICS,
    CommonFrames,
    RunScores,
    Scores,
    count_scored_frames,
    find_common_frames,
    read_scores,
    require_comparable,
)

MEAN_OF_MEDIANS = "mean of medians"
BASELINE = "none"
"""The approach to which the difference of the others is taken."""

Kind = Literal["floor", "run", "oracle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure over the runs of a row, and that of each run in the order of its seeds, dB."""

    median: float
    minimum: float
    maximum: float
    per_run: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row of the comparison: an approach over its seeds, the floor or the oracle."""

    approach: str
    kind: Kind
    # A label and a seed for each run of the row.
    labels: tuple[str, ...]
    seeds: tuple[int | None, ...]
    # Source, or 'mean of medians', -> metric -> figure.
    values: Mapping[str, Mapping[str, Spread]]
    # Frames that the row scored by itself; the fewest of its runs.
    num_scored_frames: int
    # Mean of the SDR medians minus that of the floor; None for the floor.
    improvement_db: float | None = None
    # Likewise minus that of the baseline; None for the baseline, floor and oracle, and for all rows
    # if the baseline is not compared.
    difference_to_none_db: float | None = None

    @property
    def name(self) -> str:
        """The row's name in a table."""
        return self.approach if self.kind == "run" else f"{self.approach} ({self.kind})"

    @property
    def sdr_db(self) -> float:
        """The mean of the sources' SDR medians, dB."""
        return self.values[MEAN_OF_MEDIANS]["SDR"].median


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Scored runs side by side; `flsep.trainer.study.tables` shows and saves them."""

    # The name of the scoring engine.
    engine: str
    # Tracks are sorted; sources have the floor's order.
    tracks: tuple[str, ...]
    sources: tuple[str, ...]
    # Frames of all tracks, whether or not all runs scored them.
    num_frames: int
    # Source -> number of frames that every run scored, and of tracks with such a frame.
    num_common_frames: Mapping[str, int]
    num_common_tracks: Mapping[str, int]
    # The floor, the approaches in the order given, the oracle.
    entries: tuple[Entry, ...]


def compare_scores(
    runs: Sequence[Scores],
    *,
    floor: Scores,
    oracle: Scores | None = None,
    engine: str = DEFAULT_ENGINE,
) -> Comparison:
    """Compare runs with each other, with the floor and with the oracle.

    Per run, source and metric: the median over a track's common frames, then the median over the
    tracks that have any (museval's convention). A row shows the median, minimum and maximum of
    that figure over its seeds. The mean of medians is taken over sources within each run, before
    the seeds.

    Raises
    ------
    ComparisonError
        If tracks, sources or frames differ between runs, a file is not a museval result, a seed
        comes twice in an approach, or a source has no frame that all runs scored.
    """
    rows: list[tuple[Kind, list[Scores]]] = [("floor", [floor])]
    rows += [("run", members) for members in _group_by_approach(runs)]
    rows += [("oracle", [oracle])] if oracle else []

    members = [scores for _, group in rows for scores in group]
    loaded = [read_scores(scores) for scores in members]
    require_comparable(members, loaded)
    common = find_common_frames(members, loaded)

    # `loaded` is flat, in the order of the rows: hand each row its share.
    remaining = iter(loaded)
    entries = [
        _make_entry(kind, group, [next(remaining) for _ in group], common) for kind, group in rows
    ]
    # All sources of a track have the same number of frames: count those of the first.
    of_tracks = next(iter(common.values()))
    return Comparison(
        engine=engine,
        tracks=tuple(of_tracks),
        sources=tuple(common),
        num_frames=sum(frames.size for frames in of_tracks.values()),
        num_common_frames={
            source: sum(int(frames.sum()) for frames in tracks.values())
            for source, tracks in common.items()
        },
        num_common_tracks={
            source: sum(bool(frames.any()) for frames in tracks.values())
            for source, tracks in common.items()
        },
        entries=tuple(_add_differences(entries)),
    )


def _group_by_approach(runs: Sequence[Scores]) -> list[list[Scores]]:
    if not runs:
        raise ComparisonError("nothing to compare: give at least one scored run")
    groups: dict[str, list[Scores]] = {}
    for scores in runs:
        group = groups.setdefault(scores.approach, [])
        for other in group:
            if other.seed == scores.seed:
                raise ComparisonError(
                    f"runs {other.label!r} and {scores.label!r} are both approach "
                    f"{scores.approach!r} with seed {scores.seed}: leave one out or name it apart"
                )
        group.append(scores)
    return list(groups.values())


def _make_entry(
    kind: Kind, members: Sequence[Scores], runs: Sequence[RunScores], common: CommonFrames
) -> Entry:
    """Make a row of runs that differ by seed, without its differences to other rows."""
    return Entry(
        approach=members[0].approach,
        kind=kind,
        labels=tuple(scores.label for scores in members),
        seeds=tuple(scores.seed for scores in members),
        values=_spread([_take_medians(run, common) for run in runs]),
        num_scored_frames=min(map(count_scored_frames, runs)),
    )


def _take_medians(run: RunScores, common: CommonFrames) -> dict[str, NDArray[np.float64]]:
    """Return source, or 'mean of medians', -> float64 [metric], dB, of one run."""
    medians = {}
    for source, tracks in common.items():
        of_tracks = [
            np.median(run[track][source][:, frames], axis=1)
            for track, frames in tracks.items()
            # The median of no frames would be NaN, and so would that of all tracks.
            if frames.any()
        ]
        medians[source] = np.median(of_tracks, axis=0)
    return medians | {MEAN_OF_MEDIANS: np.mean(list(medians.values()), axis=0)}


def _spread(figures: Sequence[dict[str, NDArray[np.float64]]]) -> dict[str, dict[str, Spread]]:
    """Gather the runs of a row: source -> metric -> figure over seeds."""
    spreads: dict[str, dict[str, Spread]] = {}
    for source in figures[0]:
        # [metric, run]
        per_metric = np.stack([run[source] for run in figures], axis=1)
        spreads[source] = {
            metric: Spread(
                median=float(np.median(per_run)),
                minimum=float(per_run.min()),
                maximum=float(per_run.max()),
                per_run=tuple(per_run.tolist()),
            )
            for metric, per_run in zip(METRICS, per_metric, strict=True)
        }
    return spreads


def _add_differences(entries: Sequence[Entry]) -> list[Entry]:
    """Add each row's difference to the floor, which comes first, and to the baseline."""
    floor, *others = entries
    # The user may have named the baseline's row otherwise; then there is none.
    baseline = next(
        (entry for entry in others if entry.kind == "run" and entry.approach == BASELINE), None
    )
    compared = [floor]
    for entry in others:
        difference_db = None
        if baseline is not None and entry.kind == "run" and entry is not baseline:
            difference_db = entry.sdr_db - baseline.sdr_db
        compared.append(
            replace(
                entry,
                improvement_db=entry.sdr_db - floor.sdr_db,
                difference_to_none_db=difference_db,
            )
        )
    return compared
