"""The training loop: train, validate, schedule, save; stop cleanly and go on exactly."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from flsep.trainer.checkpoint import save_checkpoint
from flsep.trainer.config import TrainConfig, list_differences
from flsep.trainer.runs import EventLog, Run, RunError
from flsep.trainer.training import Training

_SECONDS_BETWEEN_LINES = 10.0
_CAN_CHANGE = {"fit.epochs", "fit.patience"}
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):  # noqa: N818 - no error
    """The training was asked to stop by a signal, and has saved its state."""

    def __init__(self, number: signal.Signals, place: str) -> None:
        super().__init__(place)
        self.number = number
        self.place = place


class StopRequest:
    """Whether a signal asked the training to stop.

    SIGINT (Ctrl-C), SIGTERM and SIGUSR1 are noted, to be acted on after the step; a second SIGINT
    interrupts at once. Signals reach the main thread only; elsewhere none are caught.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Note signals instead of dying of them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = signal.Signals(number)


def resume_config(stored: TrainConfig, wanted: TrainConfig, folder: Path) -> TrainConfig:
    """Return the configuration to resume a run with: its own, with what may change.

    Parameters
    ----------
    stored, wanted : TrainConfig
        Of the run, and what is asked for now.
    folder : Path
        Of the run, for the message.

    Raises
    ------
    RunError
        If anything but the number of epochs and the patience differs.
    """
    for name, (old, new) in list_differences(stored, wanted).items():
        if name not in _CAN_CHANGE:
            raise RunError(
                f"{folder} was started with {name}={old}, not {new}: resume it with its own "
                "settings, or choose another --run"
            )
    return wanted


def describe_training(training: Training) -> Iterator[str]:
    """Yield lines that say what a training will do."""
    config, layout, grid = training.config, training.layout, training.grid
    approach, data = config.approach, config.data
    num_parameters = sum(parameter.numel() for parameter in training.model.parameters())
    yield (
        f"data       {len(training.train_tracks)} tracks to train on, "
        f"{len(training.valid_tracks)} to validate; {data.mixing} mixing"
    )
    if training.short_tracks:
        names = ", ".join(repr(track.name) for track in training.short_tracks)
        yield f"Warning: left out, shorter than {data.excerpt_seconds:g} s: {names}"
    yield (
        f"epoch      {len(training.train_excerpts)} excerpts of {data.excerpt_seconds:g} s in "
        f"{training.num_batches} batches; then {len(training.valid_excerpts)} to validate"
    )
    yield (
        f"separator  X-UMX for {', '.join(layout.sources)}; {num_parameters / 1e6:.2f} M parameters"
    )
    if approach.name == "none":
        yield "approach   none: plain X-UMX"
    else:
        weight = f", weight {training.model.approach.weight:g}" * (approach.name != "concat")
        yield f"approach   {approach.name} with the {approach.teacher_signal}'s embeddings{weight}"
        yield (
            f"teacher    {layout.teacher}: {layout.embedding_size} features, windows of "
            f"{layout.window_seconds:g} s, {grid.num_whole_windows} whole ones in an excerpt"
        )
    yield (
        f"training   at most {config.fit.epochs} epochs on {training.device}, "
        f"seed {config.fit.seed}"
    )


def fit(training: Training, run: Run, *, report: Callable[[str], None]) -> None:
    """Train until all epochs are done or validation stops to improve.

    Parameters
    ----------
    training : Training
        New or restored.
    run : Run
        Its folder is prepared.
    report : callable
        Takes each line of progress, where no terminal shows a bar.

    Raises
    ------
    Stopped
        After a signal; ``last.safetensors`` is written.
    NonFiniteLossError
        If a loss is not finite; the last checkpoint is the one before.
    CacheError
        For damaged shards.
    CheckpointError, OSError
        If the run folder cannot be written.
    """
    stop, position = StopRequest(), training.position
    run.trim_metrics(position.epoch)
    size = len(training.train_excerpts)
    with (
        stop.catching(),
        EventLog(run.folder, position.epoch) as events,
        tqdm(
            total=size * training.config.fit.epochs,
            initial=size * position.epoch + position.num_excerpts,
            unit=" excerpts",
            disable=not sys.stderr.isatty(),
        ) as bar,
    ):
        pace = _Pace(training, report if bar.disable else lambda line: None)

        def advance(count: int, loss: float) -> None:
            bar.set_description(f"epoch {training.position.epoch + 1}", refresh=False)
            best_loss = training.position.best_loss
            best = {} if best_loss is None else {"best": f"{best_loss:.3f}"}
            bar.set_postfix(loss=f"{loss:.3f}", **best, refresh=False)
            bar.update(count)

        while training.finished is None:
            valid = None
            if training.train_epoch(stop.requested, advance):
                valid = training.validate(stop.requested)
            if valid is None:
                assert stop.number is not None
                save_checkpoint(run.last, training.checkpoint(resumable=True))
                raise Stopped(stop.number, describe_place(training))
            if training.finish_epoch(valid):
                save_checkpoint(run.best, training.checkpoint(resumable=False))
            run.append_metrics(training.metrics)
            events.add(training.metrics["epoch"], _flatten(training.metrics))
            save_checkpoint(run.last, training.checkpoint(resumable=True))
            pace.report()
    report(training.finished)


class _Pace:
    """Says how it goes, an epoch a line, but not more often than every few seconds."""

    def __init__(self, training: Training, write: Callable[[str], None]) -> None:
        self._training, self._write = training, write
        self._first_epoch, self._began = training.position.epoch, time.monotonic()
        self._written = -_SECONDS_BETWEEN_LINES

    def report(self) -> None:
        now, metrics = time.monotonic(), self._training.metrics
        if now - self._written < _SECONDS_BETWEEN_LINES and self._training.finished is None:
            return
        self._written = now
        done, epochs = metrics["epoch"] + 1, self._training.config.fit.epochs
        left = (now - self._began) / (done - self._first_epoch) * (epochs - done)
        train, valid = metrics["train"], metrics["valid"]
        regularizer = ""
        if "regularizer" in train:
            regularizer = f"regularizer {train['regularizer']:.4f}, "
        self._write(
            f"epoch {done}/{epochs}: train {train['separation']:.4f}, "
            f"valid {valid['separation']:.4f} "
            f"(best {self._training.position.best_loss:.4f}), {regularizer}"
            f"{metrics['excerpts_per_second']:.1f} excerpts/s, "
            f"{left // 60:.0f}:{left % 60:02.0f} left"
        )


def describe_place(training: Training) -> str:
    """Say how far a training has come."""
    position = training.position
    return f"epoch {position.epoch + 1}, {position.batch} of {training.num_batches} batches"


def _flatten(metrics: dict[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{term}": number for term, number in value.items()}
        elif name != "epoch":
            flat[name] = float(value)
    return flat
