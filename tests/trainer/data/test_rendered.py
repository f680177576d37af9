"""Training on rendered mixes: the same mixes as random mixing, with what the teacher heard."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain_mixes import make_mixes

from flsep.cache import CacheError, DamagedDataError, Grid, Layout, MismatchError, Mixes, Shards
from flsep.trainer.config import DataConfig, TrainConfig
from flsep.trainer.data.excerpts import draw_excerpts
from flsep.trainer.data.loader import load_batches
from flsep.trainer.data.preloaded import PreloadedShards, wanted_signals
from flsep.trainer.data.reader import Reader
from flsep.trainer.errors import CheckpointError, DataError
from flsep.trainer.training.loop import finish_epoch, train_epoch, validate
from flsep.trainer.training.state import Training

RENDERED = DataConfig(mixing="rendered", excerpt_seconds=0.7, excerpts_per_track=3)


@pytest.fixture
def start(tiny: Callable[..., TrainConfig], shards: Path) -> Callable[..., Training]:
    def make(mixes: Path | None, *settings: str, **options: Any) -> Training:
        return Training(
            tiny("optim.learning_rate=0.01", *settings),
            Shards(shards),
            device=torch.device("cpu"),
            num_workers=0,
            mixes=None if mixes is None else Mixes(mixes),
            **options,
        )

    return make


def train_epochs(training: Training, count: int) -> dict[str, torch.Tensor]:
    for _ in range(count):
        for _ in train_epoch(training):
            pass
        valid = validate(training, lambda: False)
        assert valid is not None
        finish_epoch(training, valid)
    return training.model.state_dict()


def test_the_same_seed_trains_on_the_same_mixes(
    start: Callable[..., Training], mixes: Path
) -> None:
    rendered = train_epochs(start(mixes, "data.mixing=rendered"), 2)
    mixed = train_epochs(start(None, "data.mixing=random"), 2)
    other = train_epochs(start(None, "data.mixing=random", "fit.seed=1"), 2)
    assert all(torch.equal(value, mixed[name]) for name, value in rendered.items())
    assert not all(torch.equal(value, other[name]) for name, value in rendered.items())


def test_epochs_begin_again(shards: Path, mixes: Path) -> None:
    excerpts = Mixes(mixes).of(Shards(shards))
    assert len(excerpts) == 9
    first, second, third = (excerpts.draw(epoch, 4) for epoch in range(3))
    assert (first.places, first.gains) == (third.places, third.gains)
    assert first.gains != second.gains


@pytest.mark.parametrize("is_preloaded", [False, True])
def test_a_batch_has_what_the_teacher_heard(
    shards: Path, mixes: Path, layout: Layout, is_preloaded: bool
) -> None:
    opened, grid = Shards(shards), Grid(layout, 0.7)
    excerpts = Mixes(mixes).of(opened)
    source: Shards | PreloadedShards = opened
    if is_preloaded:
        wanted = wanted_signals(layout, "rendered", opened.tracks("train"), opened.tracks("valid"))
        assert all(0 not in signals for track, signals in wanted if track.split == "train")
        source = PreloadedShards(
            opened, wanted, torch.device("cpu"), teacher_signal="mixture", num_threads=1
        )
    for signal in ("mixture", "stems"):
        if is_preloaded and signal == "stems":
            continue
        reader = Reader(source, grid, signal)
        assert reader.standard is not None
        (batch,) = load_batches(reader, excerpts, epoch=1, batch_size=9, num_workers=0)
        assert batch.windows is not None
        for slot in range(9):
            heard = excerpts.draw(1, slot).heard
            assert heard is not None
            for number in range(1) if signal == "mixture" else range(1, 4):
                entry = (slot,) if signal == "mixture" else (number - 1, slot)
                expected = reader.standard(heard.embedding[number])
                assert np.array_equal(batch.windows.embeddings[entry][:2].numpy(), expected)
                assert not batch.windows.embeddings[entry][2:].any()
                level = batch.windows.activity_db[entry]
                assert np.array_equal(level[:2].numpy(), heard.activity_db[number])
                assert level[2] == -torch.inf
                assert batch.windows.inside[entry].tolist() == [True, True, False]
                assert torch.equal(batch.windows.bounds[entry], torch.tensor(grid.bounds(0)))
        # Window 1 starts at 37.5 frames; there is no window 2, its frames hold the one before.
        assert batch.windows.held[0].tolist() == [0] * 38 + [1] * 50 or signal == "stems"


def test_stems_that_nobody_heard_scaled_are_those_of_the_tracks(
    shards: Path, layout: Layout, tmp_path: Path
) -> None:
    opened, grid = Shards(shards), Grid(layout, 0.7)
    make_mixes(tmp_path / "mixes", opened)
    reader = Reader(opened, grid, "stems")
    config = replace(RENDERED, mixing="random")
    tracks, _ = grid.split_by_length(opened, "train")
    batches = [
        next(load_batches(reader, excerpts, epoch=0, batch_size=9, num_workers=0))
        for excerpts in (
            Mixes(tmp_path / "mixes").of(opened),
            draw_excerpts(grid, tracks, config, 0),
        )
    ]
    rendered, mixed = batches
    for name in ("frames", "gains", "swaps", "starts"):
        assert torch.equal(getattr(rendered, name), getattr(mixed, name))
    assert rendered.windows is not None
    assert mixed.windows is not None
    for name in ("embeddings", "activity_db", "bounds", "inside"):
        assert torch.equal(getattr(rendered.windows, name), getattr(mixed.windows, name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"excerpts_per_track": 4},
            r"excerpts_per_track 4, the training has 3; use --set data.exc",
        ),
        ({"excerpt_seconds": 0.8}, r"excerpt_seconds 0.8, the training has 0.7"),
        ({"max_gain": 1.0}, r"max_gain 1, the training has 1.25"),
        ({"split": "test"}, r"mixes of the split 'test'; expected 'train': render others"),
    ],
)
def test_mixes_of_other_settings_are_refused(
    shards: Path, layout: Layout, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    opened, grid = Shards(shards), Grid(layout, 0.7)
    make_mixes(tmp_path / "mixes", opened, **settings)
    tracks, _ = grid.split_by_length(opened, "train")
    with pytest.raises(DataError, match=message):
        draw_excerpts(grid, tracks, RENDERED, 0, Mixes(tmp_path / "mixes").of(opened))


def test_mixes_and_mixing_belong_together(start: Callable[..., Training], mixes: Path) -> None:
    with pytest.raises(DataError, match=r"--mixes .*: use it with --mixing rendered"):
        start(mixes)
    with pytest.raises(DataError, match="--mixing rendered needs --mixes FOLDER, which fl"):
        start(None, "data.mixing=rendered")


def test_mixes_of_other_shards_are_refused(
    new_shards: Callable[..., Path], mixes: Path, tmp_path: Path
) -> None:
    tracks = dict.fromkeys("abc", ("train", 1.0))
    folder = new_shards(tmp_path / "s", {**tracks, "v": ("valid", 1.0)})
    with pytest.raises(MismatchError, match="rendered from 3 tracks that are not the 3 of the spl"):
        Mixes(mixes).of(Shards(folder))


def test_a_missing_file_is_named_before_training(
    start: Callable[..., Training], mixes: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(mixes, tmp_path / "mixes")
    path = folder / "epoch-000001-0000000.h5"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DamagedDataError, match=r"epoch-000001-0000000.h5: 100 bytes, the index"):
        start(folder, "data.mixing=rendered")
    path.unlink()
    with pytest.raises(CacheError, match=r"epoch-000001-0000000.h5: missing; run flsep-precompute"):
        start(folder, "data.mixing=rendered")


def test_resuming_needs_the_same_mixes(
    start: Callable[..., Training], shards: Path, mixes: Path, tmp_path: Path
) -> None:
    settings = ("data.mixing=rendered", "approach.name=concat", "fit.epochs=9")
    training = start(mixes, *settings)
    train_epochs(training, 2)
    state = training.checkpoint(resumable=True)
    more, other = tmp_path / "more", tmp_path / "other"
    make_mixes(more, Shards(shards), num_epochs=3, with_stems=True)
    make_mixes(other, Shards(shards), seed=1)
    start(more, *settings).restore(state, "last")  # the epochs so far are the same
    with pytest.raises(CheckpointError, match="last: trained with other mixes"):
        start(other, *settings).restore(state, "last")
    train_epochs(training, 1)
    state = training.checkpoint(resumable=True)
    with pytest.raises(CheckpointError, match=r"in epoch 4 with 2 epochs of mixes, .* has 3"):
        start(more, *settings).restore(state, "last")
    start(mixes, *settings).restore(state, "last")
