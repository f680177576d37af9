"""Compare hand-made scores: every expected figure here is worked by hand."""

import csv
import dataclasses
import importlib
import io
import json
from pathlib import Path

import numpy as np
import pytest

from flsep.trainer.errors import ComparisonError
from flsep.trainer.scoring.museval_engine import Museval
from flsep.trainer.study.comparison import MEAN_OF_MEDIANS, Comparison, compare_scores
from flsep.trainer.study.scores import METRICS, Scores
from flsep.trainer.study.tables import (
    format_csv,
    format_json,
    format_markdown,
    format_text,
    save,
)

NAN = float("nan")

TEXT = """\
museval: median over frames, then median over tracks, in dB
tracks: 2; frames that every row scored, and only these count: 5 of 7

                            seeds    SDR  min..max  vs floor  vs none  scored
mixture (floor)                 -  -5.00         -         -        -       6
none                            1   4.50         -     +9.50        -       5
concat                          1   5.75         -    +10.75    +1.25       6
SDR: mean of medians (over sources). scored: frames the row scored by itself (fewest of its seeds).

vocals (5 of 7 frames, 2 of 2 tracks)
                              SDR    SIR    ISR    SAR
mixture (floor)             -7.00  -6.00  -5.00  -4.00
none                         3.50   4.50   5.50   6.50
concat                       6.50   7.50   8.50   9.50

bass (5 of 7 frames, 2 of 2 tracks)
                              SDR    SIR    ISR   SAR
mixture (floor)             -3.00  -2.00  -1.00  0.00
none                         5.50   6.50   7.50  8.50
concat                       5.00   6.00   7.00  8.00

mean of medians (over 2 sources)
                              SDR    SIR    ISR    SAR
mixture (floor)             -5.00  -4.00  -3.00  -2.00
none                         4.50   5.50   6.50   7.50
concat                       5.75   6.75   7.75   8.75
"""


@pytest.fixture(scope="module")
def museval():
    Museval().prepare()
    return importlib.import_module("museval")


def write_track(folder: Path, track: str, sdr: dict[str, list[float]]) -> None:
    """Write museval's JSON; SIR, ISR and SAR are the SDR plus 1, 2 and 3."""
    folder.mkdir(parents=True, exist_ok=True)
    targets = [
        {
            "name": source,
            "frames": [
                {
                    "time": float(index),
                    "duration": 1.0,
                    "metrics": {m: value + offset for offset, m in enumerate(METRICS)},
                }
                for index, value in enumerate(values)
            ],
        }
        for source, values in sdr.items()
    ]
    text = json.dumps({"targets": targets, "museval_version": "0.4.1", "track": track})
    (folder / f"{track}.json").write_text(text)


def run(folder: Path, approach: str, seed: int | None, tracks: dict) -> Scores:
    for track, sdr in tracks.items():
        write_track(folder, track, sdr)
    return Scores(label=folder.name, approach=approach, seed=seed, folder=folder)


@pytest.fixture
def floor(tmp_path) -> Scores:
    tracks = {
        "one": {"vocals": [-6.0, -6.0, -6.0, -6.0], "bass": [-4.0, -4.0, -4.0, -4.0]},
        "two": {"vocals": [-8.0, -8.0, NAN], "bass": [-2.0, -2.0, NAN]},
    }
    return run(tmp_path / "floor", "mixture", None, tracks)


@pytest.fixture
def plain(tmp_path) -> Scores:
    tracks = {
        # frame 3 of track one: this model put out zeros
        "one": {"vocals": [1.0, 5.0, 2.0, NAN], "bass": [10.0, 0.0, 4.0, NAN]},
        "two": {"vocals": [3.0, 7.0, NAN], "bass": [6.0, 8.0, NAN]},
    }
    return run(tmp_path / "plain", "none", 0, tracks)


