"""Rendering mixes: where the time goes, against the teacher's own rate in large batches."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner
from offline_ways import run_together

from flsep.pipeline.cli import cli

PARTS = ("mix", "invert", "teacher", "write")
SOURCES = ("drums", "bass", "other", "vocals")
MUSDB_MIXES = 86 * 64


@pytest.fixture
def shards(tmp_path: Path, teacher: Path, full_size: bool) -> Path:
    """Six tracks of noise: what a mix costs does not depend on its sound."""
    rng = np.random.default_rng(0)
    for number in range(6):
        folder = tmp_path / "corpus" / "train" / f"t{number}"
        folder.mkdir(parents=True)
        for name in (*SOURCES, "mixture"):
            waveform = rng.uniform(-0.3, 0.3, (44100 * (20 if full_size else 7), 2))
            soundfile.write(folder / f"{name}.wav", waveform, 44100)
    arguments = ["run", str(tmp_path / "corpus"), str(tmp_path / "shards"), "--teacher"]
    options = ["--workers", "0", "--valid-fraction", "0"]
    result = CliRunner().invoke(cli, [*arguments, str(teacher), *options])
    assert result.exit_code == 0, result.output
    return tmp_path / "shards"


def test_mixes(
    shards: Path,
    teacher: Path,
    tmp_path: Path,
    full_size: bool,
    print_table: Callable[..., None],
) -> None:
    def work(*names: str) -> list[dict[str, Any]]:
        for name in names:
            (tmp_path / name).mkdir(exist_ok=True)
            for path in (tmp_path / name).iterdir():
                path.unlink()
        count = 50 if full_size else 1
        return run_together(*(("mixes", shards, teacher, tmp_path / n, count) for n in names))

    rounds = range(3 if full_size else 1)
    (one,) = min((work("a") for _ in rounds), key=lambda results: results[0]["wall_seconds"])
    two = min(
        (work("a", "b") for _ in rounds),
        key=lambda results: max(result["wall_seconds"] for result in results),
    )
    seconds = one["wall_seconds"] / one["num_mixes"]
    for_two = max(result["wall_seconds"] for result in two) / one["num_mixes"] / 2

    def describe(name: str, took: float, result: dict[str, Any]) -> tuple[str, ...]:
        parts = result["seconds"]
        shares = [f"{1000 * parts[p] / result['num_mixes']:.1f} ms" for p in PARTS]
        share = result["windows_per_second"] / result["large_batch_windows_per_second"]
        return (name, f"{1 / took:.1f}", *shares, f"{100 * share:.0f} %")

    print_table(
        f"rendering mixes of 6 s, four sources in stereo, {one['num_windows']} windows each, "
        f"{teacher.name}, {len(os.sched_getaffinity(0))} cores",
        ("way", "mixes a second", *PARTS, "of the teacher's rate at batch 128"),
        [describe("one worker", seconds, one), describe("two workers", for_two, two[0])],
    )
    print_table(
        f"MUSDB18, computed: {MUSDB_MIXES} mixes an epoch, {one['mix_bytes']:.0f} bytes a mix",
        ("epochs", "size", "2 cores", "16 cores", "64 cores"),
        [
            (
                str(epochs),
                f"{epochs * MUSDB_MIXES * one['mix_bytes'] / 1e9:.2f} GB",
                *(
                    f"{epochs * MUSDB_MIXES * 2 * for_two / cores / 3600:.1f} h"
                    for cores in (2, 16, 64)
                ),
            )
            for epochs in (20, 100, 1000)
        ],
    )
