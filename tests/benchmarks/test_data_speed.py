"""Excerpts a second from a shard of the real track: against plain copies, and Open-Unmix."""

import shutil
import sys
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import torch

from flsep.cache import (
    Grid,
    Layout,
    ShardFile,
    Shards,
    ShardWriter,
    TrackPlan,
    build_index,
    write_index,
)
from flsep.trainer.config import DataConfig
from flsep.trainer.data.excerpts import draw_excerpts
from flsep.trainer.data.loader import load_batches
from flsep.trainer.data.preloaded import PreloadedShards, wanted_signals
from flsep.trainer.data.reader import Reader
from flsep.trainer.training.launch import keep_freed_memory

LAYOUT = Layout(
    sample_rate_hz=44100,
    num_channels=2,
    n_fft=4096,
    hop_samples=1024,
    stft_dtype="float16",
    sources=("drums", "bass", "other", "vocals"),
    teacher="none",
    teacher_digest="0" * 64,
    embedding_size=128,
    window_seconds=0.96,
    window_hop_seconds=0.96,
)
EXCERPT_SECONDS = 6.0


@pytest.fixture
def stems(example_track: Path) -> np.ndarray:
    """Decode the real track: float32 [signal, channel, sample]."""

    def decode(number: int) -> np.ndarray:
        with av.open(str(example_track)) as container:
            blocks = [frame.to_ndarray() for frame in container.decode(audio=number)]
        return np.concatenate(blocks, axis=-1)

    return np.stack([decode(number) for number in range(5)])


@pytest.fixture
def shards(tmp_path: Path, stems: np.ndarray, full_size: bool) -> Shards:
    """Write a shard of the track, repeated to 3 minutes."""
    samples = np.tile(stems, 30 if full_size else 2)
    num_windows = int(samples.shape[-1] / LAYOUT.sample_rate_hz / LAYOUT.window_hop_seconds)
    folder = tmp_path / "shards"
    folder.mkdir()
    plan = TrackPlan(
        name="track",
        split="train",
        num_samples=samples.shape[-1],
        num_windows=num_windows,
        with_audio=False,
    )
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "0.h5", LAYOUT, [plan], config={}, packages={}) as writer:
        (track,) = writer.tracks
        for signal, waveform in enumerate(samples):
            spectrum = torch.stft(
                torch.from_numpy(waveform),
                LAYOUT.n_fft,
                LAYOUT.hop_samples,
                window=torch.hann_window(LAYOUT.n_fft),
                return_complex=True,
            )
            track.append("stft", signal, torch.view_as_real(spectrum.permute(2, 0, 1)).numpy())
            embedding = rng.standard_normal((num_windows, LAYOUT.embedding_size), np.float32)
            track.append_embedding(signal, embedding, np.zeros(num_windows, np.float32))
        for entry in range(2):
            track.append("magnitude_moments", entry, np.ones(LAYOUT.num_bins))
    write_index(folder, build_index([ShardFile(folder / "0.h5")]))
    return Shards(folder)


class Reading:
    """Ways to bring the same number of excerpts to where they can be computed with."""

    def __init__(self, shards: Shards, batch_size: int, num_batches: int) -> None:
        keep_freed_memory()  # as `fit` does; on a GPU, torch keeps the page-locked buffers
        self.batch_size, self.num_batches = batch_size, num_batches
        self.num_excerpts = batch_size * num_batches
        grid = Grid(LAYOUT, EXCERPT_SECONDS)
        tracks = shards.tracks("train")
        self.excerpts = draw_excerpts(
            grid, tracks, DataConfig(excerpts_per_track=self.num_excerpts), 0
        )
        self.reader = Reader(shards, grid, "mixture")
        preloaded = PreloadedShards(
            shards,
            wanted_signals(LAYOUT, "original", tracks, ()),
            torch.device("cpu"),
            teacher_signal="mixture",
            num_threads=2,
        )
        self.preloaded_reader = Reader(preloaded, grid, "mixture")
        self.source = preloaded.frames.numpy()
        shape = (batch_size, 5, grid.num_frames, *self.source.shape[1:])
        self.buffers = [np.zeros(shape, np.float16) for _ in range(2)]
        self.num_bytes = num_batches * self.buffers[0].nbytes

    def load(self, reader: Reader, num_workers: int) -> None:
        """Read a part of an epoch."""
        batches = load_batches(
            reader, self.excerpts, epoch=0, batch_size=self.batch_size, num_workers=num_workers
        )
        assert sum(len(batch) for batch in batches) == self.num_excerpts

    def copy(self, num_workers: int) -> None:
        """Copy blocks of an excerpt's size from all over an array to other arrays."""
        rng = np.random.default_rng(0)
        num_frames = self.buffers[0].shape[2]

        def copy(out: np.ndarray, starts: np.ndarray) -> None:
            for row, start in enumerate(starts):
                np.copyto(out[row], self.source[start : start + num_frames])

        with ThreadPoolExecutor(max(1, num_workers)) as pool:
            for number in range(self.num_batches):
                starts = rng.integers(0, len(self.source) - num_frames, (self.batch_size, 5))
                list(pool.map(copy, self.buffers[number % 2], starts))