@pytest.fixture
def concat(tmp_path) -> Scores:
    tracks = {
        # sources in another order; the last frame would lift its median if it counted
        "one": {"bass": [9.0, 9.0, 9.0, 90.0], "vocals": [4.0, 4.0, 6.0, 60.0]},
        "two": {"bass": [1.0, 1.0, NAN], "vocals": [8.0, 10.0, NAN]},
    }
    return run(tmp_path / "concat", "concat", 0, tracks)


def sdr_of(comparison: Comparison, approach: str, source: str) -> float:
    (entry,) = [entry for entry in comparison.entries if entry.approach == approach]
    return entry.values[source]["SDR"].median


def test_medians_are_over_common_frames_then_tracks(floor, plain, concat):
    comparison = compare_scores([plain, concat], floor=floor)

    # none: vocals one: median(1, 5, 2) = 2, two: median(3, 7) = 5 -> 3.5
    #       bass   one: median(10, 0, 4) = 4, two: median(6, 8) = 7 -> 5.5; mean 4.5
    assert sdr_of(comparison, "none", "vocals") == 3.5
    assert sdr_of(comparison, "none", "bass") == 5.5
    assert sdr_of(comparison, "none", MEAN_OF_MEDIANS) == 4.5
    # concat: vocals one: median(4, 4, 6) = 4 (5 if its own 4th frame counted), two: 9 -> 6.5
    #         bass   one: 9, two: 1 -> 5; mean 5.75
    assert sdr_of(comparison, "concat", "vocals") == 6.5
    assert sdr_of(comparison, "concat", "bass") == 5.0
    assert sdr_of(comparison, "concat", MEAN_OF_MEDIANS) == 5.75
    # floor: vocals median(-6, -8) = -7, bass median(-4, -2) = -3; mean -5
    assert sdr_of(comparison, "mixture", MEAN_OF_MEDIANS) == -5.0

    mixture, none, with_concat = comparison.entries
    assert mixture.improvement_db is None
    assert none.improvement_db == 9.5
    assert with_concat.improvement_db == 10.75
    assert none.difference_to_none_db is None
    assert with_concat.difference_to_none_db == 1.25
    assert mixture.difference_to_none_db is None
    values = none.values["vocals"]
    assert [values[metric].median for metric in METRICS] == [3.5, 4.5, 5.5, 6.5]


def test_counts_common_frames_and_each_runs_own(floor, plain, concat):
    comparison = compare_scores([plain, concat], floor=floor)
    assert comparison.tracks == ("one", "two")
    assert comparison.sources == ("vocals", "bass")
    assert comparison.num_frames == 7
    assert comparison.num_common_frames == {"vocals": 5, "bass": 5}
    assert comparison.num_common_tracks == {"vocals": 2, "bass": 2}
    assert [entry.num_scored_frames for entry in comparison.entries] == [6, 5, 6]

    without_zeros = compare_scores([concat], floor=floor)
    assert without_zeros.num_common_frames == {"vocals": 6, "bass": 6}
    assert sdr_of(without_zeros, "concat", "vocals") == 7.0  # (median(4, 4, 6, 60) + 9) / 2


def test_frames_are_chosen_per_source(tmp_path, floor):
    tracks = {
        "one": {"vocals": [1.0, NAN, NAN, NAN], "bass": [0.0, 1.0, 2.0, 3.0]},
        "two": {"vocals": [NAN, NAN, NAN], "bass": [5.0, 5.0, 5.0]},
    }
    comparison = compare_scores([run(tmp_path / "odd", "odd", 0, tracks)], floor=floor)
    assert comparison.num_common_frames == {"vocals": 1, "bass": 6}
    assert comparison.num_common_tracks == {"vocals": 1, "bass": 2}
    assert sdr_of(comparison, "odd", "vocals") == 1.0
    assert sdr_of(comparison, "odd", "bass") == 3.25
    assert comparison.entries[1].num_scored_frames == 1
    assert "vocals (1 of 7 frames, 1 of 2 tracks)" in format_text(comparison)
    assert "only these count: 1 to 6 of 7" in format_text(comparison)


