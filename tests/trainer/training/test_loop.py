import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flsep.cache import Shards
from flsep.trainer.config import TrainConfig
from flsep.trainer.errors import NonFiniteLossError, RunError
from flsep.trainer.runs.checkpoint import load_checkpoint
from flsep.trainer.runs.folder import Run
from flsep.trainer.training import loop
from flsep.trainer.training.launch import resume_config
from flsep.trainer.training.loop import fit
from flsep.trainer.training.progress import describe_position, describe_training
from flsep.trainer.training.state import Training
from flsep.trainer.training.stopping import Stopped, StopRequest

SETTINGS = (
    "separator.num_layers=2",
    "separator.dropout=0.5",
    "approach.name=contrastive",
    "data.mixing=random",
    "approach.teacher_signal=stems",
    "optim.plateau_patience=0",
    "optim.accumulate=2",
    "optim.clip_norm=0.5",
    "optim.ema_decay=0.75",
    "fit.epochs=3",
)


@pytest.fixture
def start(tiny: Callable[..., TrainConfig], shards: Path) -> Callable[..., Training]:
    def make(*settings: str, num_workers: int = 0) -> Training:
        return Training(
            tiny(*settings), Shards(shards), device=torch.device("cpu"), num_workers=num_workers
        )

    return make


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "run")
    run.prepare(overwrite=False)
    return run


