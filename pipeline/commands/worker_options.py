"""Options that decide where tasks run, and the workers that they lead to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from flsep.cache.memory import free_host_bytes
from flsep.pipeline.commands.parameter_types import Pair, Setting
from flsep.pipeline.commands.reporting import show_bytes
from flsep.pipeline.config import WORKER_BYTES
from flsep.pipeline.errors import SettingsError
from flsep.pipeline.execution.cluster import BATCH_SYSTEMS

if TYPE_CHECKING:
    from flsep.pipeline.execution.cluster import ClusterSettings

Command = TypeVar("Command", bound=Callable[..., Any])


def worker_options(command: Command) -> Command:
    """Add the options that decide where tasks run."""
    # In the order in which --help lists them.
    options = [
        click.option(
            "--workers",
            type=click.IntRange(min=0),
            show_default="number of cores",
            help="Worker processes; 0 does the work in this process, without Dask.",
        ),
        click.option(
            "--adapt",
            type=Pair(":"),
            metavar="MIN:MAX",
            help="Have as many workers as there is work for, within these bounds.",
        ),
        click.option(
            "--cluster",
            type=click.Choice(["local", *BATCH_SYSTEMS]),
            default="local",
            show_default=True,
            help="Start workers on this machine, or as jobs of a batch system, through "
            "dask-jobqueue and what its configuration files say.",
        ),
        click.option(
            "--cluster-option",
            "cluster_settings",
            type=Setting(),
            multiple=True,
            metavar="KEY=VALUE",
            help="An argument of dask-jobqueue's cluster, such as queue=long, cores=2, "
            "walltime=08:00:00, interface=ib0; or memory_limit=4GiB for local workers. May be "
            "repeated.",
        ),
        click.option(
            "--scheduler",
            metavar="ADDRESS",
            help="Use the workers of a Dask scheduler that is running, such as tls://node1:8786. "
            "They must see CORPUS, SHARDS and the teacher under the same paths.",
        ),
    ]
    # Decorators apply from the bottom up, so the last option comes first.
    for option in reversed(options):
        command = option(command)
    return command


def choose_workers(folder: Path, options: dict[str, Any]) -> "ClusterSettings | str | None":
    """Return where to run tasks: a cluster to start, a scheduler's address, or None for here.

    Parameters
    ----------
    folder : Path
        Output folder, which all workers see.
    options : dict
        Values of `worker_options`.

    Raises
    ------
    SettingsError
        If the options contradict each other, one of them is wrong, or this machine has not enough
        memory for so many workers.
    """
    from flsep.pipeline.execution.cluster import ClusterSettings, count_cores

    workers, adapt, kind = options["workers"], options["adapt"], options["cluster"]
    given = dict(options["cluster_settings"])
    # A running scheduler has its own workers, so no other option of this group can take effect.
    if address := options["scheduler"]:
        if workers is not None or adapt or kind != "local" or given:
            raise SettingsError(
                f"--scheduler {address}: its workers are there already; leave out --workers, "
                "--adapt, --cluster and --cluster-option"
            )
        return str(address)
    if workers is not None and adapt:
        raise SettingsError("--workers and --adapt: give one of them")
    if adapt and not adapt[0] <= adapt[1] > 0:
        raise SettingsError(f"--adapt {adapt[0]}:{adapt[1]}: expected MIN:MAX with MIN <= MAX")
    # The cores of this machine say nothing about how many jobs a batch system should run.
    if kind != "local" and not workers and not adapt:
        raise SettingsError(f"--cluster {kind}: give --workers N or --adapt MIN:MAX")
    if workers is None:
        workers = count_cores()
    min_workers, max_workers = adapt or (workers, workers)
    # Also for no workers, since this process then needs the memory itself.
    if kind == "local":
        require_memory(max_workers)
    # Without workers there is no Dask cluster, so its options cannot take effect.
    if not max_workers:
        if given:
            raise SettingsError("--cluster-option: has no effect with --workers 0")
        return None
    return ClusterSettings(
        kind=kind,
        min_workers=min_workers,
        max_workers=max_workers,
        options=given,
        worker_bytes=WORKER_BYTES,
        folder=folder,
    )


@contextmanager
def start_workers(workers: "ClusterSettings | str | None") -> Iterator[Any]:
    """Start or join the workers, and yield the `Runner` that runs tasks on them."""
    from flsep.pipeline.execution.cluster import remote_client, start_cluster
    from flsep.pipeline.execution.runners import run_inline, run_on
    from flsep.pipeline.execution.waiting import WorkerWatch

    if workers is None:
        yield run_inline
        return
    connect = remote_client(workers) if isinstance(workers, str) else start_cluster(workers)
    # Jobs can only be asked for where this process has submitted them.
    kind = None if isinstance(workers, str) else workers.kind
    # Leaving the context ends a cluster that was started here, but not a running scheduler.
    with connect as client:
        click.echo(f"workers  {describe_client(client)}")
        yield partial(run_on, client, idle=WorkerWatch(client, kind))


def describe_workers(workers: "ClusterSettings | str | None") -> None:
    """Print what `start_workers` would start: for a batch system, the script of its jobs."""
    from flsep.pipeline.execution.cluster import ClusterSettings, job_script

    if isinstance(workers, ClusterSettings):
        fewest, most = workers.min_workers, workers.max_workers
        number = f"{most}" if fewest == most else f"{fewest} to {most}"
        click.echo(f"workers  {number}, {workers.kind}")
        # The script shows mistakes in options of the batch system without a wait in its queue.
        if workers.kind != "local":
            click.echo(f"\n{job_script(workers)}")


def describe_client(client: Any) -> str:
    """Return the number of workers, the scheduler's address and its dashboard."""
    # -1 asks for all workers, however many there are.
    information = client.scheduler_info(n_workers=-1)
    place = f"{len(information['workers'])} at {client.scheduler.address}"
    has_dashboard = "dashboard" in information["services"]
    return f"{place}, dashboard {client.dashboard_link}" if has_dashboard else place


def require_memory(workers: int) -> None:
    """Refuse more workers than fit into the free memory of this machine or job."""
    # Checked before the work starts: a worker out of memory would be killed hours later.
    needed = max(workers, 1) * WORKER_BYTES
    available = free_host_bytes()
    if needed > available:
        raise SettingsError(
            f"{max(workers, 1)} worker(s) need about {show_bytes(needed)} of memory, "
            f"{show_bytes(available)} are free; use fewer --workers"
        )
