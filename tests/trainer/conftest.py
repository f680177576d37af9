"""Tiny shards: 3 sources at 8 kHz in stereo, with a teacher that knows a window's loudness."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_mixes import make_mixes

from flsep.cache import Layout, ShardFile, Shards, ShardWriter, TrackPlan, build_index, write_index
from flsep.trainer.config import TrainConfig
from flsep.trainer.settings import apply_settings

RATE_HZ = 8000
SOURCES = ("drums", "bass", "vocals")
TINY = (
    "separator.hidden_size=8",
    "separator.num_layers=1",
    "separator.dropout=0",
    "separator.bandwidth_hz=2000",
    "data.excerpt_seconds=0.7",
    "data.excerpts_per_track=3",
    "data.batch_size=2",
    "fit.epochs=2",
)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Threads that wait for each other are slow where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def layout() -> Layout:
    # A window is 0.3 s = 37.5 hops: its frames do not fall on those of the STFT.
    return Layout(
        sample_rate_hz=RATE_HZ,
        num_channels=2,
        n_fft=256,
        hop_samples=64,
        stft_dtype="float16",
        sources=SOURCES,
        teacher="tiny",
        teacher_digest="0" * 64,
        embedding_size=6,
        window_seconds=0.3,
        window_hop_seconds=0.3,
    )


def make_track(seed: int, seconds: float) -> np.ndarray:
    """Return float32 [signal, channel, sample]: the mixture and its sources, decaying tones."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    sources = []
    for number in range(len(SOURCES)):
        tone = np.sin(2 * np.pi * rng.uniform(100, 300) * (1 + 4 * number) * time)
        envelope = np.exp(-3 * np.mod(time * rng.uniform(1, 3), 1))
        pan = rng.uniform(0.2, 1, (2, 1))
        sources.append(0.3 * pan * tone * envelope + 0.003 * rng.standard_normal((2, len(time))))
    return np.stack([sum(sources), *sources]).astype(np.float32)


def make_arrays(layout: Layout, waveforms: np.ndarray) -> dict[str, Any]:
    """Return the arrays of a track; its last window of the last source is silent."""
    num_samples = waveforms.shape[-1]
    spectra = torch.stft(
        torch.from_numpy(waveforms).flatten(0, 1),
        layout.n_fft,
        layout.hop_samples,
        window=torch.hann_window(layout.n_fft),
        return_complex=True,
    ).unflatten(0, waveforms.shape[:2])
    spectra = spectra.permute(0, 3, 1, 2).contiguous()  # signal, frame, channel, bin
    window = round(layout.window_seconds * layout.sample_rate_hz)
    num_windows = num_samples // window
    mono = waveforms.mean(1)[:, : num_windows * window].reshape(len(waveforms), num_windows, window)
    level = np.sqrt((mono**2).mean(-1))
    powers = np.arange(1, layout.embedding_size + 1)
    magnitude = spectra[0].abs().mean(1).double().numpy()
    activity = 20 * np.log10(level)
    activity[-1, -1] = -120
    return {
        "stft": torch.view_as_real(spectra).numpy(),
        "embedding": np.sin(level[..., None] * 20 * powers).astype(np.float32),
        "activity": activity.astype(np.float32),
        "magnitude_moments": np.stack([magnitude.sum(0), (magnitude**2).sum(0)]),
        "audio": waveforms,
        "num_samples": num_samples,
        "num_windows": num_windows,
    }


def write_shards(folder: Path, layout: Layout, tracks: dict[str, tuple[str, np.ndarray]]) -> Path:
    """Write tracks, ``{name: (split, waveforms)}``, one shard a track, with their index."""
    folder.mkdir()
    paths = []
    for number, (name, (split, waveforms)) in enumerate(tracks.items()):
        arrays = make_arrays(layout, waveforms)
        paths.append(folder / f"{number}.h5")
        plan = TrackPlan(
            name=name,
            split=split,
            num_samples=arrays["num_samples"],
            num_windows=arrays["num_windows"],
            with_audio=split == "test",
        )
        with ShardWriter(
            paths[-1], layout, [plan], config=layout.to_json(), packages={"flsep": "0"}
        ) as shard:
            track = shard.tracks[0]
            for signal in range(len(layout.signals)):
                track.append("stft", signal, arrays["stft"][signal])
                track.append_embedding(
                    signal, arrays["embedding"][signal], arrays["activity"][signal]
                )
                if split == "test":
                    track.append_audio(signal, arrays["audio"][signal])
            for entry in range(2):
                track.append("magnitude_moments", entry, arrays["magnitude_moments"][entry])
    write_index(folder, build_index(ShardFile(path) for path in paths))
    return folder


@pytest.fixture(scope="session")
def tracks() -> dict[str, tuple[str, np.ndarray]]:
    return {
        "one": ("train", make_track(1, 2.2)),
        "two / 2": ("train", make_track(2, 3.1)),
        "three": ("train", make_track(3, 2.5)),
        "four": ("valid", make_track(4, 2.4)),
        "five": ("test", make_track(5, 2.5)),
        "six": ("test", make_track(6, 3.0)),
    }


@pytest.fixture(scope="session")
def shards(
    tmp_path_factory: pytest.TempPathFactory,
    layout: Layout,
    tracks: dict[str, tuple[str, np.ndarray]],
) -> Path:
    """A folder of shards that no test changes."""
    return write_shards(tmp_path_factory.mktemp("data") / "shards", layout, tracks)


@pytest.fixture(scope="session")
def mixes(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of mixes of these shards, the stems heard too."""
    folder = tmp_path_factory.mktemp("mixes") / "mixes"
    make_mixes(folder, Shards(shards), with_stems=True)
    return folder


@pytest.fixture(scope="session")
def tiny() -> Callable[..., TrainConfig]:
    """Configuration of a training that takes a second, with some settings changed."""

    def make(*settings: str) -> TrainConfig:
        return apply_settings(TrainConfig(), [*TINY, *settings])

    return make


@pytest.fixture(scope="session")
def new_shards(layout: Layout) -> Callable[..., Path]:
    """`write_shards` for tests that need other tracks."""

    def write(folder: Path, tracks: dict[str, tuple[str, float]], **changes: Any) -> Path:
        changed = replace(layout, **changes)
        made = {
            name: (
                split,
                make_track(seed, seconds)[: len(changed.signals), : changed.num_channels],
            )
            for seed, (name, (split, seconds)) in enumerate(tracks.items())
        }
        return write_shards(folder, changed, made)

    return write


@pytest.fixture
def read_metrics() -> Callable[[Path], list[dict[str, Any]]]:
    """Read ``metrics.jsonl`` of a run, without what differs from one run to the next."""

    def read(run: Path) -> list[dict[str, Any]]:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        timing = {"seconds", "excerpts_per_second", "data_wait_share"}
        return [{k: v for k, v in json.loads(line).items() if k not in timing} for line in lines]

    return read
