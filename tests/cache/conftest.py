from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flsep.cache import Layout, ShardFile, ShardWriter, TrackPlan, build_index, write_index


@pytest.fixture
def layout() -> Layout:
    return Layout(
        sample_rate_hz=8000,
        num_channels=2,
        n_fft=64,
        hop_samples=16,
        stft_dtype="float16",
        sources=("bass", "voice"),
        teacher="tiny",
        teacher_digest="0" * 64,
        embedding_size=3,
        window_seconds=0.02,
        window_hop_seconds=0.02,
    )


@pytest.fixture
def track_arrays(layout: Layout) -> Callable[..., dict[str, Any]]:
    """Random content of one track, by seed."""

    def make(seed: int, num_samples: int = 1600, num_windows: int = 10) -> dict[str, Any]:
        rng = np.random.default_rng(seed)
        frames = layout.num_frames(num_samples)
        activity = rng.uniform(-50, 0, (3, num_windows)).astype(np.float32)
        activity[1, 0] = -120
        return {
            "num_samples": num_samples,
            "num_windows": num_windows,
            "stft": rng.standard_normal((3, frames, 2, 33, 2)).astype(np.float16),
            "embedding": rng.standard_normal((3, num_windows, 3)).astype(np.float32),
            "activity": activity,
            "magnitude_moments": rng.uniform([[1], [4]], [[2], [5]], (2, 33)) * frames,
            "audio": rng.uniform(-1.5, 1.5, (3, 2, num_samples)).astype(np.float32),
        }

    return make


@pytest.fixture
def write_shard(layout: Layout) -> Callable[..., Path]:
    """Write tracks, ``{name: (split, arrays)}``, to a shard."""

    def write(path: Path, tracks: dict[str, tuple[str, dict[str, Any]]], **config: Any) -> Path:
        plans = [
            TrackPlan(
                name=name,
                split=split,
                num_samples=arrays["num_samples"],
                num_windows=arrays["num_windows"],
                with_audio=split == "test",
            )
            for name, (split, arrays) in tracks.items()
        ]
        with ShardWriter(
            path, layout, plans, config={"n": 1, **config}, packages={"flsep": "0"}
        ) as shard:
            for track, (split, arrays) in zip(shard.tracks, tracks.values(), strict=True):
                for signal in range(3):
                    for start in range(0, arrays["stft"].shape[1], 37):
                        track.append("stft", signal, arrays["stft"][signal, start : start + 37])
                    track.append_embedding(
                        signal, arrays["embedding"][signal], arrays["activity"][signal]
                    )
                    if split == "test":
                        track.append_audio(signal, arrays["audio"][signal])
                for entry in range(2):
                    track.append("magnitude_moments", entry, arrays["magnitude_moments"][entry])
        return path

    return write


@pytest.fixture
def shards(
    tmp_path: Path, write_shard: Callable[..., Path], track_arrays: Callable[..., dict[str, Any]]
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A folder of two shards with three tracks and its index, and what was put in."""
    folder = tmp_path / "shards"
    folder.mkdir()
    content = {name: track_arrays(seed) for seed, name in enumerate(("a / b", "ü", "../c"))}
    write_shard(
        folder / "0.h5", {"a / b": ("train", content["a / b"]), "ü": ("train", content["ü"])}
    )
    write_shard(folder / "1.h5", {"../c": ("test", content["../c"])})
    write_index(folder, build_index(ShardFile(folder / name) for name in ("1.h5", "0.h5")))
    return folder, content
