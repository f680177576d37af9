from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flsep.cache import Grid, Layout, MissingDataError, Shards, TrackRecord
from flsep.trainer.config import DataConfig
from flsep.trainer.data.excerpts import (
    BatchesOfRank,
    ConsecutiveExcerpts,
    draw_excerpts,
    smallest_batch,
)
from flsep.trainer.parallel import Rank
from flsep.trainer.teacher import held_windows


def record(name: str, layout: Layout, num_samples: int, num_windows: int) -> TrackRecord:
    return TrackRecord(
        name=name,
        split="train",
        shard="0.h5",
        position=0,
        num_samples=num_samples,
        num_frames=layout.num_frames(num_samples),
        num_windows=num_windows,
        has_audio=False,
        digest="",
    )


def test_grid_by_hand(layout: Layout) -> None:
    # 0.7 s are 5600 samples, 87 whole hops of 64; a window is 37.5 hops.
    grid = Grid(layout, 0.7)
    assert grid.num_frames == 88
    assert grid.num_windows == 3
    assert grid.num_whole_windows == 2
    assert grid.bounds(0).tolist() == [[0, 38], [38, 75], [75, 113]]
    assert grid.bounds(1).tolist() == [[0, 37], [37, 75], [75, 112]]
    assert grid.first_frame(1) == 38


def test_starts_keep_the_whole_excerpt_inside(layout: Layout) -> None:
    grid = Grid(layout, 0.7)
    # 2 s: 251 frames, so that an excerpt starts at frame 163 at the latest; window 4 at 150.
    assert grid.starts(record("a", layout, 16000, 6)) == range(5)
    assert grid.starts(record("a", layout, 5600, 2)) == range(1)
    assert grid.starts(record("a", layout, 5567, 2)) == range(0)
    # No embedding starts beyond the last window.
    assert grid.starts(record("a", layout, 16000, 2)) == range(2)


def plain_starts(grid: Grid, track: TrackRecord) -> list[int]:
    last_frame = track.num_frames - grid.num_frames
    return [k for k in range(track.num_windows) if grid.first_frame(k) <= last_frame]


def plain_places(grid: Grid, track: TrackRecord) -> list[int]:
    """Where the excerpts of a track start that cover it, one after the other."""
    starts, places = plain_starts(grid, track), [0]
    while places[-1] < starts[-1]:
        end = grid.first_frame(places[-1]) + grid.num_frames
        following = [k for k in starts if grid.first_frame(k) <= end][-1]
        places.append(max(places[-1] + 1, following))
    return places


@pytest.mark.parametrize("window_hop_seconds", [0.3, 0.96, 0.032, 0.004])
@pytest.mark.parametrize("excerpt_seconds", [0.1, 0.7, 1.1])
def test_starts_and_places_by_plain_loops(
    layout: Layout, excerpt_seconds: float, window_hop_seconds: float
) -> None:
    layout = replace(layout, window_hop_seconds=window_hop_seconds)
    grid = Grid(layout, excerpt_seconds)
    rng = np.random.default_rng(0)
    tracks = []
    for number, num_samples in enumerate([1, 7680, 7679, 15360, *rng.integers(1, 30000, 40)]):
        num_windows = max(1, int(num_samples / (window_hop_seconds * 8000)))
        tracks.append(record(str(number), layout, int(num_samples), num_windows))
        assert list(grid.starts(tracks[-1])) == plain_starts(grid, tracks[-1])
    tracks = [track for track in tracks if grid.starts(track)]
    excerpts = ConsecutiveExcerpts(grid, tracks)
    expected = [(track, k) for track in tracks for k in plain_places(grid, track)]
    assert [excerpts.draw(0, index).places[0] for index in range(len(excerpts))] == expected
    with pytest.raises(IndexError, match=f"excerpt {len(excerpts)} of {len(excerpts)}"):
        excerpts.draw(0, len(excerpts))


@pytest.mark.parametrize("count", [1, 5, 8, 16])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
def test_shares_are_those_of_array_split(count: int, num_ranks: int) -> None:
    indices = range(100, 100 + count)
    shares = [list(Rank(rank, num_ranks).share(indices)) for rank in range(num_ranks)]
    assert shares == [part.tolist() for part in np.array_split(indices, num_ranks)]


@pytest.mark.parametrize("num_tracks", [1, 2, 3, 5])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_whole_batches_of_each_rank_in_turn(
    layout: Layout, num_ranks: int, num_tracks: int
) -> None:
    grid, size = Grid(layout, 0.7), 4
    tracks = [record(str(number), layout, 16000, 6) for number in range(num_tracks)]
    excerpts = ConsecutiveExcerpts(grid, tracks)  # 3 of each
    batches = [
        [excerpts.draw(0, k) for k in range(start, min(start + size, len(excerpts)))]
        for start in range(0, len(excerpts), size)
    ]
    for rank in range(num_ranks):
        own = BatchesOfRank(excerpts, size, Rank(rank, num_ranks))
        drawn = [own.draw(0, index) for index in range(len(own))]
        assert drawn == [draw for batch in batches[rank::num_ranks] for draw in batch]


def test_impossible_part() -> None:
    with pytest.raises(ValueError, match=r"rank is 2; expected one in \[0, 2\)"):
        Rank(2, 2)


def test_smallest_batch_by_hand() -> None:
    cases = {(32, 16): 16, (33, 16): 1, (47, 16): 15, (7, 16): 7, (16, 16): 16}
    assert {pair: smallest_batch(*pair) for pair in cases} == cases