def test_one_infinite_metric_leaves_the_frame_out(tmp_path, floor):
    scores = run(tmp_path / "x", "x", 0, {})
    sdr = {"vocals": [1.0, 2.0, 3.0, 4.0], "bass": [1.0, 2.0, 3.0, 4.0]}
    write_track(scores.folder, "one", sdr)
    write_track(scores.folder, "two", {name: values[:3] for name, values in sdr.items()})
    path = scores.folder / "one.json"
    stored = json.loads(path.read_text())
    stored["targets"][0]["frames"][0]["metrics"]["SIR"] = NAN
    path.write_text(json.dumps(stored))
    comparison = compare_scores([scores], floor=floor)
    assert comparison.num_common_frames == {"vocals": 5, "bass": 6}
    assert sdr_of(comparison, "x", "vocals") == (3.0 + 1.5) / 2


def test_seeds_make_one_row_with_its_spread(tmp_path, floor):
    def tracks(vocals, bass):
        return {
            "one": {"vocals": [vocals] * 4, "bass": [bass] * 4},
            "two": {"vocals": [vocals] * 3, "bass": [bass] * 3},
        }

    runs = [
        run(tmp_path / "a", "none", 0, tracks(1.0, 9.0)),  # mean 5
        run(tmp_path / "x", "distance", 0, tracks(4.0, 4.0)),
        run(tmp_path / "b", "none", 1, tracks(2.0, 2.0)),  # mean 2
        run(tmp_path / "c", "none", 2, tracks(3.0, 5.0)),  # mean 4
    ]
    comparison = compare_scores(runs, floor=floor)
    assert [entry.name for entry in comparison.entries] == ["mixture (floor)", "none", "distance"]
    none = comparison.entries[1]
    assert none.seeds == (0, 1, 2)
    assert none.labels == ("a", "b", "c")
    vocals, mean = none.values["vocals"]["SDR"], none.values[MEAN_OF_MEDIANS]["SDR"]
    assert (vocals.median, vocals.minimum, vocals.maximum) == (2.0, 1.0, 3.0)
    # the median of the runs' means (5, 2, 4), not the mean of the median vocals 2 and bass 5
    assert (mean.median, mean.minimum, mean.maximum) == (4.0, 2.0, 5.0)
    assert mean.per_run == (5.0, 2.0, 4.0)
    assert none.improvement_db == 9.0
    assert comparison.entries[2].difference_to_none_db == 0.0

    lines = format_text(comparison).splitlines()
    assert " ".join(lines[5].split()) == "none 3 4.00 2.00..5.00 +9.00 - 7"
    vocals = [" ".join(line.split()) for line in lines if line][7:]
    assert vocals[0] == "vocals (6 of 7 frames, 2 of 2 tracks)"
    assert vocals[3] == "none 2.00 3.00 4.00 5.00"
    assert vocals[4] == "min..max 1.00..3.00 2.00..4.00 3.00..5.00 4.00..6.00"
    assert "| 2.00 (1.00..3.00) | 3.00 (2.00..4.00) |" in format_markdown(comparison)


def test_oracle_is_the_last_row_and_takes_part_in_the_frames(tmp_path, floor, plain):
    tracks = {
        "one": {"vocals": [NAN, 9.0, 9.0, 9.0], "bass": [NAN, 7.0, 7.0, 7.0]},
        "two": {"vocals": [9.0, 9.0, NAN], "bass": [7.0, 7.0, NAN]},
    }
    oracle = run(tmp_path / "oracle", "ideal ratio mask", None, tracks)
    comparison = compare_scores([plain], floor=floor, oracle=oracle)
    assert comparison.entries[-1].name == "ideal ratio mask (oracle)"
    assert comparison.entries[-1].improvement_db == 13.0
    assert comparison.entries[-1].difference_to_none_db is None
    assert comparison.num_common_frames == {"vocals": 4, "bass": 4}
    assert sdr_of(comparison, "none", "vocals") == (3.5 + 5.0) / 2


