from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flsep.cache import DamagedDataError, Layout, Shards, Statistics
from flsep.trainer.approaches import TeacherWindows
from flsep.trainer.config import DataConfig
from flsep.trainer.data import Batch, DataError, Reader, Standard, assemble, load_batches
from flsep.trainer.excerpts import ConsecutiveExcerpts, Draw, Grid, RandomExcerpts, held_windows

CPU = torch.device("cpu")


@pytest.fixture(params=["original-mixture", "original-stems", "random-stems", "random-None"])
def epoch_of(
    request: pytest.FixtureRequest, shards: Path, layout: Layout
) -> Callable[..., list[Batch]]:
    mixing, signal = request.param.split("-")
    grid = Grid(layout, 0.7)

    def load(**options: Any) -> list[Batch]:
        opened = Shards(shards)
        reader = Reader(opened, grid, None if signal == "None" else signal)
        config = DataConfig(mixing=mixing, excerpts_per_track=4)
        tracks, _ = grid.split_by_length(opened, "train")
        excerpts = RandomExcerpts(grid, tracks, config, 3)
        return list(load_batches(reader, excerpts, epoch=1, batch_size=5, **options))

    return load


def assert_same(first: Batch, second: Batch) -> None:
    assert first.names == second.names
    assert torch.equal(first.stft, second.stft)
    assert (first.gains is None) == (second.gains is None)
    if first.gains is not None and second.gains is not None:
        assert torch.equal(first.gains, second.gains)
    assert (first.windows is None) == (second.windows is None)
    if first.windows is not None and second.windows is not None:
        for name in ("embeddings", "activity_db", "bounds", "inside", "held"):
            assert torch.equal(getattr(first.windows, name), getattr(second.windows, name))


def test_batches_do_not_depend_on_workers(epoch_of: Callable[..., list[Batch]]) -> None:
    plain = epoch_of(num_workers=0)
    assert [len(batch) for batch in plain] == [5, 5, 2]
    for num_workers in (1, 3):
        for expected, found in zip(plain, epoch_of(num_workers=num_workers), strict=True):
            assert_same(expected, found)
    for expected, found in zip(plain[1:], epoch_of(num_workers=3, first=1), strict=True):
        assert_same(expected, found)


def test_an_excerpt_is_the_stored_slice(
    shards: Path, layout: Layout, tracks: dict[str, tuple[str, np.ndarray]]
) -> None:
    opened = Shards(shards)
    one, two = opened.tracks("train")[:2]
    reader = Reader(opened, Grid(layout, 0.7), None)
    draws = [Draw(((one, 2),), (False,), None), Draw(((two, 1),), (True,), None)]
    batch = reader.allocate(draws, pin=False)
    for slot, draw in enumerate(draws):
        reader.fill(batch, slot, draw)
    assert batch.stft.shape == (4, 88, 2, 2, 129, 2)
    assert batch.stft.dtype == torch.float16
    assert batch.windows is None
    assert batch.names == ("'one' at 0.60 s", "'two / 2' at 0.30 s")
    for signal in range(4):
        stored = opened.read(one, "stft", signal)[75:163]
        assert (batch.stft[signal, :, 0].numpy() == stored).all()
        swapped = opened.read(two, "stft", signal)[38:126][:, [1, 0]]
        assert (batch.stft[signal, :, 1].numpy() == swapped).all()


def test_original_excerpts_sound_like_the_track(
    shards: Path, layout: Layout, tracks: dict[str, tuple[str, np.ndarray]]
) -> None:
    opened = Shards(shards)
    one = opened.tracks("train")[0]
    reader = Reader(opened, Grid(layout, 0.7), None)
    draw = Draw(((one, 2),), (True,), None)
    batch = reader.allocate([draw], pin=False)
    reader.fill(batch, 0, draw)
    example = assemble(batch, CPU, layout.hop_samples)
    start, length = 75 * 64, 87 * 64
    expected = tracks["one"][1][:, ::-1, start : start + length]
    assert example.mixture_BCT.shape == (1, 2, length)
    assert example.references_SBCT.shape == (3, 1, 2, length)
    np.testing.assert_allclose(example.mixture_BCT[0], expected[0], atol=1e-3)
    np.testing.assert_allclose(example.references_SBCT[:, 0], expected[1:], atol=1e-3)
    assert example.mixture_NBCF.shape == (88, 1, 2, 129)
    assert example.mixture_NBCF.dtype == torch.complex64
    assert example.references_SNBCF.shape == (3, 88, 1, 2, 129)
    spectrum = torch.view_as_complex(batch.stft.float())
    torch.testing.assert_close(example.references_SNBCF[1], spectrum[2].abs())


