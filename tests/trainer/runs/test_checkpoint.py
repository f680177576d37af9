import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flsep.cache import Layout
from flsep.trainer.approaches.informed import build_model
from flsep.trainer.config import TrainConfig
from flsep.trainer.errors import CheckpointError
from flsep.trainer.runs.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_model,
    pack_optimizer,
    require_same_data,
    save_checkpoint,
    unpack_optimizer,
)
from flsep.trainer.teacher import Standard


@pytest.fixture
def checkpoint(tiny: Callable[..., TrainConfig], layout: Layout) -> Checkpoint:
    config = tiny("approach.name=concat")
    model = build_model(config, layout)
    rng = np.random.default_rng(0)
    return Checkpoint(
        config=config,
        layout=layout,
        standard=Standard(*rng.standard_normal((2, 6), dtype=np.float32)),
        fingerprint="f" * 64,
        epoch=3,
        metrics={"valid": {"separation": 0.1 + 0.2}},
        packages={"flsep": "0"},
        training={"schedule": {"best": float("inf")}},
        tensors={f"model.{name}": value for name, value in model.state_dict().items()},
    )


def test_a_file_gives_the_checkpoint_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, checkpoint)
    found = load_checkpoint(path)
    for name in ("config", "layout", "fingerprint", "epoch", "metrics", "packages", "training"):
        assert getattr(found, name) == getattr(checkpoint, name)
    assert found.standard is not None
    assert checkpoint.standard is not None
    assert (found.standard.mean == checkpoint.standard.mean).all()
    assert (found.standard.scale == checkpoint.standard.scale).all()
    assert found.tensors.keys() == checkpoint.tensors.keys()
    assert all(torch.equal(found.tensors[k], v) for k, v in checkpoint.tensors.items())
    assert [p.name for p in tmp_path.iterdir()] == ["best.safetensors"]


def test_the_file_has_the_permissions_of_any_other(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    save_checkpoint(tmp_path / "best.safetensors", checkpoint)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_the_model_of_a_checkpoint_gives_the_same_estimates(
    checkpoint: Checkpoint, tmp_path: Path, layout: Layout
) -> None:
    torch.manual_seed(5)
    model = build_model(checkpoint.config, layout).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    save_checkpoint(tmp_path / "x.safetensors", replace(checkpoint, tensors=tensors))
    loaded = load_model(load_checkpoint(tmp_path / "x.safetensors"), "x")
    assert not loaded.training
    magnitude, condition = torch.rand(5, 1, 2, 129), torch.rand(5, 1, 128)
    with torch.no_grad():
        expected = model.separator(magnitude, condition).estimates_SNBCF
        assert torch.equal(loaded.separator(magnitude, condition).estimates_SNBCF, expected)


def test_there_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint; train one with flsep-train fit"):
        load_checkpoint(tmp_path / "best.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.1, 0.9, 0.9999])
def test_a_truncated_file_is_refused(checkpoint: Checkpoint, tmp_path: Path, share: float) -> None:
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, checkpoint)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(CheckpointError, match=r"best.safetensors: truncated or no safetensors"):
        load_checkpoint(path)


def rewrite(path: Path, **changes: object) -> None:
    """Change entries of the header."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["flsep"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata={"flsep": json.dumps({**header, **changes})})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "checkpoint version 3, this flsep reads 2; use the flsep that"),
        ({"version": 1}, "checkpoint version 1, this flsep reads 2"),
        ({"format": "other"}, "its header is not readable .format 'other'"),
        ({"config": {}}, "its header is not readable .stored configuration: section 'separator'"),
        ({"layout": {"n_fft": 3}}, "its header is not readable .Layout has the fields"),
        ({"standard": {"mean": []}}, "its header is not readable .'scale'"),
    ],
)
def test_a_bad_header_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, checkpoint)
    rewrite(path, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)


def test_other_safetensors_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="a safetensors file, but no flsep-checkpoint"):
        load_checkpoint(tmp_path / "a.safetensors")


def test_weights_of_another_shape_are_refused(
    checkpoint: Checkpoint, tiny: Callable[..., TrainConfig], layout: Layout
) -> None:
    wider = tiny("separator.hidden_size=16", "approach.name=concat")
    state = build_model(wider, layout).state_dict()
    other = replace(checkpoint, tensors={f"model.{name}": v for name, v in state.items()})
    with pytest.raises(CheckpointError, match=r"x: .* has shape .* another model"):
        load_model(other, "x")
    fewer = {k: v for k, v in checkpoint.tensors.items() if "lstms.1" not in k}
    with pytest.raises(CheckpointError, match=r"lstms.1.* has shape none, expected"):
        load_model(replace(checkpoint, tensors=fewer), "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ("drums", "vocals")}, "trained with sources drums, bass, vocals, the shards"),
        ({"n_fft": 512}, "trained with n_fft 256, the shards have 512"),
        ({"sample_rate_hz": 16000}, "sample_rate_hz 8000, the shards have 16000"),
        ({"teacher_digest": "1"}, "trained with teacher_digest 0000"),
    ],
)
def test_data_of_another_kind_are_refused(
    checkpoint: Checkpoint, layout: Layout, changes: dict[str, object], message: str
) -> None:
    require_same_data(checkpoint, replace(layout, stft_dtype="float32"), "x")
    with pytest.raises(CheckpointError, match=message):
        require_same_data(checkpoint, replace(layout, **changes), "x")  # type: ignore[arg-type]


def test_only_concat_needs_the_same_teacher(
    checkpoint: Checkpoint, layout: Layout, tiny: Callable[..., TrainConfig]
) -> None:
    other = replace(checkpoint, config=tiny("approach.name=contrastive"))
    require_same_data(other, replace(layout, teacher_digest="1"), "x")


def test_a_failed_save_keeps_the_old_file(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, checkpoint)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"last.safetensors: cannot be written .*No space"):
        save_checkpoint(path, replace(checkpoint, epoch=4))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.safetensors"]


def test_a_missing_folder_is_one_line(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        save_checkpoint(tmp_path / "gone" / "last.safetensors", checkpoint)
    assert "\n" not in str(caught.value)


def test_an_optimizer_goes_on_as_if_it_had_not_stopped() -> None:
    def make() -> tuple[torch.nn.Linear, torch.optim.Adam]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.Adam(layer.parameters(), lr=0.1, weight_decay=0.01)

    def step(layer: torch.nn.Linear, optimizer: torch.optim.Adam) -> None:
        optimizer.zero_grad()
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()

    layer, optimizer = make()
    step(layer, optimizer)
    step(layer, optimizer)
    groups, tensors = pack_optimizer(optimizer)
    groups = json.loads(json.dumps(groups))
    tensors = {name: value.clone() for name, value in tensors.items()}
    other, resumed = make()
    other.load_state_dict(layer.state_dict())
    unpack_optimizer(resumed, groups, tensors)
    step(layer, optimizer)
    step(other, resumed)
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)
