"""Compare scored runs in one table, over the frames that all of them scored.

museval gives NaN to every source in a frame where any reference or estimate is silent, so a model
that outputs zeros would choose the frames it is judged by. Here a frame of a track and source
counts only if its four metrics are finite in every run, in the floor and in the oracle.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flsep.cache.files import write_text
from flsep.trainer.errors import ComparisonError
from flsep.trainer.study import tables

METRICS = ("SDR", "SIR", "ISR", "SAR")
MEAN_OF_MEDIANS = "mean of medians"
BASELINE = "none"
"""The approach that the others' difference is taken to."""

Kind = Literal["floor", "run", "oracle"]

TrackScores = dict[str, NDArray[np.float64]]
"""Source -> float64 [metric, frame], dB, NaN where not scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """One scored run: a folder with one museval JSON a track.

    Attributes
    ----------
    label
        The run's own name, for messages.
    approach
        The row it belongs to; runs of one approach differ by seed.
    seed
        None where there is none (floor, oracle).
    folder
        As `flsep.trainer.scoring.pool.score_tracks` or museval writes it.
    """

    label: str
    approach: str
    seed: int | None
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure over the runs of a row, and that of each run in the order of its seeds, dB."""

    median: float
    minimum: float
    maximum: float
    per_run: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One row of the comparison: an approach over its seeds, the floor or the oracle.

    Attributes
    ----------
    values
        Source, or 'mean of medians', -> metric -> figure.
    num_scored_frames
        Frames that the row scored by itself, of its run with the fewest.
    improvement_db
        Mean of the SDR medians less that of the floor; None for the floor.
    difference_to_none_db
        The same less that of plain X-UMX; None without one, and for itself, floor and oracle.
    """

    approach: str
    kind: Kind
    labels: tuple[str, ...]
    seeds: tuple[int | None, ...]
    values: Mapping[str, Mapping[str, Spread]]
    num_scored_frames: int
    improvement_db: float | None
    difference_to_none_db: float | None

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
    """Scored runs side by side; what the attributes count is over all tracks.

    Attributes
    ----------
    tracks
        Names, sorted.
    sources
        Names, in the floor's order.
    num_frames
        Of all tracks.
    num_common_frames, num_common_tracks
        Source -> frames that every run scored, and tracks with at least one such frame.
    entries
        The floor, the approaches in the order given, the oracle.
    """

    tracks: tuple[str, ...]
    sources: tuple[str, ...]
    num_frames: int
    num_common_frames: Mapping[str, int]
    num_common_tracks: Mapping[str, int]
    entries: tuple[Entry, ...]

    def to_text(self) -> str:
        """Return aligned tables for a terminal of 100 columns."""
        return tables.format_text(self)

    def to_markdown(self) -> str:
        """Return the tables as Markdown."""
        return tables.format_markdown(self)

    def to_csv(self) -> str:
        """Return one line for each row, source and metric."""
        return tables.format_csv(self)

    def to_json(self) -> str:
        """Return everything, each run's figures included."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    def save(self, folder: Path) -> None:
        """Write ``comparison.txt``, ``.md``, ``.csv`` and ``.json`` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "comparison.txt", self.to_text())
        write_text(folder / "comparison.md", self.to_markdown())
        write_text(folder / "comparison.csv", self.to_csv())
        write_text(folder / "comparison.json", self.to_json())


def compare_scores(
    runs: Sequence[Scores], *, floor: Scores, oracle: Scores | None = None
) -> Comparison:
    """Compare runs with each other, with the floor and with the oracle.

    Per run, source and metric: the median over a track's common frames, then the median over the
    tracks that have any (museval's convention), then over a row's seeds the median, the least and
    the greatest. The mean of medians is taken over sources within each run, before the seeds.

    Parameters
    ----------
    runs
        Those of one approach differ by seed and make one row.
    floor
        The mixture as the estimate of every source.
    oracle
        The ideal ratio mask.

    Returns
    -------
    Comparison
        Deterministic; rows in the order given.

    Raises
    ------
    ComparisonError
        If tracks, sources or frames differ between runs, a file is no museval result, a seed
        comes twice in an approach, or no frame of a source was scored by all.
    """
    groups: list[tuple[Kind, list[Scores]]] = [("floor", [floor])]
    groups += [("run", group) for group in _group_by_approach(runs)]
    groups += [("oracle", [oracle])] if oracle else []
    members = [scores for _, group in groups for scores in group]
    loaded = [_read_folder(scores) for scores in members]
    _check_same(members, loaded)

    tracks = sorted(loaded[0])
    sources = tuple(loaded[0][tracks[0]])
    common = {
        (track, source): np.all([np.isfinite(run[track][source]).all(0) for run in loaded], axis=0)
        for track in tracks
        for source in sources
    }
    for source in sources:
        if not any(common[track, source].any() for track in tracks):
            raise ComparisonError(_explain_nothing_common(source, members, loaded))

    entries: list[Entry] = []
    remaining = iter(loaded)
    for kind, group in groups:
        of_group = [next(remaining) for _ in group]
        values = _spread([_summarise(run, common, tracks, sources) for run in of_group])
        entries.append(
            Entry(
                approach=group[0].approach,
                kind=kind,
                labels=tuple(scores.label for scores in group),
                seeds=tuple(scores.seed for scores in group),
                values=values,
                num_scored_frames=min(map(_count_scored, of_group)),
                improvement_db=None,
                difference_to_none_db=None,
            )
        )
    entries[1:] = [
        replace(entry, improvement_db=entry.sdr_db - entries[0].sdr_db) for entry in entries[1:]
    ]
    plain = next((e for e in entries if e.kind == "run" and e.approach == BASELINE), None)
    if plain is not None:
        entries = [
            replace(entry, difference_to_none_db=entry.sdr_db - plain.sdr_db)
            if entry.kind == "run" and entry is not plain
            else entry
            for entry in entries
        ]
    return Comparison(
        tracks=tuple(tracks),
        sources=sources,
        num_frames=sum(common[track, sources[0]].size for track in tracks),
        num_common_frames={s: sum(int(common[t, s].sum()) for t in tracks) for s in sources},
        num_common_tracks={s: sum(bool(common[t, s].any()) for t in tracks) for s in sources},
        entries=tuple(entries),
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


def _read_folder(scores: Scores) -> dict[str, TrackScores]:
    """Read every track of a run: track -> source -> float64 [metric, frame]."""
    paths = sorted(scores.folder.glob("*.json"))
    if not paths:
        raise ComparisonError(
            f"run {scores.label!r}: no scores (*.json) in {scores.folder}; evaluate it first"
        )
    tracks: dict[str, TrackScores] = {}
    for path in paths:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            name = stored.get("track", path.stem)
            track = {
                target["name"]: np.array(
                    [[frame["metrics"][m] for frame in target["frames"]] for m in METRICS],
                    dtype=np.float64,
                )
                for target in stored["targets"]
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ComparisonError(
                f"run {scores.label!r}: {path} is no museval result of a track "
                f"({type(error).__name__}: {error}); remove it or evaluate again"
            ) from error
        if not track or len({values.shape for values in track.values()}) != 1:
            raise ComparisonError(
                f"run {scores.label!r}: {path} holds no sources, or sources with different "
                "numbers of frames; evaluate again"
            )
        if name in tracks:
            raise ComparisonError(
                f"run {scores.label!r}: track {name!r} comes twice in {scores.folder}"
            )
        tracks[name] = track
    return tracks


def _check_same(members: Sequence[Scores], loaded: Sequence[dict[str, TrackScores]]) -> None:
    every_track = sorted(set().union(*loaded))
    first_label, first = members[0].label, loaded[0]
    for scores, run in zip(members, loaded, strict=True):
        if missing := [track for track in every_track if track not in run]:
            raise ComparisonError(
                f"run {scores.label!r} lacks {len(missing)} of the {len(every_track)} tracks that "
                f"others have: {', '.join(map(repr, missing[:5]))}"
                f"{', ...' if len(missing) > 5 else ''}; evaluate them, or leave the run out"
            )
    sources = set(first[every_track[0]])
    for scores, run in zip(members, loaded, strict=True):
        for track in every_track:
            if set(run[track]) != sources:
                raise ComparisonError(
                    f"run {scores.label!r}, track {track!r}: sources {sorted(run[track])}, but "
                    f"{sorted(sources)} in track {every_track[0]!r} of {first_label!r}"
                )
            num_frames, expected = (
                next(iter(values[track].values())).shape[1] for values in (run, first)
            )
            if num_frames != expected:
                raise ComparisonError(
                    f"run {scores.label!r}, track {track!r}: {num_frames} frames, but {expected} "
                    f"in {first_label!r}; evaluate both on the same audio"
                )


def _count_scored(run: dict[str, TrackScores]) -> int:
    """Count the frames of a run in which every source has all four metrics."""
    return sum(
        int(np.isfinite(np.stack(list(track.values()))).all(axis=(0, 1)).sum())
        for track in run.values()
    )


def _explain_nothing_common(
    source: str, members: Sequence[Scores], loaded: Sequence[dict[str, TrackScores]]
) -> str:
    labels = [scores.label for scores in members]
    fewest, label = min(zip(map(_count_scored, loaded), labels, strict=True))
    return (
        f"no frame of source {source!r} was scored in every run; run {label!r} scored the fewest "
        f"({fewest} frames; silent estimates are not scored): leave it out"
    )


def _summarise(
    run: dict[str, TrackScores],
    common: Mapping[tuple[str, str], NDArray[np.bool_]],
    tracks: Sequence[str],
    sources: Sequence[str],
) -> dict[str, NDArray[np.float64]]:
    """Return source, or 'mean of medians', -> float64 [metric], dB, of one run."""
    medians = {
        source: np.median(
            [
                np.median(run[track][source][:, common[track, source]], axis=1)
                for track in tracks
                if common[track, source].any()
            ],
            axis=0,
        )
        for source in sources
    }
    return medians | {MEAN_OF_MEDIANS: np.mean(list(medians.values()), axis=0)}


def _spread(figures: Sequence[dict[str, NDArray[np.float64]]]) -> dict[str, dict[str, Spread]]:
    """Gather the runs of a row: source -> metric -> figure over seeds."""
    spreads: dict[str, dict[str, Spread]] = {}
    for source in figures[0]:
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
