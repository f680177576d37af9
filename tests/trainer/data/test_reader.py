import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flsep.cache import DamagedDataError, Draw, Grid, Layout, Shards, Statistics
from flsep.trainer.config import DataConfig
from flsep.trainer.data import loader
from flsep.trainer.data.batch import Batch, assemble
from flsep.trainer.data.buffer import Buffer
from flsep.trainer.data.excerpts import ConsecutiveExcerpts, draw_excerpts
from flsep.trainer.data.loader import load_batches
from flsep.trainer.data.reader import Reader
from flsep.trainer.errors import DataError
from flsep.trainer.parallel import Rank
from flsep.trainer.teacher import Standard, TeacherWindows, held_windows

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
        excerpts = draw_excerpts(grid, tracks, config, 3)
        return list(load_batches(reader, excerpts, epoch=1, batch_size=5, **options))

    return load


def assert_same(first: Batch, second: Batch) -> None:
    assert first.names == second.names
    assert first.num_in_all == second.num_in_all
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


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_parts_are_the_shares_of_the_same_batches(
    epoch_of: Callable[..., list[Batch]], num_ranks: int
) -> None:
    parts = [epoch_of(num_workers=1, rank=Rank(rank, num_ranks)) for rank in range(num_ranks)]
    plain = epoch_of(num_workers=0)
    # The last batch has 2 excerpts: nothing for a third rank.
    assert [len(part) for part in parts] == [3, 3, 2][:num_ranks]
    for number, whole in enumerate(plain):
        shares = [part[number] for part in parts if number < len(part)]
        sizes = [len(ix) for ix in np.array_split(range(len(whole)), num_ranks) if len(ix)]
        assert [len(share) for share in shares] == sizes
        assert {share.num_in_all for share in shares} == {len(whole)}
        assert sum((share.names for share in shares), ()) == whole.names
        assert torch.equal(torch.cat([share.stft for share in shares], 2), whole.stft)
        if whole.gains is not None:
            gains = [share.gains for share in shares if share.gains is not None]
            assert torch.equal(torch.cat(gains, 1), whole.gains)
        if whole.windows is not None:
            found = [share.windows for share in shares if share.windows is not None]
            axis = whole.windows.embeddings.ndim - 3
            embeddings = torch.cat([windows.embeddings for windows in found], axis)
            assert torch.equal(embeddings, whole.windows.embeddings)
            assert torch.equal(torch.cat([w.held for w in found]), whole.windows.held)


def copy(batch: Batch) -> Batch:
    """Copy a batch as a transfer to a device would."""
    return replace(batch, buffer=Buffer(batch.buffer.memory.clone(), batch.buffer.layout))


