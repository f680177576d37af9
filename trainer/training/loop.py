"""The training loop, from top to bottom: epochs, batches, one batch, validation.

It stops cleanly at a signal and continues exactly where it stopped.
"""

import math
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import NamedTuple, NoReturn

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from flsep.trainer.data.batch import Batch
from flsep.trainer.errors import NonFiniteLossError
from flsep.trainer.parallel import any_rank, gather_objects, sum_over_ranks
from flsep.trainer.runs.checkpoint import save_checkpoint
from flsep.trainer.runs.folder import Run
from flsep.trainer.training.clock import WaitClock
from flsep.trainer.training.objective import explain_non_finite, find_bad_data
from flsep.trainer.training.progress import MetricsLog, Pace, describe_position, show_batch
from flsep.trainer.training.state import Position, Training
from flsep.trainer.training.stopping import Stopped, StopRequest


class Progress(NamedTuple):
    """The outcome of one batch, over all processes."""

    num_excerpts: int
    loss: float
    # Whether the weights were updated. Gradients are not saved, so that a checkpoint is possible
    # only then.
    is_step: bool


def fit(
    training: Training,
    run: Run,
    *,
    report: Callable[[str], None],
    seconds_between_saves: float = math.inf,
) -> None:
    """Train until all epochs are done or the validation loss stops improving.

    All processes of a training call it; the first one writes into the prepared run folder and
    reports. Within an epoch, ``last.safetensors`` is written, too, when it is older than
    `seconds_between_saves`.

    Raises
    ------
    Stopped
        After a signal to any of the processes; ``last.safetensors`` is written.
    NonFiniteLossError
        If a loss or gradient is not finite; the last checkpoint is kept.
    CacheError, CheckpointError, OSError
        If shards are damaged, or the run folder cannot be written.
    """
    stop, device = StopRequest(), training.device
    is_first = training.rank.number == 0
    epoch_size = len(training.splits.train_excerpts)
    saved = time.monotonic()

    def save_last() -> None:
        nonlocal saved
        # All processes take part: the checkpoint holds the random state of each.
        checkpoint = training.checkpoint(resumable=True)
        if is_first:
            save_checkpoint(run.last, checkpoint)
        saved = time.monotonic()

    def stop_here() -> Stopped:
        save_last()
        # The signal may have reached another process only.
        return Stopped(stop.number or signal.SIGTERM, describe_position(training))

    with (
        stop.catching(),
        MetricsLog(run, training.position.epoch) if is_first else nullcontext() as log,
        tqdm(
            total=epoch_size * training.config.fit.epochs,
            initial=epoch_size * training.position.epoch + training.position.num_excerpts,
            unit=" excerpts",
            disable=not (is_first and sys.stderr.isatty()),
        ) as bar,
    ):
        pace = Pace(training, report if bar.disable else lambda line: None)
        while training.finished is None:
            # Closing ends the threads that read, whatever leaves the loop.
            with closing(train_epoch(training)) as epoch:
                for progress in epoch:
                    show_batch(bar, training, progress.loss, progress.num_excerpts)
                    if not progress.is_step:
                        continue
                    # All processes must take the same decision, so they ask each other.
                    if any_rank(stop.requested(), device):
                        raise stop_here()
                    is_old = is_first and time.monotonic() - saved >= seconds_between_saves
                    if any_rank(is_old, device):
                        save_last()
            losses = validate(training, stop.requested)
            if losses is None:
                raise stop_here()
            is_best = finish_epoch(training, losses)
            if log is not None:
                if is_best:
                    save_checkpoint(run.best, training.checkpoint(resumable=False))
                log.add(training.metrics)
            # If a crash comes before this, the epoch is trained again, and its best weights and its
            # metrics are written again.
            save_last()
            pace.report()
    report(training.finished)


def train_epoch(training: Training) -> Generator[Progress, None, None]:
    """Train on the rest of the epoch; yield after each batch."""
    clock, position = WaitClock(training.device), training.position
    names: list[str] = []  # excerpts of this step so far
    with closing(training.splits.train_batches(position.epoch, position.batch)) as batches:
        while True:
            with clock.waiting():
                batch = next(batches, None)
            if batch is None:
                return
            step = find_step(training, position.batch)
            names = [*names, *batch.names] if position.batch > step[0] else list(batch.names)
            values = train_batch(training, batch, names)
            is_step = position.batch == step[-1]
            if is_step:
                position.gradient_norms += values.pop("gradient_norm")
                position.num_steps += 1
            # The position moves on before the yield: a checkpoint saved there begins with the next
            # batch.
            position.batch += 1
            position.num_excerpts += batch.num_in_all
            _add(position.sums, values, batch.num_in_all)
            seconds, waited_seconds = clock.lap()
            position.seconds += seconds
            position.waited_seconds += waited_seconds
            yield Progress(batch.num_in_all, values["total"], is_step)
            # After the yield, since saving a checkpoint is no time of training.
            clock.start()


def find_step(training: Training, batch: int) -> range:
    """Return the numbers of the batches whose gradients make one step with a batch."""
    size = training.config.optim.accumulate
    first = batch - batch % size
    return range(first, min(first + size, training.splits.num_batches))