def test_agrees_with_musevals_aggregation(tmp_path, museval):
    rng = np.random.default_rng(0)
    names = ("drums", "bass")
    # in tenths, so that museval's folder and ours hold the same numbers
    tracks = {
        f"track {index}": {
            name: np.round(rng.normal(5, 3, 4 + index), 1).tolist() for name in names
        }
        for index in range(3)
    }
    scores = run(tmp_path / "run", "none", 0, tracks)
    (tmp_path / "method").mkdir()
    scores.folder.rename(tmp_path / "method" / "test")
    scores = dataclasses.replace(scores, folder=tmp_path / "method" / "test")
    store = museval.EvalStore(frames_agg="median", tracks_agg="median")
    store.add_eval_dir(tmp_path / "method")
    expected = store.agg_frames_tracks_scores()

    comparison = compare_scores([scores], floor=scores)
    for name in names:
        for metric in METRICS:
            got = comparison.entries[1].values[name][metric].median
            assert got == pytest.approx(expected[name, metric], abs=1e-9)


def test_reads_a_folder_that_museval_itself_wrote(tmp_path, museval):
    for track in ("first", "second"):
        store = museval.TrackStore(track_name=track)
        for source in ("vocals", "bass"):
            store.add_target(source, {metric: [1.0, 3.0, np.inf] for metric in METRICS})
        store.save(tmp_path / f"{track}.json")
    scores = Scores(label="museval", approach="x", seed=None, folder=tmp_path)
    comparison = compare_scores([scores], floor=scores)
    assert comparison.tracks == ("first", "second")
    assert comparison.num_common_frames == {"vocals": 4, "bass": 4}
    assert comparison.entries[1].values["bass"]["SDR"].median == 2.0


def test_text_table(floor, plain, concat):
    assert format_text(compare_scores([plain, concat], floor=floor)) == TEXT


def test_text_stays_within_100_columns(tmp_path):
    long = "an approach with a very long name, and a weight of 0.125"
    sources = {"lead vocals " * 12: [-123.456], "bass": [-123.456]}
    other = {name: [-99.111] for name in sources}
    runs = [
        run(tmp_path / "a", long, 0, {"t": sources}),
        run(tmp_path / "b", long, 1, {"t": other}),
    ]
    text = format_text(compare_scores(runs, floor=runs[0]))
    assert max(map(len, text.splitlines())) == 100
    assert "an approach with a very l…" in text
    assert "-123.46..-99.11" in text


def test_csv_and_json_hold_every_figure(floor, plain, concat):
    comparison = compare_scores([plain, concat], floor=floor)
    rows = list(csv.DictReader(io.StringIO(format_csv(comparison))))
    assert len(rows) == 3 * 3 * 4
    (row,) = [
        row
        for row in rows
        if (row["approach"], row["source"], row["metric"]) == ("concat", "vocals", "SAR")
    ]
    assert row["median_db"] == row["min_db"] == row["max_db"] == "9.50000"
    assert (row["num_common_frames"], row["num_common_tracks"], row["num_frames"]) == (
        "5",
        "2",
        "7",
    )
    stored = json.loads(format_json(comparison))
    assert stored["entries"][2]["values"]["vocals"]["SDR"] == {
        "median": 6.5,
        "minimum": 6.5,
        "maximum": 6.5,
        "per_run": [6.5],
    }
    assert stored["entries"][2]["improvement_db"] == 10.75
    assert stored["num_common_frames"] == {"vocals": 5, "bass": 5}


def test_markdown_escapes_what_would_break_the_table(tmp_path, floor, plain):
    scores = dataclasses.replace(plain, approach="a|b")
    lines = format_markdown(compare_scores([scores], floor=floor)).splitlines()
    assert any(line.startswith("| a\\|b | 1 | 4.50 | - | +9.50 | - | 5 |") for line in lines)