def test_random_excerpts_are_sums_of_scaled_sources(
    shards: Path, layout: Layout, tracks: dict[str, tuple[str, np.ndarray]]
) -> None:
    opened = Shards(shards)
    one, two, three = opened.tracks("train")
    reader = Reader(opened, Grid(layout, 0.7), None)
    places = ((two, 3), (one, 0), (three, 1))
    swaps, gains = (False, True, False), (0.5, 1.25, 0.25)
    draw = Draw(places, swaps, gains)
    batch = reader.allocate([draw], pin=False)
    reader.fill(batch, 0, draw)
    example = assemble(batch, CPU, layout.hop_samples)
    expected = []
    for source, ((track, window), swap, gain) in enumerate(zip(places, swaps, gains, strict=True)):
        start = {0: 0, 1: 38, 3: 113}[window] * 64
        audio = tracks[track.name][1][1 + source, :, start : start + 87 * 64]
        expected.append(gain * (audio[::-1] if swap else audio))
    np.testing.assert_allclose(example.references_SBCT[:, 0], expected, atol=1e-3)
    np.testing.assert_allclose(example.mixture_BCT[0], sum(expected), atol=2e-3)
    spectra = torch.view_as_complex(batch.stft.float())[:, :, 0]
    mixture = sum(gain * spectrum for gain, spectrum in zip(gains, spectra, strict=True))
    torch.testing.assert_close(example.mixture_NBCF[:, 0], mixture)
    torch.testing.assert_close(example.references_SNBCF[1, :, 0], 1.25 * spectra[1].abs())


def plain_windows(
    shards: Shards, standard: Standard, grid: Grid, place: tuple[Any, int], signal: int
) -> list[tuple[list[float], float, tuple[int, int], bool]]:
    """One window at a time: embedding, activity, bounds, inside."""
    track, first = place
    layout = shards.layout
    start = layout.window_frames(first)[0]
    windows = []
    for number in range(first, first + grid.num_windows):
        begin, end = (frame - start for frame in layout.window_frames(number))
        if number < track.num_windows:
            embedding = shards.read(track, "embedding", signal)[number]
            standardised = (embedding - standard.mean) * standard.scale
            activity = float(shards.read(track, "activity", signal)[number])
            windows.append((standardised, activity, (begin, end), end <= grid.num_frames))
        else:
            empty = np.zeros(layout.embedding_size)
            windows.append((empty, -np.inf, (begin, end), False))
    return windows


def assert_windows(found: TeacherWindows, entry: tuple[int, ...], expected: list[Any]) -> None:
    embeddings, activity, bounds, inside = zip(*expected, strict=True)
    np.testing.assert_allclose(found.embeddings[entry], np.stack(embeddings), rtol=1e-5, atol=1e-6)
    assert found.activity_db[entry].tolist() == list(activity)
    assert found.bounds[entry].tolist() == [list(pair) for pair in bounds]
    assert found.inside[entry].tolist() == list(inside)


def test_windows_of_the_mixture(shards: Path, layout: Layout) -> None:
    opened, grid = Shards(shards), Grid(layout, 0.7)
    one = opened.tracks("train")[0]
    reader = Reader(opened, grid, "mixture")
    assert one.num_windows == 7
    assert reader.standard is not None
    # The last one starts late: its third window is not in the track.
    draws = [Draw(((one, k),), (False,), None) for k in (0, 1, 4, 5)]
    batch = reader.allocate(draws, pin=False)
    assert batch.windows is not None
    for slot, draw in enumerate(draws):
        reader.fill(batch, slot, draw)
        expected = plain_windows(opened, reader.standard, grid, draw.places[0], 0)
        assert_windows(batch.windows, (slot,), expected)
        first = draw.places[0][1]
        start = layout.window_frames(first)[0]
        held = held_windows(layout, np.arange(start, start + 88), 7) - first
        assert batch.windows.held[slot].tolist() == held.tolist()
    assert batch.windows.inside.tolist()[0] == [True, True, False]
    assert batch.windows.held[0].tolist() == [0] * 38 + [1] * 37 + [2] * 13
    assert batch.windows.held[3].tolist() == [0] * 37 + [1] * 51  # the last one goes on