def train_batch(
    training: Training, batch: Batch, names: list[str] | None = None
) -> dict[str, float]:
    """Train on the batch at the training's position; the last batch of a step updates the weights.

    `batch` is this process's part; `names` are the excerpts of the step so far, for the message of
    NonFiniteLossError, which comes before the weights are spoilt. Return every term of the loss,
    over all processes, and the ``gradient_norm`` of a step.
    """
    training.model.train()
    position, optimizer, model = training.position, training.optimizer, training.parallel_model
    step = find_step(training, position.batch)
    is_last = position.batch == step[-1]
    if position.batch == step[0]:
        optimizer.zero_grad()

    # Every excerpt of a step counts the same, although the last batch of an epoch may be smaller.
    batch_size, num_excerpts = training.config.data.batch_size, len(training.splits.train_excerpts)
    num_in_step = min((step[-1] + 1) * batch_size, num_excerpts) - step[0] * batch_size
    share_of_step = batch.num_in_all / num_in_step
    share_of_batch = len(batch) / batch.num_in_all

    # DistributedDataParallel adds up the gradients of the processes with the last batch only.
    waiting: AbstractContextManager[None] = nullcontext()
    if isinstance(model, DistributedDataParallel) and not is_last:
        waiting = model.no_sync()
    with waiting:
        terms = training.objective(model, batch)
        # It then divides by the number of processes. The separation loss is a mean over this
        # process's share of the batch; the regularizer compares the windows of all processes and
        # is the same in each, so it needs no factor.
        separation = share_of_batch * training.rank.world_size * terms["separation"]
        regularizer = terms["total"] - terms["separation"]
        (share_of_step * (separation + regularizer)).backward()

    # One tensor for all terms makes one exchange between processes and one wait.
    values = torch.stack([term.detach().float() for term in terms.values()])
    values = sum_over_ranks(values * share_of_batch)
    if is_last:
        terms["gradient_norm"] = gradient_norm = optimizer.gradient_norm()
        values = torch.cat([values, gradient_norm[None]])
    found = dict(zip(terms, values.tolist(), strict=True))  # waits for the device, once a batch
    if not all(map(math.isfinite, found.values())):
        _refuse_non_finite(training, found, batch, names or list(batch.names))
    if is_last:
        optimizer.step(gradient_norm)
    return found


def _refuse_non_finite(
    training: Training, values: dict[str, float], batch: Batch, names: list[str]
) -> NoReturn:
    position = training.position
    # All processes have seen the same sums and come here together.
    of_ranks = gather_objects((names, find_bad_data(batch)))
    all_names, bad_names = ([name for part in of_ranks for name in part[k]] for k in (0, 1))
    terms = {name: value for name, value in values.items() if name != "gradient_norm"}
    raise NonFiniteLossError(
        f"epoch {position.epoch}, batch {position.batch}: "
        + explain_non_finite(terms, all_names, bad_names)
    )


@torch.no_grad()
def validate(training: Training, stopping: Callable[[], bool]) -> dict[str, float] | None:
    """Return the mean of every term over the validation split; None when asked to stop.

    Each process validates on whole batches, so that the number of processes changes nothing.
    """
    model, splits = training.optimizer.best_model.eval(), training.splits
    sums: dict[str, float] = {}
    with closing(splits.valid_batches()) as batches:
        # Some processes may have one batch less, but all have to answer `any_rank`.
        for _ in range(splits.num_valid_rounds):
            batch = next(batches, None)
            if batch is not None:
                _add(sums, _validate_batch(training, model, batch), len(batch))
            if any_rank(stopping(), training.device):
                return None
    totals: dict[str, float] = {}
    for of_rank in gather_objects(sums):
        _add(totals, of_rank, 1)
    return {name: value / len(splits.valid_excerpts) for name, value in totals.items()}


def _validate_batch(training: Training, model: nn.Module, batch: Batch) -> dict[str, float]:
    terms = training.objective(model, batch)
    values = torch.stack([term.float() for term in terms.values()]).tolist()
    found = dict(zip(terms, values, strict=True))
    if not math.isfinite(found["total"]):
        raise NonFiniteLossError(
            f"epoch {training.position.epoch}, validation: "
            + explain_non_finite(found, list(batch.names), find_bad_data(batch))
        )
    return found


def finish_epoch(training: Training, losses: dict[str, float]) -> bool:
    """Record the metrics of an epoch and its validation `losses`; return whether it was the best.

    The schedule, the early stop and the choice of the best follow the separation loss without the
    regularizer, so that all approaches are judged alike.
    """
    position, optimizer = training.position, training.optimizer
    loss = losses["separation"]
    is_best = position.best_loss is None or loss < position.best_loss
    training.metrics = {
        "epoch": position.epoch,
        "train": {name: total / position.num_excerpts for name, total in position.sums.items()},
        "valid": losses,
        "best": is_best,
        "learning_rate": optimizer.learning_rate,
        "gradient_norm": position.gradient_norms / max(1, position.num_steps),
        "seconds": round(position.seconds, 3),
        "excerpts_per_second": round(position.num_excerpts / position.seconds, 3),
        "data_wait_share": round(position.waited_seconds / position.seconds, 4),
    }
    # The metrics above give the learning rate of the finished epoch; this changes the next.
    optimizer.schedule.step(loss)
    training.position = Position(
        epoch=position.epoch + 1,
        best_loss=loss if is_best else position.best_loss,
        best_epoch=position.epoch if is_best else position.best_epoch,
    )
    return is_best


def _add(sums: dict[str, float], values: dict[str, float], weight: int) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value * weight