@pytest.fixture(scope="module")
def whole(
    tiny: Callable[..., TrainConfig], shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A run that was never interrupted."""
    run = Run(tmp_path_factory.mktemp("whole"))
    run.prepare(overwrite=False)
    cpu = torch.device("cpu")
    training = Training(tiny(*SETTINGS), Shards(shards), device=cpu, num_workers=0)
    fit(training, run, report=lambda line: None)
    return run


class StopAfter:
    """Stands in for `StopRequest`: a signal seems to come after a number of batches."""

    def __init__(self, num_batches: int) -> None:
        self.left = num_batches

    def __call__(self) -> "StopRequest":
        request = StopRequest()

        def requested() -> bool:
            self.left -= 1
            if self.left == 0:
                request.number = signal.SIGTERM
            return request.number is not None

        request.requested = requested  # type: ignore[method-assign]
        return request


def assert_same_state(first: Run, second: Run) -> None:
    for name in ("best", "last"):
        one, two = (load_checkpoint(getattr(run, name)) for run in (first, second))
        assert one.tensors.keys() == two.tensors.keys()
        different = [k for k, v in one.tensors.items() if not torch.equal(v, two.tensors[k])]
        assert different == []
        if one.training is not None and two.training is not None:
            assert one.training == two.training
        assert one.epoch == two.epoch


# An epoch asks 3 times while it trains, a step of two batches each, twice while it validates.
@pytest.mark.parametrize("num_batches", [1, 3, 4, 6, 13])
def test_a_resumed_run_equals_an_uninterrupted_one(
    start: Callable[..., Training],
    run: Run,
    whole: Run,
    monkeypatch: pytest.MonkeyPatch,
    read_metrics: Callable[[Path], list[dict[str, Any]]],
    num_batches: int,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(loop, "StopRequest", StopAfter(num_batches))
        with pytest.raises(Stopped, match=f"epoch {1 + (num_batches - 1) // 5}"):
            fit(start(*SETTINGS), run, report=lambda line: None)
    torch.manual_seed(99)
    resumed = start(*SETTINGS, num_workers=3)
    resumed.restore(load_checkpoint(run.last), "x")
    fit(resumed, run, report=lambda line: None)
    assert_same_state(whole, run)
    assert read_metrics(run.folder) == read_metrics(whole.folder)


def test_a_run_that_died_without_notice_goes_on_from_its_last_epoch(
    start: Callable[..., Training],
    run: Run,
    whole: Run,
    monkeypatch: pytest.MonkeyPatch,
    read_metrics: Callable[[Path], list[dict[str, Any]]],
) -> None:
    saved = []
    save = loop.save_checkpoint

    def die(path: Path, checkpoint: Any) -> None:
        saved.append(path.name)
        if saved.count("last.safetensors") == 2:  # best and metrics of epoch 2 are written
            raise KeyboardInterrupt
        save(path, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", die)
        with pytest.raises(KeyboardInterrupt):
            fit(start(*SETTINGS), run, report=lambda line: None)
    assert len(read_metrics(run.folder)) == 2
    resumed = start(*SETTINGS)
    resumed.restore(load_checkpoint(run.last), "x")
    assert resumed.position.epoch == 1
    fit(resumed, run, report=lambda line: None)
    assert_same_state(whole, run)
    assert read_metrics(run.folder) == read_metrics(whole.folder)


def test_a_run_saves_within_an_epoch(
    start: Callable[..., Training], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []
    save = loop.save_checkpoint

    def note(path: Path, checkpoint: Any) -> None:
        if path == run.last:
            places.append((checkpoint.epoch, checkpoint.training["position"]["batch"]))
        save(path, checkpoint)

    monkeypatch.setattr(loop, "save_checkpoint", note)
    fit(start(*SETTINGS, "fit.epochs=1"), run, report=lambda line: None, seconds_between_saves=0)
    assert places == [(0, 2), (0, 4), (0, 5), (1, 0)]


def test_a_run_says_how_it_went(start: Callable[..., Training], run: Run) -> None:
    lines: list[str] = []
    fit(start("approach.name=distance"), run, report=lines.append)
    assert lines[0].startswith("epoch 1/2: train ")
    assert "regularizer" in lines[0]
    assert lines[-1] == "all 2 epochs are done"
    epochs = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == [0, 1]
    for epoch in epochs:
        assert epoch.keys() == {
            "epoch", "train", "valid", "best", "learning_rate", "seconds",
            "excerpts_per_second", "data_wait_share", "gradient_norm",
        }  # fmt: skip
        terms = {"magnitude", "time", "separation", "regularizer", "num_windows", "total"}
        assert epoch["train"].keys() == epoch["valid"].keys() == terms
        assert 0 <= epoch["data_wait_share"] <= 1
    best = min(epochs, key=lambda epoch: epoch["valid"]["separation"])
    assert load_checkpoint(run.best).metrics["valid"] == best["valid"]
    assert load_checkpoint(run.best).training is None
    assert load_checkpoint(run.last).epoch == 2
    assert len(list(run.folder.glob("events.*"))) == 1


def test_a_finished_run_stays_as_it_is_and_can_be_prolonged(
    start: Callable[..., Training], run: Run
) -> None:
    fit(start(), run, report=lambda line: None)
    content = run.last.read_bytes()
    finished = start()
    finished.restore(load_checkpoint(run.last), "x")
    lines: list[str] = []
    fit(finished, run, report=lines.append)
    assert lines == ["all 2 epochs are done"]
    assert run.last.read_bytes() == content
    longer = start("fit.epochs=3")
    longer.restore(load_checkpoint(run.last), "x")
    fit(longer, run, report=lambda line: None)
    assert len(run.metrics.read_text().splitlines()) == 3


def test_a_non_finite_loss_keeps_the_last_checkpoint(
    start: Callable[..., Training], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = start()
    train_batch = loop.train_batch

    def spoil(training: Training, batch: Any, names: list[str]) -> dict[str, float]:
        if training.position.epoch == 1:
            batch.frames[:] = torch.nan
        return train_batch(training, batch, names)

    monkeypatch.setattr(loop, "train_batch", spoil)
    with pytest.raises(NonFiniteLossError, match="epoch 1, batch 0"):
        fit(training, run, report=lambda line: None)
    assert load_checkpoint(run.last).epoch == 1


def test_resuming_with_other_settings_is_refused(tiny: Callable[..., TrainConfig]) -> None:
    stored = tiny()
    wanted = tiny("fit.epochs=9", "fit.patience=7")
    assert resume_config(stored, wanted, Path("r")) == wanted
    with pytest.raises(RunError, match=r"r was started with loss.time_weight=10.0, not 2.0"):
        resume_config(stored, tiny("loss.time_weight=2"), Path("r"))
    with pytest.raises(RunError, match=r"r was started with approach.name=none, not distance"):
        resume_config(stored, tiny("approach.name=distance"), Path("r"))


def test_signals_are_noted_and_handlers_put_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)]
    request = StopRequest()
    with request.catching():
        assert not request.requested()
        signal.raise_signal(signal.SIGUSR1)
        assert request.number == signal.SIGUSR1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # the second one does not wait
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)] == before


def test_a_description_in_a_few_lines(
    start: Callable[..., Training], new_shards: Callable[..., Path], tmp_path: Path,
    tiny: Callable[..., TrainConfig],
) -> None:  # fmt: skip
    training = start("approach.name=contrastive", "approach.weight=0.5")
    text = "\n".join(describe_training(training))
    assert 5 <= len(text.splitlines()) <= 8
    for part in (
        "3 tracks to train on, 1 to validate; original mixing",
        "9 excerpts of 0.7 s in 5 batches; then 4 to validate",
        "drums, bass, vocals; 0.0",
        "contrastive with the mixture's embeddings, weight 0.5",
        "windows of 0.3 s, 2 whole ones in an excerpt",
        "epochs: at most 2, on cpu, float32, seed 0",
    ):
        assert part in text
    assert describe_position(training) == "epoch 1, 0 of 5 batches"
    folder = new_shards(
        tmp_path / "s", {"a": ("train", 1.0), "tiny": ("train", 0.4), "b": ("valid", 1.0)}
    )
    short = Training(tiny(), Shards(folder), device=torch.device("cpu"), num_workers=0)
    warnings = [line for line in describe_training(short) if line.startswith("Warning")]
    assert warnings == ["Warning: left out, shorter than 0.7 s: 'tiny'"]
