"""What grows with a corpus: the start of a training, and the tasks of Dask's scheduler."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from distributed import Client, LocalCluster

from flsep.cache import Grid, Index, Layout, Shards, Statistics, TrackRecord, write_index
from flsep.cache.format import track_datasets
from flsep.pipeline.corpus.media import AudioStream
from flsep.pipeline.corpus.tracks import Track
from flsep.pipeline.execution.runners import run_on
from flsep.pipeline.shards.plan import PlannedTrack, ShardTask
from flsep.trainer.config import DataConfig
from flsep.trainer.data.excerpts import ConsecutiveExcerpts, draw_excerpts
from flsep.trainer.data.reader import Reader

LAYOUT = Layout(
    sample_rate_hz=44100,
    num_channels=2,
    n_fft=4096,
    hop_samples=1024,
    stft_dtype="float16",
    sources=("drums", "bass", "other", "vocals"),
    teacher="vggish",
    teacher_digest="0" * 64,
    embedding_size=128,
    window_seconds=0.96,
    window_hop_seconds=0.96,
)


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[[int, float], Path]:
    """Write the index of a corpus over shards that are only as large as they would be."""

    def make(num_tracks: int, seconds: float) -> Path:
        folder = tmp_path / f"{num_tracks}-{seconds:g}"
        folder.mkdir()
        rng = np.random.default_rng(0)
        tracks, shard_bytes = [], {}
        for number in range(num_tracks):
            num_samples = int(LAYOUT.sample_rate_hz * seconds * rng.uniform(0.8, 1.2))
            num_windows = int(num_samples / LAYOUT.sample_rate_hz / LAYOUT.window_hop_seconds)
            track = TrackRecord(
                name=f"Some Artist - Some Title {number}",
                split="train" if number % 7 else "valid",
                shard=f"{number:05d}-{rng.bytes(4).hex()}.h5",
                position=0,
                num_samples=num_samples,
                num_frames=LAYOUT.num_frames(num_samples),
                num_windows=num_windows,
                has_audio=False,
                digest=rng.bytes(32).hex(),
            )
            datasets = track_datasets(
                LAYOUT, num_samples=num_samples, num_windows=num_windows, with_audio=False
            )
            size = sum(dataset.num_bytes for dataset in datasets.values())
            with open(folder / track.shard, "wb") as file:
                file.truncate(size)  # sparse: takes no room
            tracks.append(track)
            shard_bytes[track.shard] = size
        ones = np.ones((len(LAYOUT.signals), LAYOUT.embedding_size))
        statistics = Statistics(
            magnitude_mean=rng.uniform(size=LAYOUT.num_bins),
            magnitude_std=rng.uniform(size=LAYOUT.num_bins),
            embedding_mean=ones,
            embedding_std=ones,
            num_windows=np.full(len(LAYOUT.signals), 1000),
        )
        write_index(
            folder, Index(LAYOUT, {"n": 1}, {}, "0" * 64, shard_bytes, tuple(tracks), statistics)
        )
        return folder

    return make


def start(folder: Path) -> dict[str, float]:
    """Do with the data what the start of a training does; return the seconds of each part."""
    seconds = {}
    began = time.perf_counter()

    def note(part: str) -> None:
        nonlocal began
        seconds[part] = time.perf_counter() - began
        began = time.perf_counter()

    shards = Shards(folder)
    note("index")
    shards.check_files("train", "valid")
    note("files")
    grid = Grid(shards.layout, 6.0)
    train, _ = grid.split_by_length(shards, "train")
    valid, _ = grid.split_by_length(shards, "valid")
    Reader(shards, grid, "mixture")
    trained = draw_excerpts(grid, train, DataConfig(), 0)
    validated = ConsecutiveExcerpts(grid, valid)
    trained.draw(0, len(trained) - 1)
    validated.draw(0, len(validated) - 1)
    note("excerpts")
    return seconds


def test_start_up(
    make_corpus: Callable[[int, float], Path],
    full_size: bool,
    print_table: Callable[..., None],
) -> None:
    sizes = [10, 100, 1000, 10_000] if full_size else [7, 70]
    rows = []
    for num_tracks, seconds in [*((n, 240.0) for n in sizes), (sizes[-1], 2400.0)]:
        folder = make_corpus(num_tracks, seconds)
        best = min(
            (start(folder) for _ in range(5 if full_size else 1)), key=lambda s: sum(s.values())
        )
        rows.append(
            (
                str(num_tracks),
                f"{num_tracks * seconds / 3600:.1f}",
                f"{(folder / 'index.json').stat().st_size / 1e6:.3f}",
                *(f"{best[part]:.4f}" for part in ("index", "files", "excerpts")),
                f"{sum(best.values()):.3f}",
            )
        )
    print_table(
        "start of a training, its data side",
        ("tracks", "hours", "index MB", "index s", "files s", "excerpts s", "all s"),
        rows,
    )


def make_task(number: int) -> ShardTask:
    folder = Path(f"/corpus/train/track {number}")
    sources = tuple(AudioStream(folder / f"{name}.wav", 0) for name in LAYOUT.sources)
    track = Track(name=folder.name, split="train", mixture=None, sources=sources)
    return ShardTask(f"train-{number:016x}.h5", (PlannedTrack(track, 44100),), 1)


def test_tasks_of_the_scheduler(full_size: bool, print_table: Callable[..., None]) -> None:
    """The tasks are real ones; the workers do nothing with them."""
    rows = []
    for num_tasks in (1000, 10_000) if full_size else (5, 10):
        tasks = [make_task(number) for number in range(num_tasks)]
        with (
            LocalCluster(
                n_workers=2, threads_per_worker=1, processes=full_size, dashboard_address=None
            ) as cluster,
            Client(cluster) as client,
        ):
            list(run_on(client, id, tasks[:1]))
            process, peak, begun = psutil.Process(), 0, time.perf_counter()
            before = process.memory_info().rss
            for number, outcome in enumerate(run_on(client, id, tasks)):
                assert outcome.error is None
                if number % 100 == 0:
                    peak = max(peak, process.memory_info().rss)
            seconds = time.perf_counter() - begun
        rows.append(
            (
                str(num_tasks),
                f"{1000 * seconds / num_tasks:.1f}",
                f"{(peak - before) / 2**20:.0f}",
            )
        )
    print_table(
        "tasks through Dask, with the scheduler and the client in one process",
        ("tasks", "ms a task", "memory, MiB"),
        rows,
    )
