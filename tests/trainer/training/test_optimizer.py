"""Accumulation, clipping and the moving average, against what they say by hand."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flsep.cache import Shards
from flsep.trainer.config import TrainConfig
from flsep.trainer.errors import NonFiniteLossError
from flsep.trainer.training.loop import train_batch, train_epoch, validate
from flsep.trainer.training.state import Training

CPU = torch.device("cpu")


@pytest.fixture
def start(tiny: Callable[..., TrainConfig], shards: Path) -> Callable[..., Training]:
    def make(*settings: str) -> Training:
        return Training(tiny(*settings), Shards(shards), device=CPU, num_workers=0)

    return make


def gradients(training: Training) -> dict[str, torch.Tensor]:
    named = training.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def test_accumulated_gradients_are_the_mean_over_excerpts(start: Callable[..., Training]) -> None:
    # 9 excerpts in batches of 2: steps of 2, 2 and 1 batches, the last one of a single excerpt.
    training = start("optim.accumulate=3")
    batches = list(training.splits.train_batches(0))
    assert [len(batch) for batch in batches] == [2, 2, 2, 2, 1]
    alone = start()
    expected: dict[str, torch.Tensor] = {}
    for batch in batches[3:]:
        alone.model.train()
        alone.model.zero_grad()
        alone.objective(alone.model, batch)["total"].backward()
        for name, gradient in gradients(alone).items():
            expected[name] = expected.get(name, 0) + len(batch) / 3 * gradient
    training.position.batch = 3
    before = {name: value.clone() for name, value in training.model.named_parameters()}
    assert "gradient_norm" not in train_batch(training, batches[3])
    assert all(torch.equal(p, before[name]) for name, p in training.model.named_parameters())
    training.position.batch = 4
    values = train_batch(training, batches[4])
    found = gradients(training)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert values["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert any((p != before[name]).any() for name, p in training.model.named_parameters())


def test_progress_says_where_steps_end(start: Callable[..., Training]) -> None:
    training = start("optim.accumulate=2")
    assert [p.is_step for p in train_epoch(training)] == [False, True, False, True, True]
    assert training.position.num_steps == 3


def test_gradients_are_clipped_to_a_norm(start: Callable[..., Training]) -> None:
    free, clipped = start(), start("optim.clip_norm=0.125")
    batch = next(free.splits.train_batches(0))
    norms = [train_batch(training, batch)["gradient_norm"] for training in (free, clipped)]
    assert norms[0] == norms[1] > 1
    for name, gradient in gradients(clipped).items():
        torch.testing.assert_close(gradient, gradients(free)[name] * (0.125 / norms[0]))


def test_the_moving_average_is_validated_and_kept(start: Callable[..., Training]) -> None:
    training = start("optim.ema_decay=0.75", "optim.learning_rate=1e-2")
    history = []
    for batch in training.splits.train_batches(0):
        train_batch(training, batch)
        training.position.batch += 1
        history.append({k: v.clone() for k, v in training.model.state_dict().items()})
    kept = training.checkpoint(resumable=False).tensors
    for name, first in history[0].items():
        if not first.is_floating_point():
            continue
        average = first
        for state in history[1:]:
            average = 0.75 * average + 0.25 * state[name]
        torch.testing.assert_close(kept[f"model.{name}"], average)
    loss = (validate(training, lambda: False) or {})["separation"]
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.fill_(math.nan)
    assert (validate(training, lambda: False) or {})["separation"] == loss


def test_a_gradient_that_is_not_finite_stops_before_the_step(
    start: Callable[..., Training],
) -> None:
    training = start("optim.accumulate=2")
    batches = list(training.splits.train_batches(0))
    train_batch(training, batches[0])
    training.position.batch = 1
    weight = training.model.separator.decoder_SHD
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = {name: value.clone() for name, value in training.model.named_parameters()}
    names = [*batches[0].names, *batches[1].names]
    with pytest.raises(
        NonFiniteLossError, match=r"batch 1: the gradient is not finite \(magnitude .*no step"
    ) as caught:
        train_batch(training, batches[1], names)
    assert "; ".join(names) in str(caught.value)
    assert all(torch.equal(p, before[name]) for name, p in training.model.named_parameters())
