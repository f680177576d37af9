from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flsep.cache import DamagedDataError, MissingDataError, Shards
from flsep.trainer.config import TrainConfig
from flsep.trainer.errors import CheckpointError, NonFiniteLossError
from flsep.trainer.training.loop import finish_epoch, train_batch, train_epoch, validate
from flsep.trainer.training.state import Training

APPROACHES = [
    ("none", "original", "mixture"),
    ("none", "random", "mixture"),
    ("concat", "original", "mixture"),
    ("contrastive", "original", "mixture"),
    ("contrastive", "random", "stems"),
    ("distance", "original", "stems"),
    ("distance", "random", "stems"),
]


@pytest.fixture
def start(tiny: Callable[..., TrainConfig], shards: Path) -> Callable[..., Training]:
    def make(*settings: str, folder: Path = shards) -> Training:
        return Training(tiny(*settings), Shards(folder), device=torch.device("cpu"), num_workers=0)

    return make


def never() -> bool:
    return False


@pytest.mark.parametrize(("approach", "mixing", "signal"), APPROACHES)
def test_a_step_moves_every_parameter_and_adds_up(
    start: Callable[..., Training], approach: str, mixing: str, signal: str
) -> None:
    regularized = approach in ("contrastive", "distance")
    training = start(
        f"approach.name={approach}",
        f"data.mixing={mixing}",
        *([f"approach.teacher_signal={signal}", "approach.weight=0.25"] if regularized else []),
    )
    before = {name: value.clone() for name, value in training.model.named_parameters()}
    values = train_batch(training, next(training.splits.train_batches(0)))
    assert values["separation"] == pytest.approx(values["magnitude"] + 10 * values["time"])
    assert ("regularizer" in values) == regularized
    expected = values["separation"] + 0.25 * values.get("regularizer", 0)
    assert values["total"] == pytest.approx(expected)
    if regularized:
        # 2 excerpts of 2 whole windows; the silent last one of the vocals is left out.
        assert 3 <= values["num_windows"] <= (12 if signal == "stems" else 4)
    still = [
        name
        for name, value in training.model.named_parameters()
        if value.grad is None or torch.equal(value, before[name])
    ]
    assert still == []


def test_training_lowers_the_loss(start: Callable[..., Training]) -> None:
    training = start("optim.learning_rate=1e-2", "separator.hidden_size=16")
    losses = []
    for _ in range(6):
        list(train_epoch(training))
        finish_epoch(training, validate(training, never) or {})
        losses.append(training.metrics["valid"]["separation"])
    assert losses[-1] < 0.75 * losses[0]
    assert training.metrics["train"]["separation"] < 7


@pytest.mark.parametrize("spoilt", ["weights", "data"])
def test_a_non_finite_loss_stops_before_the_step(
    start: Callable[..., Training], spoilt: str
) -> None:
    training = start()
    batch = next(training.splits.train_batches(0))
    if spoilt == "weights":
        with torch.no_grad():
            training.model.separator.decoder_SHD.fill_(torch.nan)
        what = "the excerpts were: .*' at .* s; .*' at .* s; try a lower optim.learning_rate"
    else:
        batch.frames[batch.starts[1, 1] + 5] = torch.inf
        what = f"these excerpts hold NaN or infinity: {batch.names[1]}; precompute"
    before = {name: value.clone() for name, value in training.model.named_parameters()}
    with pytest.raises(
        NonFiniteLossError, match=f"epoch 0, batch 0: the loss is not finite .*nan.*{what}"
    ) as caught:
        train_batch(training, batch)
    assert "\n" not in str(caught.value)
    for name, value in training.model.named_parameters():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    assert training.optimizer.adam.state == {}


def test_a_non_finite_validation_stops_too(start: Callable[..., Training]) -> None:
    training = start()
    with torch.no_grad():
        next(training.model.parameters()).fill_(torch.nan)
    with pytest.raises(NonFiniteLossError, match="'four' at"):
        validate(training, never)


def test_validation_leaves_no_trace(start: Callable[..., Training]) -> None:
    training = start("separator.num_layers=2", "separator.dropout=0.5")
    train_batch(training, next(training.splits.train_batches(0)))
    state = {name: value.clone() for name, value in training.model.state_dict().items()}
    random = torch.get_rng_state()
    first = validate(training, never)
    assert first == validate(training, never)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, state[k]) for k, value in training.model.state_dict().items())


