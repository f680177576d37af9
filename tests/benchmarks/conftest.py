"""Benchmarks print ratios measured in one run; `make bench` runs them at full size."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def full_size() -> bool:
    """Whether to measure (FLSEP_BENCH=1), or only to run once, small, as a test."""
    return os.environ.get("FLSEP_BENCH") == "1"


@pytest.fixture
def best_seconds(full_size: bool) -> Callable[..., list[float]]:
    """Time functions in turns, so that a busy machine hurts all alike; best of each."""

    def measure(*functions: Callable[[], Any], rounds: int = 5) -> list[float]:
        best = [float("inf")] * len(functions)
        for _ in range(rounds if full_size else 1):
            for number, function in enumerate(functions):
                start = time.perf_counter()
                function()
                best[number] = min(best[number], time.perf_counter() - start)
        return best

    return measure


@pytest.fixture
def print_table(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Print rows under a title, past pytest's capture."""

    def show(title: str, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        with capsys.disabled():
            print(f"\n{title}")
            for row in (header, *rows):
                print("  " + "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)))

    return show


@pytest.fixture(scope="session")
def bench_teacher(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return musicnn at full size, the small teacher of the tests otherwise."""
    if os.environ.get("FLSEP_BENCH") != "1":
        return tiny_teacher
    from flsep.pipeline.export import export_musicnn

    folder = tmp_path_factory.mktemp("teacher") / "musicnn"
    export_musicnn(folder)
    return folder