def test_save_writes_four_files_and_the_same_ones_again(tmp_path, floor, plain, concat):
    folder = tmp_path / "out" / "here"
    save(compare_scores([plain, concat], floor=floor), folder)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert sorted(first) == [f"comparison.{end}" for end in ("csv", "json", "md", "txt")]
    save(compare_scores([plain, concat], floor=floor), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == first


class TestRefuses:
    def test_nothing(self, floor):
        with pytest.raises(ComparisonError, match="nothing to compare"):
            compare_scores([], floor=floor)

    def test_an_empty_folder(self, tmp_path, floor):
        scores = Scores(label="new", approach="x", seed=0, folder=tmp_path / "nowhere")
        with pytest.raises(ComparisonError, match=r"run 'new': no scores .* evaluate it first"):
            compare_scores([scores], floor=floor)

    def test_missing_tracks_by_name(self, tmp_path, floor, plain):
        (plain.folder / "two.json").unlink()
        with pytest.raises(ComparisonError, match=r"run 'plain' lacks 1 of the 2 tracks .*: 'two'"):
            compare_scores([plain], floor=floor)

    def test_a_track_that_only_one_run_has(self, floor, plain):
        write_track(plain.folder, "three", {"vocals": [1.0], "bass": [1.0]})
        with pytest.raises(ComparisonError, match=r"run 'floor' lacks 1 of the 3 tracks .*'three'"):
            compare_scores([plain], floor=floor)

    def test_other_sources(self, floor, plain):
        write_track(plain.folder, "two", {"vocals": [1.0] * 3, "piano": [1.0] * 3})
        with pytest.raises(ComparisonError, match=r"track 'two': sources \['piano', 'vocals'\]"):
            compare_scores([plain], floor=floor)

    def test_another_number_of_frames(self, floor, plain):
        write_track(plain.folder, "two", {"vocals": [1.0], "bass": [1.0]})
        with pytest.raises(ComparisonError, match="track 'two': 1 frames, but 3 in 'floor'"):
            compare_scores([plain], floor=floor)

    def test_a_seed_twice(self, floor, plain):
        with pytest.raises(ComparisonError, match="both approach 'none' with seed 0"):
            compare_scores([plain, plain], floor=floor)

    def test_a_track_twice(self, floor, plain):
        (plain.folder / "copy.json").write_text((plain.folder / "two.json").read_text())
        with pytest.raises(ComparisonError, match="track 'two' comes twice"):
            compare_scores([plain], floor=floor)

    def test_a_run_without_any_scored_frame(self, tmp_path, floor, plain):
        tracks = {
            "one": {"vocals": [NAN] * 4, "bass": [NAN] * 4},
            "two": {"vocals": [NAN] * 3, "bass": [NAN] * 3},
        }
        silent = run(tmp_path / "zeros", "zeros", 0, tracks)
        with pytest.raises(ComparisonError, match=r"run 'zeros' scored the fewest \(0 frames"):
            compare_scores([plain, silent], floor=floor)

    @pytest.mark.parametrize(
        "text",
        ["", "[]", "{}", '{"targets": [{"name": "vocals"}]}', '{"targets": 3}', "\x00"],
    )
    def test_a_file_that_is_no_result(self, floor, plain, text):
        (plain.folder / "two.json").write_text(text)
        with pytest.raises(ComparisonError, match=r"two\.json is not a museval result"):
            compare_scores([plain], floor=floor)

    def test_sources_of_different_lengths_or_none(self, floor, plain):
        write_track(plain.folder, "two", {"vocals": [1.0], "bass": [1.0, 2.0]})
        with pytest.raises(ComparisonError, match="sources with different numbers of frames"):
            compare_scores([plain], floor=floor)
        write_track(plain.folder, "two", {})
        with pytest.raises(ComparisonError, match="holds no sources"):
            compare_scores([plain], floor=floor)
