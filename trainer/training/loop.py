"""The training loop: train, validate, schedule, save; stop cleanly and go on exactly."""

import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing, nullcontext

from tqdm import tqdm

from flsep.trainer.runs.checkpoint import save_checkpoint
from flsep.trainer.runs.folder import Run
from flsep.trainer.training.progress import _Pace, _Record, _show, describe_place
from flsep.trainer.training.state import Training
from flsep.trainer.training.stopping import Stopped, StopRequest


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