def test_held_windows_by_a_plain_loop(layout: Layout) -> None:
    frames = np.arange(160)
    seconds = frames * 64 / 8000
    expected = [max(k for k in range(4) if k * 0.3 <= t + 1e-9) for t in seconds]
    assert held_windows(layout, frames, 4).tolist() == expected
    assert held_windows(layout, frames, 2).tolist() == np.minimum(expected, 1).tolist()


def test_split_by_length(new_shards: Callable[..., Path], tmp_path: Path, layout: Layout) -> None:
    folder = new_shards(
        tmp_path / "s", {"long": ("train", 1.5), "short": ("train", 0.65), "v": ("valid", 0.65)}
    )
    shards, grid = Shards(folder), Grid(layout, 0.7)
    long_enough, short = grid.split_by_length(shards, "train")
    assert [t.name for t in long_enough] == ["long"]
    assert [t.name for t in short] == ["short"]
    with pytest.raises(
        MissingDataError,
        match=r"'valid' can hold an excerpt of 0.7 s; the longest, 'v', has 0.65 s",
    ):
        grid.split_by_length(shards, "valid")
    with pytest.raises(MissingDataError, match="no track in the split 'test'"):
        grid.split_by_length(shards, "test")


@pytest.fixture
def records(layout: Layout) -> list[TrackRecord]:
    return [record(name, layout, n, n // 2400) for name, n in (("a", 16000), ("b", 40000))]


@pytest.mark.parametrize("mixing", ["original", "random"])
def test_a_draw_depends_on_seed_epoch_and_index_alone(
    layout: Layout, records: list[TrackRecord], mixing: str
) -> None:
    config = DataConfig(mixing=mixing, excerpts_per_track=8)  # type: ignore[arg-type]
    grid = Grid(layout, 0.7)

    def draws(seed: int, epoch: int, order: list[int]) -> dict[int, object]:
        excerpts = draw_excerpts(grid, records, config, seed)
        return {index: excerpts.draw(epoch, index) for index in order}

    first = draws(0, 0, list(range(16)))
    assert draws(0, 0, list(range(15, -1, -1))) == first
    assert draws(1, 0, list(range(16))) != first
    assert draws(0, 1, list(range(16))) != first


def test_original_excerpts_take_every_track_equally(
    layout: Layout, records: list[TrackRecord]
) -> None:
    excerpts = draw_excerpts(Grid(layout, 0.7), records, DataConfig(excerpts_per_track=50), 0)
    drawn = [excerpts.draw(3, index) for index in range(len(excerpts))]
    assert Counter(d.places[0][0].name for d in drawn) == {"a": 50, "b": 50}
    names = [d.places[0][0].name for d in drawn]
    assert names != sorted(names)  # in random order
    assert {d.places[0][1] for d in drawn if d.places[0][0].name == "a"} == {0, 1, 2, 3, 4}
    assert all(d.gains is None and len(d.places) == 1 for d in drawn)
    assert 30 < sum(d.swaps[0] for d in drawn) < 70


def test_random_excerpts_draw_every_source_apart(
    layout: Layout, records: list[TrackRecord]
) -> None:
    config = DataConfig(mixing="random", excerpts_per_track=100)
    excerpts = draw_excerpts(Grid(layout, 0.7), records, config, 0)
    drawn = [excerpts.draw(0, index) for index in range(len(excerpts))]
    gains = np.array([d.gains for d in drawn])
    assert gains.shape == (200, 3)
    assert gains.min() >= 0.25
    assert gains.max() <= 1.25
    assert abs(gains.mean() - 0.75) < 0.05
    assert abs(np.corrcoef(gains.T)[0, 1]) < 0.2
    swaps = np.array([d.swaps for d in drawn])
    assert swaps.shape == (200, 3)
    assert 0.4 < swaps.mean() < 0.6
    assert any(len({place[0].name for place in d.places}) == 2 for d in drawn)
    assert any(len({place[1] for place in d.places}) == 3 for d in drawn)


@pytest.mark.parametrize("excerpt_seconds", [0.2, 0.3, 0.7, 1.1])
@pytest.mark.parametrize("num_samples", [9000, 16000, 20011])
def test_validation_covers_whole_tracks(
    layout: Layout, excerpt_seconds: float, num_samples: int
) -> None:
    grid = Grid(layout, excerpt_seconds)
    track = record("a", layout, num_samples, num_samples // 2400)
    excerpts = ConsecutiveExcerpts(grid, [track, replace(track, name="b")])
    drawn = [excerpts.draw(0, index) for index in range(len(excerpts))]
    assert drawn == [excerpts.draw(5, index) for index in range(len(excerpts))]
    assert [d.places[0][0].name for d in drawn] == sorted(d.places[0][0].name for d in drawn)
    starts = [grid.first_frame(d.places[0][1]) for d in drawn if d.places[0][0].name == "a"]
    assert starts[0] == 0
    assert starts[-1] == grid.first_frame(grid.starts(track)[-1])
    if excerpt_seconds >= layout.window_hop_seconds:
        gaps = np.diff(starts) - grid.num_frames
        assert (gaps <= 0).all()
    # No more than needed: leaving one out would leave a gap.
    for before, after in zip(starts[:-2], starts[2:], strict=True):
        assert after - before > grid.num_frames
    assert all(d.gains is None and d.swaps == (False,) for d in drawn)
