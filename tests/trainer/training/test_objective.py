"""Precision: which there is where, and what bfloat16 does to a training."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flsep.cache import Shards
from flsep.trainer.config import TrainConfig
from flsep.trainer.errors import ConfigError
from flsep.trainer.training.loop import finish_epoch, train_epoch, validate
from flsep.trainer.training.objective import set_precision
from flsep.trainer.training.state import Training

CPU = torch.device("cpu")


def train(config: TrainConfig, shards: Path) -> tuple[Training, list[float]]:
    training = Training(config, Shards(shards), device=CPU, num_workers=0)
    losses = []
    while training.finished is None:
        for progress in train_epoch(training):
            losses.append(progress.loss)
        finish_epoch(training, validate(training, lambda: False) or {})
    return training, losses


@pytest.mark.parametrize("approach", ["none", "contrastive"])
def test_a_loss_curve_in_bfloat16_stays_within_five_percent(
    tiny: Callable[..., TrainConfig], shards: Path, approach: str
) -> None:
    settings = (f"approach.name={approach}", "optim.learning_rate=5e-3", "data.batch_size=9")
    settings = (*settings, "fit.epochs=20", "fit.patience=20")
    _, expected = train(tiny(*settings), shards)
    training, found = train(tiny(*settings, "compute.precision=bfloat16"), shards)
    assert len(found) == 20
    assert expected[-1] < 0.8 * expected[0]
    assert found == pytest.approx(expected, rel=0.05)
    assert found != expected
    assert all(p.dtype == torch.float32 for p in training.model.parameters())
    state = training.model.separator.encoder_norm.state_dict()
    assert state["running_var"].dtype == torch.float32


def test_tf32_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="'tf32': cpu has no TF32; use float32, or a GPU"):
        set_precision("tf32", CPU)


def test_products_on_a_gpu_are_exact_unless_tf32_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    gpu = torch.device("cuda")
    try:
        for precision, allowed in (("tf32", True), ("float32", False)):
            set_precision(precision, gpu)
            assert torch.backends.cuda.matmul.allow_tf32 == allowed
            assert torch.backends.cudnn.allow_tf32 == allowed
        with pytest.raises(ConfigError, match="this GPU has no bfloat16"):
            set_precision("bfloat16", gpu)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
