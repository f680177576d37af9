"""Benchmarks print ratios measured in one run; `make bench` runs them at full size."""

import ctypes
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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
def peak_bytes() -> Callable[[Callable[[], Any]], int]:
    """Return what a function needs at its peak beyond what there is: on the GPU, or of Linux."""

    def measure(function: Callable[[], Any]) -> int:
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            function()
            return torch.cuda.max_memory_allocated() - before
        if sys.platform != "linux":
            pytest.skip("peak memory is read from /proc")
        malloc = ctypes.CDLL(None)
        malloc.mallopt(-4, 65536)  # glibc's defaults, should memory have been kept
        malloc.mallopt(-1, 128 << 10)
        malloc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _read_status("VmRSS")
        function()
        return _read_status("VmHWM") - before

    return measure


def _read_status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


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
    from flsep.pipeline.teachers.export import export_musicnn

    folder = tmp_path_factory.mktemp("teacher") / "musicnn"
    export_musicnn(folder)
    return folder


@pytest.fixture(scope="session")
def bench_vggish(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return VGGish with random weights: what it costs does not depend on them."""
    from flsep.pipeline.teachers import export, vggish
    from flsep.pipeline.teachers.model_folder import import_tensorflow
    from flsep.pipeline.teachers.savedmodel import EACH

    rng = np.random.default_rng(0)
    variables = {
        name: (rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[:-1]))).astype(np.float32)
        for name, shape in vggish.SHAPES.items()
    }
    functions = {"__call__": vggish.embed, EACH: vggish.embed}
    folder = tmp_path_factory.mktemp("teacher") / "vggish"
    export._export(import_tensorflow(), folder, variables, functions)
    return folder


@pytest.fixture(params=["vggish", "musicnn"])
def teacher(request: pytest.FixtureRequest, full_size: bool) -> Path:
    if not full_size and request.param == "vggish":
        pytest.skip("at full size only; the small run has one small teacher")
    name = "bench_vggish" if request.param == "vggish" else "bench_teacher"
    folder: Path = request.getfixturevalue(name)
    return folder
