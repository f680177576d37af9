"""A training step of X-UMX: against a plain twin and its products alone, growing, and waiting."""

import ctypes
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_xumx import PlainXUMX, plain_step
from torch.utils.flop_counter import FlopCounterMode

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
from flsep.trainer.approaches.informed import InformedSeparator, build_model
from flsep.trainer.config import DataConfig, TrainConfig
from flsep.trainer.data.batch import Batch
from flsep.trainer.data.buffer import Buffer
from flsep.trainer.data.excerpts import draw_excerpts
from flsep.trainer.data.loader import load_batches
from flsep.trainer.data.reader import Reader
from flsep.trainer.settings import apply_settings
from flsep.trainer.training.clock import WaitClock
from flsep.trainer.training.launch import keep_freed_memory
from flsep.trainer.training.objective import Objective
from flsep.trainer.training.optimizer import Optimizer

SOURCES = ("drums", "bass", "other", "vocals")
SMALL = (
    "separator.hidden_size=8",
    "separator.num_layers=3",
    "separator.bandwidth_hz=2000",
    "data.excerpt_seconds=0.2",
)


def make_layout(full_size: bool) -> Layout:
    return Layout(
        sample_rate_hz=44100 if full_size else 8000,
        num_channels=2,
        n_fft=4096 if full_size else 256,
        hop_samples=1024 if full_size else 64,
        stft_dtype="float16",
        sources=SOURCES,
        teacher="none",
        teacher_digest="0" * 64,
        embedding_size=1,
        window_seconds=0.96,
        window_hop_seconds=0.96,
    )


def make_batch(layout: Layout, seconds: float, size: int, device: torch.device) -> Batch:
    """Return excerpts of noise, on the device."""
    num_frames = layout.num_frames(round(seconds * layout.sample_rate_hz))
    num_signals = len(layout.signals)
    generator = torch.Generator().manual_seed(0)
    shape = (num_signals * size * num_frames, layout.num_channels, layout.num_bins, 2)
    buffer = Buffer.allocate(
        {
            "frames": (torch.float16, shape),
            "starts": (torch.int64, (num_signals, size)),
            "swaps": (torch.bool, (num_signals, size)),
        },
        pin=False,
    )
    buffer.tensors["frames"].copy_(torch.randn(shape, generator=generator))
    torch.arange(0, shape[0], num_frames, out=buffer.tensors["starts"].view(-1))
    buffer.tensors["swaps"].zero_()
    return Batch(
        buffer=buffer.to(device),
        preloaded_frames=None,
        num_frames=num_frames,
        names=("noise",) * size,
        num_in_all=size,
    )


def write_noise(folder: Path, layout: Layout, seconds: float) -> Shards:
    """Write a shard with one track."""
    folder.mkdir()
    num_samples = int(seconds * layout.sample_rate_hz)
    num_windows = int(seconds / layout.window_hop_seconds)
    plan = TrackPlan(
        name="noise",
        split="train",
        num_samples=num_samples,
        num_windows=num_windows,
        with_audio=False,
    )
    rng = np.random.default_rng(0)
    with ShardWriter(folder / "0.h5", layout, [plan], config={}, packages={}) as writer:
        (track,) = writer.tracks
        shape = (layout.num_frames(num_samples), layout.num_channels, layout.num_bins, 2)
        for signal in range(len(layout.signals)):
            track.append("stft", signal, rng.standard_normal(shape, np.float32))
            embedding = np.zeros((num_windows, layout.embedding_size), np.float32)
            track.append_embedding(signal, embedding, np.zeros(num_windows, np.float32))
        for entry in range(2):
            track.append("magnitude_moments", entry, np.ones(layout.num_bins))
    write_index(folder, build_index([ShardFile(folder / "0.h5")]))
    return Shards(folder)


def choose(full_size: bool) -> tuple[torch.device, Layout, TrainConfig]:
    """Return the device, the layout and the settings to measure with."""
    device = torch.device("cuda" if full_size and torch.cuda.is_available() else "cpu")
    config = apply_settings(TrainConfig(), () if full_size else SMALL)
    return device, make_layout(full_size), config


