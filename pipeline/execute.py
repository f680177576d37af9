"""Run tasks inline or on Dask; this is the only module that imports it."""

import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
    """Run tasks on a Dask cluster, yielding outcomes as they come.

    A task whose worker dies is tried again on another one, until Dask's ``allowed-failures`` is
    reached; leaving the iterator early cancels what is left.
    """
    from distributed import as_completed

    # The key makes no task depend on Dask's hash of its arguments, and none share a result.
    futures = [
        client.submit(function, task, key=f"flsep-{number}-{os.urandom(4).hex()}", pure=False)
        for number, task in enumerate(tasks)
    ]
    by_key = {future.key: task for future, task in zip(futures, tasks, strict=True)}
    try:
        for future in as_completed(futures):
            task = by_key[future.key]
            if future.status == "finished":
                yield Outcome(task, future.result(), None)
            else:
                yield Outcome(task, None, _error_of(future))
            future.release()
    finally:
        client.cancel(futures, force=True)


def _error_of(future: Any) -> BaseException:
    from distributed.scheduler import KilledWorker

    try:
        error = future.exception()
    except Exception as raised:  # a cancelled future raises instead
        error = raised
    if isinstance(error, KilledWorker):
        return RuntimeError("its worker died each time it was tried (out of memory?)")
    return error or RuntimeError("it was cancelled")


@contextmanager
def local_client(num_workers: int) -> Iterator["Client"]:
    """Start worker processes on this machine, reachable from it alone."""
    import dask
    from distributed import Client, LocalCluster

    settings = {
        "distributed.worker.daemon": False,
        "distributed.admin.log-format": "%(message)s",
        "distributed.comm.timeouts.connect": "60s",
    }
    with dask.config.set(settings):
        # Ctrl-C reaches the workers too: they inherit that it is ignored, and the client ends them.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            cluster = LocalCluster(
                n_workers=num_workers,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                worker_dashboard_address=None,
                silence_logs=logging.CRITICAL,
            )
        finally:
            signal.signal(signal.SIGINT, handler)
        with cluster, Client(cluster) as client:
            yield client


@contextmanager
def remote_client(address: str) -> Iterator["Client"]:
    """Connect to a scheduler that is running; raises ValueError if there is none."""
    from distributed import Client

    try:
        client = Client(address, timeout=10)
    except (OSError, TimeoutError, ValueError) as error:
        raise ValueError(
            f"--scheduler {address}: no Dask scheduler answers ({error}); start one with "
            "`dask scheduler`, and workers with `dask worker`"
        ) from error
    with client:
        yield client
