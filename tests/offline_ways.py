"""Ways to take a stem file into features, each run in a process of its own.

python offline_ways.py WAY ARGUMENT... loads what it needs, prints a line, waits for one on its
standard input, works, and prints a JSON object.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

_BATCH_WINDOWS = 128
_SMALL_BATCH_WINDOWS = 6  # what one call for each stem of a clip of six seconds gives


class Clock:
    """Wall time of each part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


def _wait() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


def plain(track: Path, teacher_folder: Path, out: Path) -> dict[str, Any]:
    """Do it as a script does that nobody made fast."""
    import h5py
    import librosa
    import stempeg

    from flsep.pipeline.teachers.loading import load_teacher

    teacher = load_teacher(teacher_folder, batch_windows=_SMALL_BATCH_WINDOWS)
    teacher(np.zeros(4 * teacher.info.window_samples, np.float32))
    librosa.stft(np.zeros((2, 8192), np.float32))
    measure = Clock()
    _wait()
    with measure("decode"):
        signals, rate_hz = stempeg.read_stems(str(track))
    with h5py.File(out / "plain.h5", "w") as file:
        for number, signal in enumerate(signals):
            waveform = signal.T.astype(np.float32)
            with measure("stft"):
                spectrum = librosa.stft(waveform, n_fft=4096, hop_length=1024)
            with measure("decode"):
                mono = librosa.resample(waveform.mean(axis=0), orig_sr=rate_hz, target_sr=16000)
            with measure("teacher"):
                embedding = teacher(mono)
            with measure("write"):
                file.create_dataset(f"stft/{number}", data=spectrum, compression="gzip")
                file.create_dataset(f"embedding/{number}", data=embedding, compression="gzip")
    return {"seconds": measure.seconds}


def flsep(corpus: Path, teacher_folder: Path, out: Path, *sources: str) -> dict[str, Any]:
    """Make the shard of a corpus of one track, as a worker does: the teacher has one thread."""
    from flsep.pipeline.config import FeatureConfig
    from flsep.pipeline.corpus.tracks import find_corpus
    from flsep.pipeline.shards.build import make_shard
    from flsep.pipeline.shards.plan import plan_shards
    from flsep.pipeline.shards.settings import ShardSettings
    from flsep.pipeline.teachers.loading import load_once, load_teacher

    config = FeatureConfig()
    found = find_corpus(corpus, sources=sources or None)
    info = load_teacher(teacher_folder, num_threads=1).info
    settings = ShardSettings(
        folder=out,
        config=config,
        sources=found.sources,
        teacher=info,
        teacher_folder=teacher_folder,
        num_threads=1,
    )
    (task,) = plan_shards(found, config, shard_bytes=1 << 40).tasks
    teacher = load_once(settings.teacher_folder, settings.teacher, settings.num_threads)
    large_batch = _time_large_batches(teacher)
    _wait()
    rates = [large_batch()]
    start = time.perf_counter(), time.process_time()
    report = make_shard(task, settings)
    wall_seconds = time.perf_counter() - start[0]
    cpu_seconds = time.process_time() - start[1]
    rates.append(large_batch())
    if report.rejected:
        raise RuntimeError(report.rejected)
    with open(f"/proc/{os.getpid()}/status", encoding="ascii") as file:
        status = dict(line.split(":", 1) for line in file)
    window_seconds = info.hop_samples / info.sample_rate_hz
    num_windows = (1 + len(found.sources)) * int(report.audio_seconds / window_seconds)
    return {
        "seconds": {part: report.seconds[part] for part in ("decode", "stft", "teacher", "write")},
        "wall_seconds": wall_seconds,
        "cpu_seconds": cpu_seconds,
        "windows_per_second": num_windows / report.seconds["teacher"],
        "large_batch_windows_per_second": float(np.mean(rates)),
        # ru_maxrss would count the process that started this one too
        "peak_bytes": int(status["VmHWM"].split()[0]) << 10,
        "shard_bytes": (out / task.name).stat().st_size,
    }


