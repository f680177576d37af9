"""The training loop: train, validate, schedule, save; stop cleanly and go on exactly."""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, Self

from tqdm import tqdm

from flsep.trainer.checkpoint import save_checkpoint
from flsep.trainer.config import TrainConfig, list_differences
from flsep.trainer.runs import EventLog, Run, RunError
from flsep.trainer.training import Progress, Training

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
    config, layout, splits = training.config, training.layout, training.splits
    approach, data = config.approach, config.data
    num_parameters = sum(parameter.numel() for parameter in training.model.parameters())
    yield (
        f"data       {len(splits.train_tracks)} tracks to train on, "
        f"{len(splits.valid_tracks)} to validate; {data.mixing} mixing"
    )
    if splits.short_tracks:
        names = ", ".join(repr(track.name) for track in splits.short_tracks)
        yield f"Warning: left out, shorter than {data.excerpt_seconds:g} s: {names}"
    yield (
        f"epoch      {len(splits.train_excerpts)} excerpts of {data.excerpt_seconds:g} s in "
        f"{splits.num_batches} batches; then {len(splits.valid_excerpts)} to validate"
    )
    if training.mixes is not None:
        num_epochs = training.mixes.num_epochs
        again = "; then again from the first" if config.fit.epochs > num_epochs else ""
        yield f"mixes      {num_epochs} epochs of {training.mixes.folder}{again}"
    yield (
        f"separator  X-UMX for {', '.join(layout.sources)}; {num_parameters / 1e6:.2f} M parameters"
    )
    num_windows = splits.grid.num_whole_windows
    if training.mixes is not None and approach.teacher_signal == "mixture":
        num_windows = training.mixes.config.num_windows
    if approach.name == "none":
        yield "approach   none: plain X-UMX"
    else:
        weight = f", weight {training.model.approach.weight:g}" * (approach.name != "concat")
        yield f"approach   {approach.name} with the {approach.teacher_signal}'s embeddings{weight}"
        yield (
            f"teacher    {layout.teacher}: {layout.embedding_size} features, windows of "
            f"{layout.window_seconds:g} s, {num_windows} whole ones in an excerpt"
        )
    ranks = training.part.num_ranks
    yield (
        f"training   at most {config.fit.epochs} epochs on "
        + (f"{ranks} x {training.device.type}" if ranks > 1 else str(training.device))
        + f", {config.compute.precision}, seed {config.fit.seed}"
    )


def fit(
    training: Training,
    run: Run,
    *,
    report: Callable[[str], None],
    seconds_between_saves: float = math.inf,
) -> None:
    """Train until all epochs are done or validation stops to improve.

    All processes of a training call it; the first one writes and reports.

    Parameters
    ----------
    training : Training
        New or restored.
    run : Run
        Its folder is prepared.
    report : callable
        Takes each line of progress, where no terminal shows a bar.
    seconds_between_saves : float
        Write ``last.safetensors`` within an epoch too when the last one is this old.

    Raises
    ------
    Stopped
        After a signal to any of the processes; ``last.safetensors`` is written.
    NonFiniteLossError
        If a loss is not finite; the last checkpoint is the one before.
    CacheError
        For damaged shards.
    CheckpointError, OSError
        If the run folder cannot be written.
    """
    stop, position = StopRequest(), training.position
    is_first = training.part.rank == 0
    size = len(training.splits.train_excerpts)
    saved = time.monotonic()

    def save_last() -> None:
        nonlocal saved
        checkpoint = training.checkpoint(resumable=True)
        if is_first:
            save_checkpoint(run.last, checkpoint)
        saved = time.monotonic()

    def stop_here() -> Stopped:
        save_last()
        return Stopped(stop.number or signal.SIGTERM, describe_place(training))

    with (
        stop.catching(),
        _Record(run, position.epoch) if is_first else nullcontext() as record,
        tqdm(
            total=size * training.config.fit.epochs,
            initial=size * position.epoch + position.num_excerpts,
            unit=" excerpts",
            disable=not (is_first and sys.stderr.isatty()),
        ) as bar,
    ):
        pace = _Pace(training, report if bar.disable else lambda line: None)
        while training.finished is None:
            with closing(training.train_epoch()) as epoch:
                for progress in epoch:
                    _show(bar, training, progress)
                    if not progress.is_step:
                        continue
                    if training.any_rank(stop.requested()):
                        raise stop_here()
                    if training.any_rank(
                        is_first and time.monotonic() - saved >= seconds_between_saves
                    ):
                        save_last()
            valid = training.validate(stop.requested)
            if valid is None:
                raise stop_here()
            best = training.finish_epoch(valid)
            if record is not None:
                if best:
                    save_checkpoint(run.best, training.checkpoint(resumable=False))
                record.add(training.metrics)
            save_last()
            pace.report()
    report(training.finished)


def _show(bar: Any, training: Training, progress: Progress) -> None:
    bar.set_description(f"epoch {training.position.epoch + 1}", refresh=False)
    best_loss = training.position.best_loss
    best = {} if best_loss is None else {"best": f"{best_loss:.3f}"}
    bar.set_postfix(loss=f"{progress.loss:.3f}", **best, refresh=False)
    bar.update(progress.num_excerpts)


class _Record:
    """Keeps the metrics of a run, as lines and as TensorBoard events."""

    def __init__(self, run: Run, num_epochs: int) -> None:
        self._run = run
        run.trim_metrics(num_epochs)
        self._events = EventLog(run.folder, num_epochs)

    def add(self, metrics: dict[str, Any]) -> None:
        self._run.append_metrics(metrics)
        self._events.add(metrics["epoch"], _flatten(metrics))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._events.__exit__(*error)


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
    return f"epoch {position.epoch + 1}, {position.batch} of {training.splits.num_batches} batches"


def _flatten(metrics: dict[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{term}": number for term, number in value.items()}
        elif name != "epoch":
            flat[name] = float(value)
    return flat
