"""Format a comparison as text, Markdown, CSV and JSON, and save it."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from flsep.cache.files import write_text
from flsep.trainer.study.comparison import MEAN_OF_MEDIANS, Comparison, Spread

_SUMMARY_HEADER = ("", "seeds", "SDR", "min..max", "vs floor", "vs none", "scored")
_SUMMARY_NOTE = (
    "SDR: mean of medians (over sources). "
    "scored: frames the row scored by itself (fewest of its seeds)."
)
_CSV_HEADER = (
    *("approach", "kind", "num_seeds", "source", "metric", "median_db", "min_db", "max_db"),
    *("num_common_tracks", "num_common_frames", "num_frames"),
)
_NAME_WIDTH = 26
_LINE_WIDTH = 100


def save(comparison: Comparison, folder: Path) -> None:
    """Write ``comparison.txt``, ``.md``, ``.csv`` and ``.json`` into a folder, made if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "comparison.txt", format_text(comparison))
    write_text(folder / "comparison.md", format_markdown(comparison))
    write_text(folder / "comparison.csv", format_csv(comparison))
    write_text(folder / "comparison.json", format_json(comparison))


def format_text(comparison: Comparison) -> str:
    """Return a summary table and one table a source, aligned, at most 100 columns wide."""
    lines = [_describe_figures(comparison), _describe_frames(comparison), ""]
    lines += [*_align([_SUMMARY_HEADER, *_summarise(comparison)]), _SUMMARY_NOTE]
    for source, title in _describe_sources(comparison).items():
        metrics = list(comparison.entries[0].values[source])
        rows: list[Sequence[str]] = [["", *metrics]]
        for entry in comparison.entries:
            spreads = entry.values[source].values()
            rows.append([entry.name, *(f"{spread.median:.2f}" for spread in spreads)])
            if len(entry.seeds) > 1:  # a second line, under the row's own
                rows.append(["  min..max", *map(_format_range, spreads)])
        lines += ["", title, *_align(rows)]
    return "".join(f"{_cut(line, _LINE_WIDTH)}\n" for line in lines)


def format_markdown(comparison: Comparison) -> str:
    """Return a summary table and a table of all sources."""
    lines = [f"{_describe_figures(comparison)}.", f"{_describe_frames(comparison)}.", ""]
    lines += [*_pipe([_SUMMARY_HEADER, *_summarise(comparison)]), "", _SUMMARY_NOTE, ""]
    rows: list[Sequence[str]] = []
    for source, title in _describe_sources(comparison).items():
        for entry in comparison.entries:
            cells = [
                f"{spread.median:.2f}"
                + (f" ({_format_range(spread)})" if len(entry.seeds) > 1 else "")
                for spread in entry.values[source].values()
            ]
            rows.append([title, entry.name, *cells])
    header = ["source", "approach", *comparison.entries[0].values[comparison.sources[0]]]
    return "\n".join([*lines, *_pipe([header, *rows])]) + "\n"


def format_csv(comparison: Comparison) -> str:
    """Return one line for each row, source (or mean of medians) and metric."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_CSV_HEADER)
    for entry in comparison.entries:
        for source, spreads in entry.values.items():
            # None, which csv leaves empty, for the mean of medians.
            counts = (
                comparison.num_common_tracks.get(source),
                comparison.num_common_frames.get(source),
                comparison.num_frames,
            )
            for metric, spread in spreads.items():
                key = (entry.approach, entry.kind, len(entry.seeds), source, metric)
                figures = (spread.median, spread.minimum, spread.maximum)
                writer.writerow([*key, *(f"{figure:.5f}" for figure in figures), *counts])
    return file.getvalue()


def format_json(comparison: Comparison) -> str:
    """Return everything, each run's figures included."""
    # JSON has no NaN, and a comparison holds none, since each source has a common frame.
    return json.dumps(asdict(comparison), indent=2, allow_nan=False) + "\n"


def _summarise(comparison: Comparison) -> list[Sequence[str]]:
    """Return the rows of the summary table, without its header."""
    rows: list[Sequence[str]] = []
    for entry in comparison.entries:
        sdr = entry.values[MEAN_OF_MEDIANS]["SDR"]
        # Floor and oracle have one run, without a seed.
        num_seeds = sum(seed is not None for seed in entry.seeds)
        rows.append(
            [
                entry.name,
                str(num_seeds) if num_seeds else "-",
                f"{sdr.median:.2f}",
                _format_range(sdr) if len(entry.seeds) > 1 else "-",
                _format_difference(entry.improvement_db),
                _format_difference(entry.difference_to_none_db),
                str(entry.num_scored_frames),
            ]
        )
    return rows


def _describe_figures(comparison: Comparison) -> str:
    return f"{comparison.engine}: median over frames, then median over tracks, in dB"


def _describe_frames(comparison: Comparison) -> str:
    """Say how many frames count; the number may differ between sources."""
    counts = sorted(set(comparison.num_common_frames.values()))
    text = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"tracks: {len(comparison.tracks)}; frames that every row scored, and only these count: "
        f"{text} of {comparison.num_frames}"
    )


def _describe_sources(comparison: Comparison) -> dict[str, str]:
    """Return the title of each source and of the mean of medians, in the order of the table."""
    titles = {
        source: f"{source} ({comparison.num_common_frames[source]} of {comparison.num_frames} "
        f"frames, {comparison.num_common_tracks[source]} of {len(comparison.tracks)} tracks)"
        for source in comparison.sources
    }
    return titles | {MEAN_OF_MEDIANS: f"{MEAN_OF_MEDIANS} (over {len(titles)} sources)"}


def _format_range(spread: Spread) -> str:
    return f"{spread.minimum:.2f}..{spread.maximum:.2f}"


def _format_difference(difference_db: float | None) -> str:
    return "-" if difference_db is None else f"{difference_db:+.2f}"


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the first column to the left and the others to the right."""
    # The first column has a fixed width, so that the tables of all sources line up.
    widths = [max(map(len, column)) for column in zip(*(row[1:] for row in rows), strict=True)]
    return [
        "  ".join(
            [_cut(name, _NAME_WIDTH).ljust(_NAME_WIDTH)]
            + [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        ).rstrip()
        for name, *cells in rows
    ]


def _pipe(rows: Sequence[Sequence[str]]) -> list[str]:
    # A bar within a cell would end the cell.
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]
