import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flsep.cache import DamagedDataError, Grid, Layout, Shards
from flsep.trainer.config import DataConfig
from flsep.trainer.data import loader, preloaded
from flsep.trainer.data.batch import Batch
from flsep.trainer.data.buffer import Buffer
from flsep.trainer.data.excerpts import ConsecutiveExcerpts, draw_excerpts
from flsep.trainer.data.loader import load_batches
from flsep.trainer.data.preloaded import PreloadedShards, require_room, wanted_signals
from flsep.trainer.data.reader import Reader
from flsep.trainer.errors import DataError

CPU = torch.device("cpu")
allocate = Buffer.allocate


def allocate_unpinned(shapes: Any, *, pin: bool) -> Buffer:
    return allocate(shapes, pin=False)


@pytest.fixture
def load(shards: Path) -> Callable[..., tuple[Shards, PreloadedShards]]:
    def make(mixing: str, signal: str | None, **options: Any) -> tuple[Shards, PreloadedShards]:
        opened = Shards(shards)
        wanted = wanted_signals(
            opened.layout, mixing, opened.tracks("train"), opened.tracks("valid")
        )
        options = {"num_threads": 2, **options}
        return opened, PreloadedShards(opened, wanted, CPU, teacher_signal=signal, **options)

    return make


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("flsep-")]


def tensors(batch: Batch) -> dict[str, Any]:
    windows = batch.windows
    found = {"stft": batch.stft, "gains": batch.gains, "names": batch.names}
    if windows is not None:
        for name in ("embeddings", "activity_db", "bounds", "inside", "held"):
            found[name] = getattr(windows, name)
    return found


class Nowhere:
    """Stands for the copies to a GPU."""

    def __init__(self, device: torch.device) -> None: ...

    def start(self, batch: Batch) -> tuple[Batch, str]:
        return batch, "copied"

    def finish(self, batch: Batch, copied: str) -> Batch:
        return batch