def test_validation_weighs_excerpts_alike(start: Callable[..., Training]) -> None:
    one, many = start("data.batch_size=1"), start("data.batch_size=3")
    assert len(one.splits.valid_excerpts) == 4  # batches of 3 and 1
    first, second = validate(one, never), validate(many, never)
    assert first is not None
    assert second is not None
    assert first["separation"] == pytest.approx(second["separation"], rel=1e-5)


def script(training: Training, losses: list[float]) -> list[tuple[bool, float, str | None]]:
    """Finish epochs with the given validation losses: best?, learning rate, why it is over."""
    history = []
    for loss in losses:
        training.position.num_excerpts, training.position.seconds = 1, 1.0
        best = finish_epoch(training, {"separation": loss, "total": 0.0})
        history.append((best, training.optimizer.adam.param_groups[0]["lr"], training.finished))
    return history


def test_schedule_best_and_early_stop_follow_the_separation_loss(
    start: Callable[..., Training],
) -> None:
    training = start(
        "optim.learning_rate=1", "optim.plateau_factor=0.5", "optim.plateau_patience=1",
        "optim.plateau_cooldown=0", "fit.epochs=100", "fit.patience=3",
    )  # fmt: skip
    history = script(training, [5.0, 4.0, 4.5, 4.5, 4.2])
    assert [best for best, _, _ in history] == [True, True, False, False, False]
    assert [rate for _, rate, _ in history] == [1, 1, 1, 0.5, 0.5]
    assert [over for *_, over in history] == [None] * 4 + ["no better validation loss for 3 epochs"]
    assert training.metrics["learning_rate"] == 0.5
    assert (training.position.best_loss, training.position.best_epoch) == (4.0, 1)


def test_all_epochs_done(start: Callable[..., Training]) -> None:
    history = script(start("fit.epochs=2"), [2.0, 1.0])
    assert [over for *_, over in history] == [None, "all 2 epochs are done"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("approach.name=concat", "data.mixing=random"), "random mixture has no precomputed"),
        (
            ("approach.name=concat", "approach.teacher_signal=stems"),
            "'mixture': concat needs",
        ),
        (("approach.name=distance", "data.mixing=random"), "--teacher-signal stems"),
        (("approach.name=contrastive", "data.excerpt_seconds=0.2"), "0.2 s holds no whole teacher"),
        (("data.excerpt_seconds=9",), "no track of the split 'train' can hold an excerpt of 9 s"),
    ],
)
def test_impossible_trainings_are_refused(
    start: Callable[..., Training], settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises((ValueError, MissingDataError), match=message):
        start(*settings)


def test_short_excerpts_are_enough_without_a_regularizer(start: Callable[..., Training]) -> None:
    start("data.excerpt_seconds=0.2")
    start("data.excerpt_seconds=0.2", "approach.name=concat")


def test_missing_shards_are_named_at_once(
    start: Callable[..., Training], new_shards: Callable[..., Path], tmp_path: Path
) -> None:
    folder = new_shards(
        tmp_path / "s", {"a": ("train", 1.0), "b": ("valid", 1.0), "c": ("test", 1.0)}
    )
    (folder / "2.h5").unlink()
    start(folder=folder)  # the test split is not needed
    with open(folder / "1.h5", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(DamagedDataError, match=r"1.h5: 1000 bytes, the index says"):
        start(folder=folder)


def test_a_checkpoint_restores_everything(start: Callable[..., Training]) -> None:
    settings = ("separator.num_layers=2", "separator.dropout=0.5", "approach.name=contrastive")
    training = start(*settings)
    batches = list(training.splits.train_batches(0))
    for batch in batches[:3]:
        train_batch(training, batch)
        training.position.batch += 1
    checkpoint = training.checkpoint(resumable=True)
    frozen = {name: value.clone() for name, value in checkpoint.tensors.items()}
    expected = [train_batch(training, batch) for batch in batches[3:]]

    other = start(*settings)
    other.restore(_with(checkpoint, tensors=frozen), "x")
    assert other.position.batch == 3
    assert [train_batch(other, batch) for batch in other.splits.train_batches(0, 3)] == expected


def test_foreign_checkpoints_are_refused(start: Callable[..., Training]) -> None:
    training = start()
    checkpoint = training.checkpoint(resumable=True)
    with pytest.raises(CheckpointError, match="x: holds weights only; resume from last"):
        training.restore(training.checkpoint(resumable=False), "x")
    with pytest.raises(CheckpointError, match="x: trained on shards made with another config"):
        training.restore(_with(checkpoint, fingerprint="other"), "x")
    with pytest.raises(CheckpointError, match=r"x: .* has shape"):
        start("separator.hidden_size=16").restore(checkpoint, "x")


def _with(checkpoint: Any, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(checkpoint, **changes)