class Step:
    """What `Training.train_batch` does, without data and progress."""

    def __init__(self, config: TrainConfig, layout: Layout, device: torch.device) -> None:
        self.objective = Objective(config, device, layout.hop_samples)
        self.model: InformedSeparator = build_model(config, layout).to(device)
        self.optimizer = Optimizer(self.model, config.optim)
        if config.compute.compile:
            self.model.separator.compile_layers()

    def __call__(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        terms = self.objective(self.model, batch)
        terms["total"].backward()
        norm = self.optimizer.gradient_norm()
        loss, _ = torch.stack([terms["total"].detach(), norm]).tolist()
        self.optimizer.step(norm)
        return loss


@contextmanager
def memory_as_usual() -> Iterator[None]:
    """Let glibc's malloc give back what is freed, as it does by default."""
    malloc = ctypes.CDLL(None)
    if sys.platform == "linux":
        malloc.mallopt(-4, 65536)
        malloc.mallopt(-1, 128 << 10)
    yield
    keep_freed_memory()


def seconds_of_products(model: InformedSeparator, batch: Batch, objective: Objective) -> float:
    """Return what the floating-point operations of a step take at the measured matrix peak."""
    with FlopCounterMode(display=False) as counter:
        objective(model, batch)["total"].backward()
    model.zero_grad()
    lstm = sum(w.numel() for lstm in model.separator.lstms for w in lstm.parameters())
    rows = batch.num_frames * len(batch)
    # The counter does not know BLSTMs: a product forward, two backward.
    flops = counter.get_total_flops() + 3 * 2 * rows * lstm
    device = batch.frames.device
    size = 8192 if device.type == "cuda" else 2048
    factor = torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        product = factor @ factor
        product[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return flops / (2 * size**3 / best)


def test_step(
    full_size: bool,
    best_seconds: Callable[..., list[float]],
    print_table: Callable[..., None],
) -> None:
    device, layout, config = choose(full_size)
    size = 16 if device.type == "cuda" else 2
    batch = make_batch(layout, config.data.excerpt_seconds, size, device)
    keep_freed_memory()
    step = Step(config, layout, device)
    separator = step.model.separator
    twin = PlainXUMX(
        SOURCES, 2, layout.num_bins, separator.max_bin, config.separator.hidden_size, dropout=0.4
    )
    twin.load_state_dict(separator.public_state())
    twin.to(device)
    optimizer = torch.optim.Adam(twin.parameters(), lr=1e-3, weight_decay=1e-5)
    stored = batch.stft.clone()
    hop = layout.hop_samples

    def plain() -> float:
        loss = plain_step(twin, optimizer, stored, hop)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return loss

    def plain_as_usual() -> float:
        with memory_as_usual():
            return plain()

    for module in (*separator.lstms, *twin.layer_lstm.values()):
        module.dropout = 0.0
    assert step(batch) == pytest.approx(plain(), rel=1e-4)  # they do the same
    for module in (*separator.lstms, *twin.layer_lstm.values()):
        module.dropout = 0.4
    rows = {"plain twin": plain, "flsep": partial(step, batch)}
    if device.type == "cpu":
        rows |= {"plain twin": plain_as_usual, "plain twin, memory kept": plain}
    else:
        for setting in ("compile=true", "precision=tf32", "precision=bfloat16"):
            other = Step(apply_settings(config, [f"compute.{setting}"]), layout, device)
            rows[f"flsep, {setting}"] = partial(other, batch)
    for function in rows.values():
        function()
    seconds = dict(zip(rows, best_seconds(*rows.values(), rounds=8), strict=True))
    floor = seconds_of_products(step.model, batch, step.objective)
    reference = seconds["plain twin"]
    print_table(
        f"training step, batch {size} x {config.data.excerpt_seconds:g} s, {device}, "
        f"{torch.get_num_threads()} threads",
        ("way", "seconds", "times the plain twin"),
        [
            *((name, f"{t:.3f}", f"{reference / t:.2f}") for name, t in seconds.items()),
            ("its products at the matrix peak", f"{floor:.3f}", f"{reference / floor:.2f}"),
        ],
    )


def test_growth(
    full_size: bool,
    best_seconds: Callable[..., list[float]],
    peak_bytes: Callable[[Callable[[], Any]], int],
    print_table: Callable[..., None],
) -> None:
    device, layout, config = choose(full_size)
    base = config.data.batch_size if device.type == "cuda" else 1
    seconds = config.data.excerpt_seconds
    step = Step(config, layout, device)
    cases = [(base, seconds), (2 * base, seconds), (4 * base, seconds)]
    cases += [(base, 2 * seconds), (base, 4 * seconds)]
    rows = []
    for size, length in cases:
        batch = make_batch(layout, length, size, device)
        step(batch)
        peak = peak_bytes(partial(step, batch)) / 1e9
        keep_freed_memory()
        (spent,) = best_seconds(partial(step, batch))
        per_second = 1000 * spent / (size * length)
        rows.append((str(size), f"{length:g}", f"{spent:.3f}", f"{per_second:.1f}", f"{peak:.2f}"))
    print_table(
        f"training step, growing, {device}, {torch.get_num_threads()} threads",
        ("batch", "excerpt s", "seconds", "ms a second of audio", "peak GB beside its batch"),
        rows,
    )


def test_wait(full_size: bool, tmp_path: Path, print_table: Callable[..., None]) -> None:
    device, layout, config = choose(full_size)
    size = 16 if device.type == "cuda" else 2
    excerpts = 160 if device.type == "cuda" else 8
    shards = write_noise(tmp_path / "shards", layout, 60 if full_size else 2)
    grid = Grid(layout, config.data.excerpt_seconds)
    data = DataConfig(excerpts_per_track=excerpts)
    drawn = draw_excerpts(grid, shards.tracks("train"), data, 0)
    keep_freed_memory()
    step = Step(config, layout, device)
    rows = []
    for num_workers in (0, 1, 2):
        clock, waited, spent = WaitClock(device), [], []
        with closing(
            load_batches(
                Reader(shards, grid, None),
                drawn,
                epoch=0,
                batch_size=size,
                num_workers=num_workers,
                device=device,
            )
        ) as batches:
            while True:
                with clock.waiting():
                    batch = next(batches, None)
                if batch is None:
                    break
                step(batch)
                lap = clock.lap()
                spent.append(lap[0])
                waited.append(lap[1])
                clock.start()
        # The first batch has nothing to hide behind: an epoch has hundreds.
        share = 100 * sum(waited[1:]) / sum(spent[1:])
        rows.append((str(num_workers), f"{share:.2f} %", f"{1000 * waited[0]:.1f}"))
    print_table(
        f"waiting for data, batch {size} x {config.data.excerpt_seconds:g} s, {device}",
        ("workers", "share of an epoch", "first batch, ms"),
        rows,
    )