@pytest.mark.parametrize("place", ["where it trains", "elsewhere"])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("mixing", "signal"),
    [
        ("original", "mixture"),
        ("original", "stems"),
        ("original", None),
        ("random", "stems"),
        ("random", None),
    ],
)
def test_preloaded_batches_are_those_of_the_shards(
    load: Callable[..., tuple[Shards, PreloadedShards]],
    layout: Layout,
    mixing: str,
    signal: str | None,
    num_workers: int,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened, loaded = load(mixing, signal)
    grid = Grid(layout, 0.7)
    config = DataConfig(mixing=mixing, excerpts_per_track=4)  # type: ignore[arg-type]
    trained, _ = grid.split_by_length(opened, "train")
    for excerpts in (
        draw_excerpts(grid, trained, config, 3),
        ConsecutiveExcerpts(grid, opened.tracks("valid")),
    ):
        options: dict[str, Any] = {"epoch": 1, "batch_size": 3, "num_workers": num_workers}
        plain = list(load_batches(Reader(opened, grid, signal), excerpts, **options))
        # Loaded, nothing is read from the shards.
        with monkeypatch.context() as patch:
            patch.setattr(Shards, "read", None)
            if place == "elsewhere":  # as from host memory to a GPU: gathered in a pinned buffer
                patch.setattr(Buffer, "allocate", allocate_unpinned)
                patch.setattr(loader, "_Transfer", Nowhere)
                options["device"] = torch.device("cuda")
            found = list(load_batches(Reader(loaded, grid, signal), excerpts, **options))
        assert len(plain) > 1
        for expected, batch in zip(plain, found, strict=True):
            assert (batch.frames is loaded.frames) == (place == "where it trains")
            for name, value in tensors(expected).items():
                other = tensors(batch)[name]
                same = torch.equal(value, other) if isinstance(value, torch.Tensor) else None
                assert value == other if same is None else same, name


def test_a_preloaded_batch_that_moves_leaves_the_frames_where_they_are(
    load: Callable[..., tuple[Shards, PreloadedShards]], layout: Layout
) -> None:
    opened, loaded = load("random", None)
    grid = Grid(layout, 0.7)
    excerpts = ConsecutiveExcerpts(grid, opened.tracks("valid"))
    reader = Reader(loaded, grid, None)
    batch = next(load_batches(reader, excerpts, epoch=0, batch_size=2, num_workers=0))
    memory = batch.buffer.memory.clone()
    moved = replace(batch, buffer=Buffer(memory, batch.buffer.layout))
    assert moved.frames is loaded.frames
    assert moved.starts.data_ptr() != batch.starts.data_ptr()
    assert torch.equal(moved.stft, batch.stft)


def test_only_what_is_read_is_loaded(
    load: Callable[..., tuple[Shards, PreloadedShards]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preloaded, "_BLOCK_BYTES", 50_000)  # some blocks a signal
    frame_bytes = 2 * 129 * 2 * 2
    # 2.2, 3.1 and 2.5 s to train on, 2.4 s to validate on; windows of 0.3 s.
    trained = sum(1 + round(s * 8000) // 64 for s in (2.2, 3.1, 2.5))
    valid, windows = 1 + 19200 // 64, 7 + 10 + 8
    expected = {
        ("original", None): 4 * (trained + valid) * frame_bytes,
        ("random", None): (3 * trained + 4 * valid) * frame_bytes,
        ("random", "stems"): (3 * trained + 4 * valid) * frame_bytes + 3 * (windows + 8) * 7 * 4,
        ("original", "mixture"): 4 * (trained + valid) * frame_bytes + (windows + 8) * 7 * 4,
    }
    for (mixing, signal), num_bytes in expected.items():
        reports: list[tuple[int, int]] = []
        opened, loaded = load(mixing, signal, report=lambda *r, to=reports: to.append(r))
        assert loaded.num_bytes == num_bytes
        assert loaded.frames.dtype == torch.float16
        assert reports[-1] == (num_bytes, num_bytes)
        assert len(reports) == (13 if mixing == "random" else 16)
        assert [done for done, _ in reports] == sorted({done for done, _ in reports})
        for track in opened.tracks("valid"):
            for number in range(4):
                stored = opened.read(track, "stft", number)
                assert (loaded.read(track, "stft", number) == stored).all()


def test_what_does_not_fit_is_refused_before_loading(
    load: Callable[..., tuple[Shards, PreloadedShards]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preloaded, "free_host_bytes", lambda: 5_000_000)
    monkeypatch.setattr(Shards, "read", None)
    monkeypatch.setattr(PreloadedShards, "_count_bytes", lambda *_: 260_000_000)
    with pytest.raises(
        DataError,
        match=r"are 4\.\d\d GB; 0\.01 GB of host memory are free, of which training keeps 2\.15 GB"
        ": train without --resident",
    ):
        load("original", None)


def test_room_on_each_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preloaded, "free_host_bytes", lambda: 12_000)
    require_room(10_000, CPU, 2_000, 1)
    require_room(4_000, CPU, 2_000, 2)
    with pytest.raises(DataError, match="of host memory are free"):
        require_room(10_001, CPU, 2_000, 1)
    with pytest.raises(DataError, match="of host memory for each of 2 processes are free"):
        require_room(4_001, CPU, 2_000, 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10**9, 85 * 10**9))
    gpu = torch.device("cuda:1")
    require_room(58 * 10**9, gpu, None, 8)
    with pytest.raises(
        DataError,
        match=r"are 63\.00 GB; 80\.00 GB of memory of cuda:1 are free, of which training keeps "
        r"17\.18 GB: use --resident host",
    ):
        require_room(63 * 10**9, gpu, None, 8)


def test_damage_is_found_while_loading(
    new_shards: Callable[..., Path], tmp_path: Path, layout: Layout
) -> None:
    folder = new_shards(tmp_path / "s", {"a": ("train", 1.5), "b": ("valid", 1.5)})
    opened = Shards(folder)
    offset = opened._shard(opened.tracks("valid")[0]).tracks[0].datasets["stft"].offset
    with open(folder / "1.h5", "r+b") as file:
        file.seek(offset + 1000)
        file.write(b"\x00\x3c\x00\x3c")
    opened = Shards(folder)
    wanted = wanted_signals(layout, "random", opened.tracks("train"), opened.tracks("valid"))
    with pytest.raises(DamagedDataError, match=r"stft of mixture of track 'b' does not have its"):
        PreloadedShards(opened, wanted, CPU, teacher_signal=None, num_threads=2)


def test_loading_can_be_interrupted(load: Callable[..., tuple[Shards, PreloadedShards]]) -> None:
    reports = []

    def interrupt(done: int, total: int) -> None:
        reports.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load("original", None, report=interrupt)
    assert len(reports) == 1
