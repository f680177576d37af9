"""Run tasks inline or on the workers of a Dask client."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from distributed import Client

Task = TypeVar("Task")
Result = TypeVar("Result")


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
    client: "Client", function: Callable[[Task], Result], tasks: Sequence[Task]
) -> Iterator[Outcome]:
    """Run tasks on a Dask cluster in their order, yielding outcomes as they come.

    A task whose worker dies is tried again on another one, until Dask's ``allowed-failures`` is
    reached; leaving the iterator early cancels what is left.

    Raises
    ------
    ConnectionError
        If the scheduler is gone.
    """
    from distributed import as_completed
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
        for future in as_completed(futures):
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


def _explain(error: BaseException) -> BaseException:
    from distributed.scheduler import KilledWorker

    if isinstance(error, KilledWorker):
        return RuntimeError("its worker died each time it was tried (out of memory?)")
    return error
