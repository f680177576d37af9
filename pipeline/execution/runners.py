"""Run tasks in this process or on the workers of a Dask client."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from flsep.pipeline.errors import WorkerError

if TYPE_CHECKING:
    from distributed import Client, Future

Task = TypeVar("Task")
Result = TypeVar("Result")

_PATIENCE_SECONDS = 60.0


class Outcome(NamedTuple):
    """A task with its result, or with the exception that it raised."""

    task: Any
    result: Any
    error: BaseException | None


Runner = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Outcome]]
"""Calls a function with each task and yields the outcomes, in any order."""


def run_inline(function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Outcome]:
    """Run tasks one after the other in this process."""
    for task in tasks:
        try:
            result = function(task)
        except Exception as error:
            yield Outcome(task, None, error)
        else:
            yield Outcome(task, result, None)


def run_on(
    client: "Client",
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    *,
    idle: Callable[[], None] = lambda: None,
) -> Iterator[Outcome]:
    """Start tasks on a Dask cluster in their order, and yield outcomes as tasks finish.

    A task whose worker dies runs again on another worker, until Dask's ``allowed-failures`` is
    reached. Leaving the iterator early cancels the remaining tasks. `idle` is called once for each
    minute in which no task finishes. ConnectionError means that the scheduler is lost.
    """
    from distributed.comm.core import CommClosedError

    lost = ConnectionError(
        "the Dask scheduler is gone; run the same command again, finished files are kept"
    )
    # Random keys: no task depends on Dask's hash of its arguments, and no two share a result.
    futures = [
        client.submit(
            function,
            task,
            key=f"flsep-{number}-{os.urandom(4).hex()}",
            pure=False,
            priority=-number,
        )
        for number, task in enumerate(tasks)
    ]
    by_key = {future.key: task for future, task in zip(futures, tasks, strict=True)}
    try:
        for future in _as_completed(futures, idle):
            task = by_key[future.key]
            if future.status == "finished":
                yield Outcome(task, future.result(), None)
            elif future.status == "error":
                yield Outcome(task, None, _error_of(future))
            else:
                raise lost
            future.release()
    except CommClosedError as error:  # the scheduler died while a result was on its way
        raise lost from error
    finally:
        client.cancel(futures, force=True)


def _as_completed(futures: "list[Future]", idle: Callable[[], None]) -> "Iterator[Future]":
    from distributed import as_completed

    # Poll, since waiting for the next future would leave no chance to call `idle`.
    completed = as_completed(futures)
    last = time.monotonic()
    while not completed.is_empty():
        if completed.has_ready():
            yield next(completed)
        elif time.monotonic() < last + _PATIENCE_SECONDS:
            time.sleep(0.02)
            continue
        else:
            idle()
        last = time.monotonic()


def _error_of(future: "Future") -> BaseException:
    """Return what a task raised, with the worker's traceback."""
    from distributed.scheduler import KilledWorker

    error: BaseException = future.exception()
    if isinstance(error, KilledWorker):
        return WorkerError("its worker died each time it was tried (out of memory?)")
    return error.with_traceback(future.traceback())
