"""Report a training: its set-up, a bar or a line for each epoch, the log of its metrics."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Self

from flsep.trainer.runs.folder import EventLog, Run
from flsep.trainer.training.state import Training

_SECONDS_BETWEEN_LINES = 10.0


def describe_training(training: Training) -> Iterator[str]:
    """Yield lines that say what a training will do."""
    config, layout, splits = training.config, training.layout, training.splits
    data, model, needs = config.data, training.model, training.needs
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
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    yield f"separator  {model.separator.describe()}; {num_parameters / 1e6:.2f} M parameters"
    yield f"approach   {model.approach.describe()}"
    if needs.teacher_signal is not None:
        num_windows = splits.grid.num_whole_windows
        if training.mixes is not None and needs.teacher_signal == "mixture":
            num_windows = training.mixes.config.num_windows
        yield (
            f"teacher    {layout.teacher}: {layout.embedding_size} features, windows of "
            f"{layout.window_seconds:g} s, {num_windows} whole ones in an excerpt"
        )
    ranks = training.rank.world_size
    yield (
        f"training   epochs: at most {config.fit.epochs}, on "
        + (f"{ranks} x {training.device.type}" if ranks > 1 else str(training.device))
        + f", {config.compute.precision}, seed {config.fit.seed}"
    )


def describe_position(training: Training) -> str:
    """Describe how far a training has come."""
    position = training.position
    return f"epoch {position.epoch + 1}, {position.batch} of {training.splits.num_batches} batches"


def show_batch(bar: Any, training: Training, loss: float, num_excerpts: int) -> None:
    """Advance the bar by a batch and show its loss."""
    # refresh=False leaves redrawing to `update`, which limits how often it happens.
    bar.set_description(f"epoch {training.position.epoch + 1}", refresh=False)
    best_loss = training.position.best_loss
    best = {} if best_loss is None else {"best": f"{best_loss:.3f}"}
    bar.set_postfix(loss=f"{loss:.3f}", **best, refresh=False)
    bar.update(num_excerpts)


class MetricsLog:
    """Write the metrics of each epoch to ``metrics.jsonl`` and to TensorBoard.

    Entries after `num_epochs`, written before a crash, are removed.
    """

    def __init__(self, run: Run, num_epochs: int) -> None:
        self._run = run
        run.trim_metrics(num_epochs)
        self._events = EventLog(run.folder, num_epochs)

    def add(self, metrics: dict[str, Any]) -> None:
        """Write the metrics of an epoch."""
        self._run.append_metrics(metrics)
        self._events.add(metrics["epoch"], _flatten(metrics))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._events.__exit__(*error)


class Pace:
    """Report a line an epoch, but not more often than every few seconds."""

    def __init__(self, training: Training, write: Callable[[str], None]) -> None:
        self._training, self._write = training, write
        self._first_epoch, self._began = training.position.epoch, time.monotonic()
        self._written = -_SECONDS_BETWEEN_LINES

    def report(self) -> None:
        """Report the last epoch, its losses and the time left."""
        now, metrics = time.monotonic(), self._training.metrics
        # The last epoch is reported however soon it follows.
        if now - self._written < _SECONDS_BETWEEN_LINES and self._training.finished is None:
            return
        self._written = now
        done, epochs = metrics["epoch"] + 1, self._training.config.fit.epochs
        # The pace is that of this process: epochs before a resume may have run elsewhere.
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


def _flatten(metrics: dict[str, Any]) -> dict[str, float]:
    # TensorBoard groups scalars by the part of their name before the slash.
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{term}": number for term, number in value.items()}
        elif name != "epoch":
            flat[name] = float(value)
    return flat