@pytest.fixture
def reading(shards: Shards, full_size: bool) -> Reading:
    return Reading(shards, *((16, 4) if full_size else (2, 2)))


def test_reading(
    reading: Reading,
    shards: Shards,
    best_seconds: Callable[..., list[float]],
    print_table: Callable[..., None],
) -> None:
    rows = []
    for num_workers in (0, 1, 2):
        ways = {
            "plain copy": partial(reading.copy, num_workers),
            "load_batches": partial(reading.load, reading.reader, num_workers),
            # Not copied here: `assemble` gathers it from where it is.
            "load_batches, preloaded": partial(reading.load, reading.preloaded_reader, num_workers),
        }
        seconds = best_seconds(*ways.values(), rounds=7)
        for name, spent in zip(ways, seconds, strict=True):
            rate, gigabytes = reading.num_excerpts / spent, reading.num_bytes / spent / 1e9
            copied = (f"{gigabytes:.1f}", f"{seconds[0] / spent:.2f}")
            rows.append(
                (
                    str(num_workers),
                    name,
                    f"{rate:.0f}",
                    *(("-", "-") if name.endswith("preloaded") else copied),
                )
            )
    num_seconds = shards.tracks("train")[0].num_samples / LAYOUT.sample_rate_hz
    size = shards.index.shard_bytes["0.h5"]
    print_table(
        f"{reading.num_excerpts} excerpts of {EXCERPT_SECONDS:g} s, 5 signals, from a shard of "
        f"{size / 1e6:.0f} MB ({size / num_seconds / 1e6:.2f} MB a second), page cache warm",
        ("workers", "way", "excerpts/s", "GB/s", "of copy"),
        rows,
    )


@pytest.fixture
def open_unmix(ffmpeg_on_path: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the package; its MUSDB dataset and STFT import torchaudio, but do not use it."""
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):  # PyPI's is linked against CUDA
        monkeypatch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
    pytest.importorskip("openunmix", reason="pip install --no-deps openunmix")
    import openunmix.data
    import openunmix.transforms

    return openunmix


@pytest.mark.filterwarnings("ignore")  # of the packages that are compared with
def test_open_unmix(
    open_unmix: Any,
    example_track: Path,
    stems: np.ndarray,
    tmp_path: Path,
    reading: Reading,
    full_size: bool,
    best_seconds: Callable[..., list[float]],
    print_table: Callable[..., None],
) -> None:
    name = example_track.name.removesuffix(".stem.mp4")
    stem_root, wav_root = tmp_path / "stems", tmp_path / "wav"
    for root in (stem_root, wav_root):
        for subset in ("train", "test"):
            (root / subset).mkdir(parents=True)
    shutil.copy(example_track, stem_root / "train" / example_track.name)
    (wav_root / "train" / name).mkdir()
    for signal, waveform in zip(LAYOUT.signals, stems, strict=True):
        soundfile.write(wav_root / "train" / name / f"{signal}.wav", waveform.T, 44100)

    transform = open_unmix.transforms.TorchSTFT(n_fft=LAYOUT.n_fft, n_hop=LAYOUT.hop_samples)
    count = 5 if full_size else 1

    def load(root: Path, is_wav: bool) -> Callable[[], None]:
        data = open_unmix.data.MUSDBDataset(
            root=str(root), is_wav=is_wav, seq_duration=EXCERPT_SECONDS, samples_per_track=count
        )

        def measure() -> None:
            for number in range(count):
                mixture, target = data[number]
                assert mixture.shape == target.shape == (2, EXCERPT_SECONDS * 44100)
                assert mixture.abs().max() > 0.01
                transform(torch.stack([mixture, target]))

        return measure

    ways = [
        load(stem_root, False),
        load(wav_root, True),
        *(partial(reading.load, reading.reader, num_workers) for num_workers in (0, 2)),
    ]
    counts = [count, count, reading.num_excerpts, reading.num_excerpts]
    seconds = best_seconds(*ways, rounds=3)
    rates = [number / spent for number, spent in zip(counts, seconds, strict=True)]
    names = [
        "Open-Unmix, stems, STFT of two signals",
        "Open-Unmix, wav, STFT of two signals",
        "load_batches, no worker, STFT of five",
        "load_batches, 2 workers, STFT of five",
    ]
    print_table(
        f"excerpts of {EXCERPT_SECONDS:g} s, one process",
        ("way", "excerpts/s", "times Open-Unmix from stems"),
        [
            (name, f"{rate:.1f}", f"{rate / rates[0]:.1f}")
            for name, rate in zip(names, rates, strict=True)
        ],
    )
