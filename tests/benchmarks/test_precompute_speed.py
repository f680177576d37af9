"""The offline stage on the real track: against a plain script, its parts, and its limits."""

import os
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from offline_ways import run_together

from flsep.pipeline.config import WORKER_BYTES

PARTS = ("decode", "stft", "teacher", "write")


def repeat_packets(source: Path, target: Path, times: int) -> None:
    """Write a stem file that holds all streams of another a number of times."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        streams = {
            stream.index: new.add_stream_from_template(stream) for stream in old.streams.audio
        }
        packets: dict[int, list[bytes]] = {index: [] for index in streams}
        for packet in old.demux(old.streams.audio):
            if packet.size:
                packets[packet.stream.index].append(bytes(packet))
        num_packets = min(map(len, packets.values()))
        for number in range(times * num_packets):
            for index, stream in streams.items():
                packet = av.Packet(packets[index][number % num_packets])
                packet.stream, packet.time_base = stream, Fraction(1, 44100)
                packet.pts = packet.dts = 1024 * number
                packet.duration = 1024
                new.mux(packet)


@pytest.fixture
def corpora(tmp_path: Path, example_track: Path, full_size: bool) -> list[Path]:
    """Two corpora of one track each, the real one repeated to two minutes."""
    track = tmp_path / "long.stem.mp4"
    repeat_packets(example_track, track, 20 if full_size else 1)
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        (folder / "train").mkdir(parents=True)
        (folder / "train" / track.name).symlink_to(track)
        (folder / "out").mkdir()
    return folders


@pytest.mark.usefixtures("ffmpeg_on_path")
def test_precompute(
    corpora: list[Path],
    teacher: Path,
    full_size: bool,
    print_table: Callable[..., None],
) -> None:
    track = next((corpora[0] / "train").iterdir())
    with av.open(str(track)) as container:
        assert container.duration is not None
        seconds = container.duration / av.time_base

    def work(*folders: Path) -> list[dict[str, Any]]:
        for folder in folders:
            for shard in (folder / "out").glob("*.h5"):
                shard.unlink()
        return run_together(*(("flsep", folder, teacher, folder / "out") for folder in folders))

    spin = ("spin", "1" if full_size else "0.1")
    spins = [
        sum(result["rounds_per_second"] for result in run_together(*commands))
        for commands in ([spin], [spin, spin])
    ]
    (plain,) = run_together(("plain", track, teacher, corpora[0] / "out"))
    (corpora[0] / "out" / "plain.h5").unlink()
    rounds = range(2 if full_size else 1)
    pairs = [work(*corpora) for _ in rounds]
    two = min(pairs, key=lambda results: max(result["wall_seconds"] for result in results))
    alone = [work(corpora[0])[0] for _ in rounds] if full_size else two
    one = min(alone, key=lambda result: result["wall_seconds"])
    shard = next((corpora[0] / "out").glob("*.h5"))
    (copied,) = run_together(("copy", shard, corpora[1] / "out"))
    plain_seconds = sum(plain["seconds"].values())
    two_seconds = max(result["wall_seconds"] for result in two) / 2

    def describe(name: str, took: float, parts: dict[str, float]) -> tuple[str, ...]:
        shares = [f"{parts[p]:.1f} s, {100 * parts[p] / sum(parts.values()):.0f} %" for p in PARTS]
        return (name, f"{seconds / took:.1f}", f"{plain_seconds / took:.1f}", *shares)

    print_table(
        f"precompute, {seconds:.0f} s of five stereo streams, {teacher.name}, "
        f"{len(os.sched_getaffinity(0))} cores",
        ("way", "audio seconds a second", "times the script", *PARTS),
        [
            describe("plain script", plain_seconds, plain["seconds"]),
            describe("one worker", one["wall_seconds"], one["seconds"]),
            describe("two workers", two_seconds, two[0]["seconds"]),
        ],
    )
    write = one["shard_bytes"] / one["seconds"]["write"]
    share = one["cpu_seconds"] / one["wall_seconds"]
    print_table(
        "its limits",
        ("what", "found", "limit", "share"),
        [
            compare("teacher, windows/s", one, "windows_per_second"),
            (
                "write, MB/s",
                f"{write / 1e6:.0f}",
                f"{copied['bytes_per_second'] / 1e6:.0f} (copy)",
                f"{100 * write / copied['bytes_per_second']:.0f} %",
            ),
            (
                "two workers, times one",
                f"{one['wall_seconds'] / two_seconds:.2f}",
                f"{spins[1] / spins[0]:.2f} (loops)",
                f"{100 * one['wall_seconds'] / two_seconds * spins[0] / spins[1]:.0f} %",
            ),
            ("one worker, of a core", f"{share:.2f}", "1", f"{100 * share:.0f} %"),
        ],
    )


def compare(name: str, result: dict[str, Any], key: str) -> tuple[str, ...]:
    found, limit = result[key], result[f"large_batch_{key}"]
    return (name, f"{found:.1f}", f"{limit:.1f} (batch 128)", f"{100 * found / limit:.0f} %")


def test_memory_does_not_grow_with_the_track(
    tmp_path: Path,
    tiny_teacher: Path,
    full_size: bool,
    print_table: Callable[..., None],
) -> None:
    rng = np.random.default_rng(0)
    minute = rng.uniform(-0.5, 0.5, (60 * 44100, 2)).astype(np.float32)
    peaks = {}
    for minutes in (10, 60) if full_size else (1, 3):
        folder = tmp_path / "corpus" / "test" / "track"
        folder.mkdir(parents=True)
        with soundfile.SoundFile(folder / "a.wav", "w", 44100, 2) as file:  # the mixture: their sum
            for _ in range(minutes):
                file.write(minute)
        (tmp_path / "out").mkdir()
        (result,) = run_together(
            ("flsep", tmp_path / "corpus", tiny_teacher, tmp_path / "out", "a")
        )
        peaks[minutes] = result["peak_bytes"]
        for name in ("corpus", "out"):
            shutil.rmtree(tmp_path / name)
    short, long = peaks.values()
    print_table(
        "memory of a worker, the small teacher",
        ("minutes", "peak, MiB"),
        [(str(minutes), f"{peak / 2**20:.0f}") for minutes, peak in peaks.items()],
    )
    waveform_bytes = 44100 * 60 * 2 * 4 * (max(peaks) - min(peaks))
    assert long - short < 0.2 * waveform_bytes
    assert long < 0.8 * WORKER_BYTES