def test_windows_of_stems_from_different_places(shards: Path, layout: Layout) -> None:
    opened, grid = Shards(shards), Grid(layout, 0.7)
    one, two, three = opened.tracks("train")
    reader = Reader(opened, grid, "stems")
    assert reader.standard is not None
    draw = Draw(((two, 3), (one, 0), (three, 5)), (False,) * 3, (1.0, 0.5, 1.0))
    batch = reader.allocate([draw], pin=False)
    reader.fill(batch, 0, draw)
    assert batch.windows is not None
    assert batch.windows.embeddings.shape == (3, 1, 3, 6)
    for source in range(3):
        expected = plain_windows(opened, reader.standard, grid, draw.places[source], 1 + source)
        assert_windows(batch.windows, (source, 0), expected)
    # Windows start on different fractions of a frame, so each source has its own bounds.
    assert batch.windows.bounds[1, 0].tolist() != batch.windows.bounds[0, 0].tolist()


def test_standard_of_stems_pools_their_windows() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(m, s, (n, 4)) for m, s, n in ((0, 1, 50), (3, 0.5, 20), (-1, 2, 5))]
    parts[0][:, 3] = parts[1][:, 3] = parts[2][:, 3] = 7.0  # never moves
    mixture = rng.normal(9, 3, (40, 4))
    signals = [mixture, *parts]
    statistics = Statistics(
        np.zeros(1),
        np.zeros(1),
        np.stack([s.mean(0) for s in signals]),
        np.stack([s.std(0) for s in signals]),
        np.array([len(s) for s in signals]),
    )
    pooled = np.concatenate(parts)
    standard = Standard.of(statistics, "stems")
    np.testing.assert_allclose(standard.mean, pooled.mean(0), rtol=1e-5)
    np.testing.assert_allclose(1 / standard.scale[:3], pooled.std(0)[:3], rtol=1e-5)
    assert standard.scale[3] == 0
    np.testing.assert_allclose(Standard.of(statistics, "mixture").mean, mixture.mean(0), rtol=1e-5)
    standardised = standard(pooled.astype(np.float32))
    np.testing.assert_allclose(standardised[:, :3].std(0), 1, rtol=1e-4)
    assert (standardised[:, 3] == 0).all()


def test_silent_signals_have_no_standard() -> None:
    shape = (3, 4)
    statistics = Statistics(
        np.zeros(1), np.zeros(1), np.zeros(shape), np.zeros(shape), np.array([5, 0, 0])
    )
    Standard.of(statistics, "mixture")
    with pytest.raises(DataError, match="every teacher window of the training split's stems"):
        Standard.of(statistics, "stems")


def test_embeddings_without_a_training_split_are_refused(
    new_shards: Callable[..., Path], tmp_path: Path, layout: Layout
) -> None:
    opened = Shards(new_shards(tmp_path / "s", {"v": ("valid", 1.0)}))
    Reader(opened, Grid(layout, 0.7), None)
    with pytest.raises(DataError, match="no training split, hence no statistics"):
        Reader(opened, Grid(layout, 0.7), "mixture")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_shard_is_named_when_it_is_due(
    new_shards: Callable[..., Path], tmp_path: Path, layout: Layout, num_workers: int
) -> None:
    folder = new_shards(tmp_path / "s", {"a": ("train", 1.5), "b": ("valid", 1.5)})
    path = folder / "1.h5"
    opened = Shards(folder)
    offset = opened._shard(opened.tracks("valid")[0]).tracks[0].datasets["stft"].offset
    with open(path, "r+b") as file:
        file.seek(offset + 1000)
        file.write(b"\x00\x3c\x00\x3c")
    grid = Grid(layout, 0.7)
    opened = Shards(folder)
    excerpts = ConsecutiveExcerpts(grid, opened.tracks("valid"))
    batches = load_batches(
        Reader(opened, grid, None), excerpts, epoch=0, batch_size=1, num_workers=num_workers
    )
    with pytest.raises(DamagedDataError, match=r"stft of mixture of track 'b' does not have its"):
        next(batches)


def test_the_batch_is_read_by_threads_that_end(epoch_of: Callable[..., list[Batch]]) -> None:
    import threading

    epoch_of(num_workers=3)
    assert not [t for t in threading.enumerate() if t.name.startswith("flsep-read")]