def mixes(shards: Path, teacher_folder: Path, out: Path, excerpts_per_track: str) -> dict[str, Any]:
    """Render an epoch of mixes, as a worker does: the teacher has one thread."""
    from flsep.cache import Shards
    from flsep.pipeline.mixes.run import make_config, plan_mixes
    from flsep.pipeline.mixes.task import MixesSettings, render_mixes
    from flsep.pipeline.stopwatch import Stopwatch
    from flsep.pipeline.teachers.loading import load_once, load_teacher

    info = load_teacher(teacher_folder, num_threads=1).info
    config = make_config(
        Shards(shards),
        info,
        split="train",
        seed=0,
        excerpt_seconds=6.0,
        excerpts_per_track=int(excerpts_per_track),
        min_gain=0.25,
        max_gain=1.25,
        swap_probability=0.5,
        with_stems=False,
        embedding_dtype="float32",
    )
    settings = MixesSettings(
        folder=out,
        shards=shards,
        config=config,
        teacher=info,
        teacher_folder=teacher_folder,
        num_threads=1,
        verify=False,
    )
    large_batch = _time_large_batches(load_once(teacher_folder, info, 1))
    _wait()
    rates = [large_batch()]
    seconds, start = Stopwatch(), time.perf_counter()
    for task in plan_mixes(config, 1):
        seconds.add(render_mixes(task, settings).seconds)
    wall_seconds = time.perf_counter() - start
    rates.append(large_batch())
    num_windows = config.num_mixes * config.num_windows
    return {
        "seconds": {part: seconds[part] for part in ("mix", "invert", "teacher", "write")},
        "wall_seconds": wall_seconds,
        "num_mixes": config.num_mixes,
        "num_windows": config.num_windows,
        "windows_per_second": num_windows / wall_seconds,
        "large_batch_windows_per_second": float(np.mean(rates)),
        "mix_bytes": sum(path.stat().st_size for path in out.glob("*.h5")) / config.num_mixes,
    }


def _time_large_batches(teacher: Any) -> Callable[[], float]:
    """Return what measures the windows a second of a teacher that is asked in large batches."""
    info = teacher.info
    num_samples = (_BATCH_WINDOWS - 1) * info.hop_samples + info.window_samples
    noise = 0.1 * np.random.default_rng(0).standard_normal(num_samples, dtype=np.float32)
    teacher(noise[: 4 * info.window_samples])

    def measure() -> float:
        start = time.perf_counter()
        teacher(noise)
        return _BATCH_WINDOWS / (time.perf_counter() - start)

    return measure


def spin(seconds: str) -> dict[str, Any]:
    """Count what a loop that needs no memory does."""
    _wait()
    numbers = np.linspace(0, 1, 1000)
    rounds, end = 0, time.perf_counter() + float(seconds)
    while time.perf_counter() < end:
        np.sin(numbers)
        rounds += 1
    return {"rounds_per_second": rounds / float(seconds)}


def copy(source: Path, out: Path) -> dict[str, Any]:
    """Copy the bytes of a file to the disk in blocks of 2 MiB; the flush is not counted."""
    data = memoryview(source.read_bytes())
    with open(out / "copy", "wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, len(data))
        _wait()
        start = time.perf_counter()
        for first in range(0, len(data), 2 << 20):
            file.write(data[first : first + (2 << 20)])
        copied = time.perf_counter() - start
    return {"bytes_per_second": len(data) / copied}


def run_together(*commands: tuple[object, ...]) -> list[dict[str, Any]]:
    """Run ways, each a name and its arguments, in processes that begin at the same time."""
    program = [sys.executable, __file__]
    processes = [
        subprocess.Popen(
            [*program, *map(str, command)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    results = []
    for process in processes:
        output, _ = process.communicate()
        assert process.returncode == 0
        results.append(json.loads(output))
    return results


if __name__ == "__main__":
    ways: dict[str, Callable[..., dict[str, Any]]] = {
        "plain": plain,
        "flsep": flsep,
        "mixes": mixes,
        "spin": spin,
        "copy": copy,
    }
    name, *arguments = sys.argv[1:]
    values = [Path(value) if os.sep in value else value for value in arguments]
    print(json.dumps(ways[name](*values)), flush=True)
