import importlib.metadata
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from flsep.cache import Layout
from flsep.trainer.errors import InferenceError
from flsep.trainer.inference.embedder import embed_blocks, load_embedder


def teacher(waveform: np.ndarray) -> np.ndarray:
    """Embed windows of 40 samples, one every 30: their first sample and their sum."""
    assert waveform.dtype == np.float32
    starts = range(0, len(waveform) - 39, 30)
    windows = [waveform[start : start + 40] for start in starts]
    return np.array([[window[0], window.sum()] for window in windows], np.float32)


@pytest.mark.parametrize("num_samples", [40, 69, 70, 1_930, 1_960, 5_000])
@pytest.mark.parametrize("block", [17, 1_000, 10_000])
def test_blocks_give_the_windows_of_the_whole(num_samples: int, block: int) -> None:
    rng = np.random.default_rng(0)
    waveform = rng.standard_normal((2, num_samples), dtype=np.float32)
    blocks = (waveform[:, i : i + block] for i in range(0, num_samples, block))
    found = embed_blocks(teacher, blocks, 40, 30)
    expected = teacher(waveform.mean(0))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_nothing_to_embed() -> None:
    assert embed_blocks(teacher, [np.zeros((2, 39), np.float32)], 40, 30).shape == (0, 0)


@pytest.fixture
def separator(layout: Layout) -> Any:
    config = SimpleNamespace(approach=SimpleNamespace(name="concat"))
    return SimpleNamespace(needs_teacher=True, layout=layout, config=config)


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Put a pipeline in place whose teacher has a digest; returns the handles it is asked for."""

    def install(digest: str) -> list[str]:
        asked: list[str] = []

        class Teacher:
            info = SimpleNamespace(
                handle="h", digest=digest, sample_rate_hz=4000, window_samples=40, hop_samples=30
            )

            @classmethod
            def load(cls, handle: str) -> "Teacher":
                asked.append(handle)
                return cls()

            def __call__(self, waveform: np.ndarray) -> np.ndarray:
                return teacher(waveform)

        module = ModuleType("flsep.pipeline.teachers.loading")
        module.load_teacher = Teacher.load  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "flsep.pipeline.teachers.loading", module)
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")
        return asked

    return install


def test_a_file_is_embedded_at_the_teachers_rate(
    separator: Any, pipeline: Callable[[str], list[str]], tmp_path: Path
) -> None:
    asked = pipeline("0" * 64)
    embed = load_embedder(separator, None)
    assert asked == ["tiny"]
    time = np.arange(16_000) / 8000
    tone = np.sin(2 * np.pi * 100 * time)
    soundfile.write(tmp_path / "a.wav", np.stack([tone, 0.5 * tone], 1), 8000, "FLOAT")
    assert embed is not None
    found = embed(tmp_path / "a.wav")
    assert len(found) == 1 + (8_000 - 40) // 30
    # The mean of the channels, a quarter of a period of 100 Hz into window 1 of 30 samples.
    expected = 0.75 * np.sin(2 * np.pi * 100 * 30 * np.arange(len(found)) / 4000)
    np.testing.assert_allclose(found[2:-2, 0], expected[2:-2], atol=1e-3)


def test_another_teacher_is_refused(separator: Any, pipeline: Callable[[str], list[str]]) -> None:
    asked = pipeline("1" * 64)
    with pytest.raises(InferenceError, match=r"digest 1111.*trained with tiny of 0000.*--teacher"):
        load_embedder(separator, "elsewhere")
    assert asked == ["elsewhere"]


def test_a_missing_pipeline_is_one_line(separator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flsep.pipeline.teachers.loading", None)
    with pytest.raises(InferenceError, match=r"needs its teacher .*`pip install flsep.pipeline"):
        load_embedder(separator, None)


def test_a_missing_tensorflow_is_one_line(
    separator: Any, pipeline: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline("0" * 64)

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(InferenceError, match="tensorflow-hub is not installed: run `pip install"):
        load_embedder(separator, None)


def test_a_model_without_a_teacher_takes_none(separator: Any) -> None:
    separator.needs_teacher = False
    separator.config.approach.name = "distance"
    assert load_embedder(separator, None) is None
    with pytest.raises(InferenceError, match="a model trained with distance separates without it"):
        load_embedder(separator, "x")