class Transfer:
    """Stands for the copies to a GPU: says in which order and in which threads they happen."""

    def __init__(self, device: torch.device) -> None:
        self.log: list[tuple[str, str]] = []
        self.main = threading.current_thread()
        Transfer.last = self

    def note(self, what: str) -> None:
        self.log.append((what, "main" if threading.current_thread() is self.main else "other"))

    def start(self, batch: Batch) -> tuple[Batch, Any]:
        moved = copy(batch)
        batch.buffer.memory.fill_(77)  # it may be used again
        self.note("start")
        return moved, "copied"

    def finish(self, batch: Batch, copied: Any) -> Batch:
        assert copied == "copied"
        self.note("finish")
        return batch


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_on_the_device_when_they_are_handed_over(
    epoch_of: Callable[..., list[Batch]], num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = epoch_of(num_workers=0)
    pinned = []
    unpinned = Buffer.allocate

    def allocate(shapes: Any, *, pin: bool) -> Buffer:
        pinned.append(pin)
        return unpinned(shapes, pin=False)

    monkeypatch.setattr(loader, "_Transfer", Transfer)
    monkeypatch.setattr(Buffer, "allocate", allocate)
    loaded = epoch_of(num_workers=num_workers, device=torch.device("cuda"))
    for expected, found in zip(plain, loaded, strict=True):
        assert_same(expected, found)
    assert pinned == [True] * 3
    finished = [thread for what, thread in Transfer.last.log if what == "finish"]
    started = [thread for what, thread in Transfer.last.log if what == "start"]
    assert finished == ["main"] * 3
    assert started == ["other" if num_workers else "main"] * 3


def test_the_copies_to_a_gpu(
    epoch_of: Callable[..., list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls that make them, in order; what they do only a GPU can show."""
    log: list[Any] = []

    class Stream:
        def __init__(self, device: Any = None) -> None:
            self.device = device

        def record_event(self) -> str:
            log.append("record")
            return "event"

        def wait_event(self, event: Any) -> None:
            log.append(("wait", event))

        def __enter__(self) -> None:
            log.append("enter")

        def __exit__(self, *_: Any) -> None:
            log.append("exit")

    consumer = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: consumer)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: log.append((self.data_ptr(), stream))
    )
    batch = epoch_of(num_workers=0)[0]
    monkeypatch.setattr(type(batch), "to", lambda self, device: copy(self))
    transfer = loader._Transfer(torch.device("cuda"))
    moved, event = transfer.start(batch)
    assert log == ["enter", "record", "exit"]
    assert moved.buffer.memory.data_ptr() != batch.buffer.memory.data_ptr()
    assert_same(transfer.finish(moved, event), batch)
    assert log[3:] == [("wait", "event"), (moved.buffer.memory.data_ptr(), consumer)]


def test_a_moved_batch_is_one_buffer(epoch_of: Callable[..., list[Batch]]) -> None:
    batch = epoch_of(num_workers=0)[0]
    moved = copy(batch)
    assert_same(moved, batch)
    batch.buffer.memory.zero_()
    for tensor in (moved.frames, moved.starts, moved.swaps, moved.gains):
        if tensor is not None:
            assert tensor.untyped_storage().data_ptr() == moved.buffer.memory.data_ptr()
            assert (tensor.data_ptr() - moved.buffer.memory.data_ptr()) % 256 == 0
    assert moved.stft.any()


def test_a_pickled_reader_reads_the_same(shards: Path, layout: Layout) -> None:
    opened = Shards(shards)
    grid = Grid(layout, 0.7)
    reader = Reader(opened, grid, "stems")
    excerpts = ConsecutiveExcerpts(grid, opened.tracks("valid"))

    def load(reader: Reader) -> list[Batch]:
        return list(load_batches(reader, excerpts, epoch=0, batch_size=3, num_workers=1))

    plain = load(reader)
    for expected, found in zip(plain, load(pickle.loads(pickle.dumps(reader))), strict=True):
        assert_same(expected, found)


def test_an_excerpt_is_the_stored_slice(
    shards: Path, layout: Layout, tracks: dict[str, tuple[str, np.ndarray]]
) -> None:
    opened = Shards(shards)
    one, two = opened.tracks("train")[:2]
    reader = Reader(opened, Grid(layout, 0.7), None)
    draws = [Draw(((one, 2),), (False,), None), Draw(((two, 1),), (True,), None)]
    batch = reader.allocate(draws)
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
    batch = reader.allocate([draw])
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
    torch.testing.assert_close(example.references_SNBCF[1], spectrum[2])


def test_random_excerpts_are_sums_of_scaled_sources(
    shards: Path, layout: Layout, tracks: dict[str, tuple[str, np.ndarray]]
) -> None:
    opened = Shards(shards)
    one, two, three = opened.tracks("train")
    reader = Reader(opened, Grid(layout, 0.7), None)
    places = ((two, 3), (one, 0), (three, 1))
    swaps, gains = (False, True, False), (0.5, 1.25, 0.25)
    draw = Draw(places, swaps, gains)
    batch = reader.allocate([draw])
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
    torch.testing.assert_close(example.references_SNBCF[1, :, 0], 1.25 * spectra[1])


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
    batch = reader.allocate(draws)
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
    batch = reader.allocate([draw])
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
    with pytest.raises(DataError, match="no training split, and so no statistics"):
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


def test_the_batch_is_read_by_threads_that_end(
    epoch_of: Callable[..., list[Batch]], shards: Path, layout: Layout
) -> None:
    epoch_of(num_workers=3)
    assert not [t for t in threading.enumerate() if t.name.startswith("flsep-read")]
    opened, grid = Shards(shards), Grid(layout, 0.1)
    excerpts = ConsecutiveExcerpts(grid, opened.tracks("train"))
    batches = load_batches(
        Reader(opened, grid, None), excerpts, epoch=0, batch_size=1, num_workers=2
    )
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("flsep-read")]
