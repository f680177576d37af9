"""The offline stage on the real track: its split, and a shard's size and read speed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flsep.cache import ShardFile
from flsep.pipeline.build import ShardSettings, make_shard
from flsep.pipeline.config import FeatureConfig
from flsep.pipeline.plan import ShardTask, plan_shards
from flsep.pipeline.teacher import Teacher
from flsep.pipeline.tracks import find_corpus

EXCERPT_FRAMES = 259  # 6 s


@pytest.fixture
def job(tmp_path: Path, corpus: Path, bench_teacher: Path) -> tuple[ShardTask, ShardSettings]:
    """Return the task of making the real track's shard, and its settings."""
    config = FeatureConfig()
    found = find_corpus(corpus)
    teacher = Teacher.load(str(bench_teacher))
    settings = ShardSettings(
        folder=tmp_path,
        config=config,
        sources=found.sources,
        teacher=teacher.info,
        teacher_folder=bench_teacher,
        num_threads=2,
    )
    (task,) = plan_shards(found, config).tasks
    return task, settings


@pytest.fixture
def corpus(tmp_path: Path, example_track: Path) -> Path:
    (tmp_path / "corpus" / "train").mkdir(parents=True)
    (tmp_path / "corpus" / "train" / example_track.name).symlink_to(example_track)
    return tmp_path / "corpus"


def test_precompute(
    job: tuple[ShardTask, ShardSettings],
    tmp_path: Path,
    bench_teacher: Path,
    full_size: bool,
    print_table: Callable[..., None],
) -> None:
    task, settings = job
    seconds = task.audio_seconds(settings.config.sample_rate_hz)
    make_shard(task, settings)
    best: dict[str, float] = {}
    for _ in range(5 if full_size else 1):
        (tmp_path / task.name).unlink()
        report = make_shard(task, settings)
        assert report.num_tracks == 1
        spent = {part: report.seconds[part] for part in ("decode", "stft", "teacher", "write")}
        if not best or sum(spent.values()) < sum(best.values()):
            best = spent
    total = sum(best.values())
    rows = [
        (part, f"{spent:.3f}", f"{100 * spent / total:.0f} %", f"{seconds / spent:.0f}")
        for part, spent in best.items()
    ]
    rows.append(("all", f"{total:.3f}", "100 %", f"{seconds / total:.1f}"))
    print_table(
        f"precompute, {seconds:.2f} s of five stereo streams, {bench_teacher.name}, one process",
        ("part", "seconds", "share", "audio seconds a second"),
        rows,
    )


def test_shard_reading(
    job: tuple[ShardTask, ShardSettings],
    tmp_path: Path,
    best_seconds: Callable[..., list[float]],
    print_table: Callable[..., None],
) -> None:
    task, settings = job
    make_shard(task, settings)
    shard = ShardFile(tmp_path / task.name)
    spectrum = shard.read(0, "stft", 0, verify=True)
    length = min(EXCERPT_FRAMES, len(spectrum) - 1)
    buffer = np.empty((length, *spectrum.shape[1:]), spectrum.dtype)
    source = np.ones_like(buffer)

    def read() -> None:
        for signal in range(5):
            np.copyto(buffer, shard.read(0, "stft", signal, verify=True)[1 : 1 + length])

    def copy() -> None:
        for _ in range(5):
            np.copyto(buffer, source)

    read()
    np.testing.assert_array_equal(buffer, shard.read(0, "stft", 4, verify=True)[1 : 1 + length])
    read_seconds, copy_seconds = best_seconds(read, copy, rounds=50)
    size = 5 * buffer.nbytes
    seconds = task.audio_seconds(settings.config.sample_rate_hz)
    print_table(
        f"shard: {shard.num_bytes / 1e6:.1f} MB for {seconds:.2f} s, "
        f"{shard.num_bytes / seconds / 1e6:.2f} MB a second of audio (page cache warm)",
        ("6 s excerpt of 5 signals", "GB/s", "share of copy"),
        [
            ("copy in memory", f"{size / copy_seconds / 1e9:.1f}", "1"),
            (
                "read from the shard",
                f"{size / read_seconds / 1e9:.1f}",
                f"{copy_seconds / read_seconds:.2f}",
            ),
        ],
    )
