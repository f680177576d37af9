"""Run tasks inline or on the workers of a Dask client."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from distributed import Client, Future

Task = TypeVar("Task")
Result = TypeVar("Result")

_PATIENCE_SECONDS = 60.0


class Outcome(NamedTuple):
    """One task with its result, or with what went wrong."""

    task: Any
    result: Any
    error: BaseException | None


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
    """Run tasks on a Dask cluster in their order, yielding outcomes as they come.

    A task whose worker dies is tried again on another one, until Dask's ``allowed-failures`` is
    reached; leaving the iterator early cancels what is left. `idle` is called once for each minute
    in which no task ended.

    Raises
    ------
    ConnectionError
        If the scheduler is gone.
    """
    from distributed.comm.core import CommClosedError

    gone = ConnectionError(
        "the Dask scheduler is gone; run the same command again, finished shards are kept"
    )
    # The key makes no task depend on Dask's hash of its arguments, and none share a result.
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
                yield Outcome(task, None, _explain(future.exception()))
            else:
                raise gone
            future.release()
    except CommClosedError as error:  # it went while a result was on its way
        raise gone from error
    finally:
        client.cancel(futures, force=True)


def _as_completed(futures: "list[Future]", idle: Callable[[], None]) -> "Iterator[Future]":
    from distributed import as_completed

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


def _explain(error: BaseException) -> BaseException:
    from distributed.scheduler import KilledWorker

    if isinstance(error, KilledWorker):
        return RuntimeError("its worker died each time it was tried (out of memory?)")
    return error
