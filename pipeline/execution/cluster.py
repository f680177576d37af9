"""Start Dask workers on this machine or through a batch system, or join a running scheduler."""

import difflib
import importlib
import inspect
import logging
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flsep.pipeline.errors import SettingsError, WorkerError

if TYPE_CHECKING:
    from distributed import Client

BATCH_SYSTEMS = {"slurm": "SLURM", "pbs": "PBS", "lsf": "LSF", "sge": "SGE"}
_LOOPBACK = {"lo", "lo0", "127.0.0.1"}

# Where our tasks need other values than Dask's defaults. What a user has configured wins.
_DASK_SETTINGS: dict[str, Any] = {
    # A worker has one task and none in its queue: if it dies, only that task counts as a failure.
    "distributed.scheduler.worker-saturation": 1.0,
    # Tasks take minutes. With Dask's default of 0.5 s, `adapt` would ask for few workers at first.
    "distributed.scheduler.unknown-task-duration": "60s",
    "distributed.comm.timeouts.connect": "60s",
    "distributed.admin.log-format": "%(message)s",
    "distributed.worker.daemon": False,
}
_BATCH_SETTINGS: dict[str, Any] = {
    "distributed.scheduler.allowed-failures": 10,  # each job that is cancelled counts as one
    "distributed.deploy.lost-worker-timeout": "2s",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterSettings:
    """Which cluster to start, and how many workers it may have.

    `kind` is ``local`` or one of `BATCH_SYSTEMS`. `options` are arguments of Dask's
    ``LocalCluster``, or of the class in dask-jobqueue. A worker needs `worker_bytes` of memory. The
    certificates of this run are written to `folder`, which all workers see.
    """

    kind: str
    min_workers: int
    max_workers: int
    options: Mapping[str, Any] = field(default_factory=dict)
    worker_bytes: int
    folder: Path

    def __post_init__(self) -> None:
        known = _known_options(self.kind)
        for name in self.options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"expected one of {sorted(known)}"
                raise SettingsError(
                    f"--cluster-option {name}: unknown to --cluster {self.kind}; {hint}"
                )
        for name in ("cores", "processes"):
            count = self.options.get(name, 1)
            if type(count) is not int or count < 1:
                raise SettingsError(
                    f"--cluster-option {name}={count}: expected a whole number of at least 1"
                )


def count_cores() -> int:
    """Count the cores that this process may use; CPU affinity and cgroup limits are respected."""
    from dask.system import CPU_COUNT

    return int(CPU_COUNT)


@contextmanager
def start_cluster(settings: ClusterSettings) -> Iterator["Client"]:
    """Start a cluster and connect to it; leaving the context ends it.

    A local cluster can be reached from this machine only. The scheduler and the workers of a batch
    system use TLS with a certificate made for this run, unless their interface is the loopback or
    Dask's configuration has certificates. Dashboards always listen on the loopback. WorkerError
    means that the batch system cannot be used from here.
    """
    from distributed import Client

    with _configured(settings.kind):
        # A terminal sends Ctrl-C to the workers too. They inherit that it is ignored, and end when
        # the client does.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            cluster = _start_local(settings) if settings.kind == "local" else _start_jobs(settings)
        finally:
            signal.signal(signal.SIGINT, handler)
        with cluster, Client(cluster) as client:
            if settings.kind != "local" or settings.min_workers < settings.max_workers:
                # `scale` would not replace a job that is lost, `adapt` does.
                cluster.adapt(minimum=settings.min_workers, maximum=settings.max_workers)
            yield client


@contextmanager
def remote_client(address: str) -> Iterator["Client"]:
    """Connect to a running scheduler; raises WorkerError if there is none."""
    from distributed import Client

    # `run_on` reports a lost scheduler in one line; Dask's own messages would be noise.
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)
    try:
        client = Client(address, timeout=10)
    except (OSError, TimeoutError, ValueError) as error:
        raise WorkerError(
            f"--scheduler {address}: no Dask scheduler answers ({error}); start one with "
            "`dask scheduler`, and workers with `dask worker`"
        ) from error
    with client:
        yield client


def job_script(settings: ClusterSettings) -> str:
    """Return the script that each job of a batch system would run, without starting any."""
    from distributed import Security

    with _configured(settings.kind):
        options = _job_options(settings)
        cluster_class = _cluster_class(settings.kind)
        parameters = inspect.signature(_base_cluster_class().__init__).parameters
        # The cluster keeps these options to itself; a job does not take them.
        shared = [name for name in parameters if name not in ("interface", "config_name")]
        options = {name: value for name, value in options.items() if name not in shared}
        place = "<host>:<port>"
        if _is_loopback(settings.kind, options):
            job = cluster_class.job_cls(f"tcp://{place}", name="<name>", **options)
        else:
            # Certificates are made when a run starts, so the script shows placeholders for their
            # files.
            made = {
                f"tls_{key}": f"{settings.folder}/<{key.removeprefix('worker_')}>"
                for key in ("ca_file", "worker_cert", "worker_key")
            }
            job = cluster_class.job_cls(
                f"tls://{place}",
                name="<name>",
                protocol="tls://",
                security=Security(require_encryption=True, **made),
                **options,
            )
    script: str = job.job_script()
    return script


def _start_local(settings: ClusterSettings) -> Any:
    from distributed import LocalCluster
    from distributed.system import MEMORY_LIMIT

    options = {
        "memory_limit": MEMORY_LIMIT // settings.max_workers,
        "host": "127.0.0.1",
        "dashboard_address": "127.0.0.1:0",
        "silence_logs": logging.CRITICAL,
        **settings.options,
    }
    # A limit of 0 is Dask's way to say that there is none.
    limit = _parse_bytes("memory_limit", options["memory_limit"])
    if limit:
        _require_memory("memory_limit", limit, settings)
    return LocalCluster(
        n_workers=settings.min_workers,
        threads_per_worker=1,
        worker_dashboard_address="127.0.0.1:0",
        **options,
    )


def _start_jobs(settings: ClusterSettings) -> Any:
    import dask
    from distributed import Security, Status

    options = _job_options(settings)
    cluster_class = _cluster_class(settings.kind)
    command = cluster_class.job_cls.submit_command.split()[0]
    if shutil.which(command) is None:
        raise WorkerError(
            f"--cluster {settings.kind}: there is no program {command} here; run this on a machine "
            "that submits jobs"
        )
    if not _is_loopback(settings.kind, options):
        options.setdefault("protocol", "tls://")
        if options["protocol"].startswith("tls"):
            certified = dask.config.get("distributed.comm.tls.scheduler.cert", None)
            options["security"] = Security() if certified else _temporary_security()
            settings.folder.mkdir(parents=True, exist_ok=True)
            options.setdefault("shared_temp_directory", str(settings.folder))
    scheduler = options.pop("scheduler_options", None) or _configured_option(
        settings.kind, "scheduler_options"
    )
    cluster = cluster_class(
        scheduler_options={"dashboard_address": "127.0.0.1:0", **(scheduler or {})},
        silence_logs=logging.CRITICAL,
        **options,
    )

    async def submit() -> None:  # `scale` would hide errors
        for _ in range(max(settings.min_workers, 1)):
            cluster.worker_spec.update(cluster.new_worker_spec())
        try:
            await cluster
        except RuntimeError:
            for job in cluster.workers.values():
                if job.job_id is None:
                    job.status = Status.closed  # never submitted: nothing to close
            raise

    try:
        cluster.sync(submit)
    except RuntimeError as error:
        cluster.worker_spec.clear()  # else `close` would submit the jobs again
        cluster.close()
        reason = next((line for line in str(error).splitlines() if "error:" in line), str(error))
        raise WorkerError(f"--cluster {settings.kind}: a job was refused: {reason}") from error
    return cluster


def _temporary_security() -> Any:
    from distributed import Security

    try:
        return Security.temporary()
    except ImportError as error:
        raise ModuleNotFoundError("cryptography is missing", name="cryptography") from error


def _job_options(settings: ClusterSettings) -> dict[str, Any]:
    """Complete the options that neither the command line nor Dask's configuration sets."""
    kind, options = settings.kind, dict(settings.options)

    # The command line goes first, then Dask's configuration, then our default.
    def value(name: str, default: Any) -> Any:
        if options.get(name) is None:
            options[name] = _configured_option(kind, name)
        if options[name] is None:
            options[name] = default
        return options[name]

    value("cores", 1)
    processes = value("processes", 1)
    memory = _parse_bytes("memory", value("memory", settings.worker_bytes * processes))
    _require_memory("memory", memory // processes, settings)
    # A task needs a process of its own; the worker's web pages are not for others to see.
    options["worker_extra_args"] = [
        *(value("worker_extra_args", [])),
        *("--nthreads", "1", "--dashboard-address", "127.0.0.1:0"),
    ]
    if kind == "slurm":
        # Dask ignores a worker that SLURM requeues, since it comes back under its old name.
        options["job_extra_directives"] = [*value("job_extra_directives", []), "--no-requeue"]
    return options


def _require_memory(option: str, limit: int, settings: ClusterSettings) -> None:
    if limit < settings.worker_bytes:
        raise SettingsError(
            f"{option} gives a worker {limit >> 20} MiB, it needs about "
            f"{settings.worker_bytes >> 20} MiB; give more, or fewer workers"
        )


def _is_loopback(kind: str, options: Mapping[str, Any]) -> bool:
    interface = options.get("interface") or _configured_option(kind, "interface")
    return interface in _LOOPBACK


def _configured_option(kind: str, name: str) -> Any:
    import dask

    value = dask.config.get(f"jobqueue.{kind}.{name}", None)
    return None if value == [] or value == {} else value


def _parse_bytes(option: str, value: Any) -> int:
    from dask.utils import parse_bytes

    try:
        return int(parse_bytes(value or 0))
    except (ValueError, TypeError) as error:
        raise SettingsError(
            f"--cluster-option {option}={value}: not a size; write, for example, 4GiB"
        ) from error


def _known_options(kind: str) -> set[str]:
    if kind == "local":
        return {"memory_limit", "local_directory", "death_timeout"}
    cluster_class = _cluster_class(kind)
    # Dask splits the options between a class for the batch system, one for all jobs and one for the
    # cluster.
    classes = (*cluster_class.job_cls.__mro__[:2], _base_cluster_class())
    names = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    ours = {"self", "scheduler", "name", "job_cls", "n_workers", "asynchronous", "loop", "security"}
    return {
        name for name in names - ours if not name.endswith("kwargs") and not name.endswith("_cls")
    }


def _cluster_class(kind: str) -> Any:
    return getattr(importlib.import_module("dask_jobqueue"), f"{BATCH_SYSTEMS[kind]}Cluster")


def _base_cluster_class() -> Any:
    return importlib.import_module("dask_jobqueue").JobQueueCluster


@contextmanager
def _configured(kind: str) -> Iterator[None]:
    """Set what our tasks need in Dask's configuration, where the user has set nothing."""
    import dask

    if kind != "local":
        importlib.import_module("dask_jobqueue")  # adds its defaults
    # These are the values from files and the environment, without Dask's own defaults.
    own = dask.config.collect()
    settings = _DASK_SETTINGS if kind == "local" else {**_DASK_SETTINGS, **_BATCH_SETTINGS}
    missing = {key: value for key, value in settings.items() if not dask.config.get(key, None, own)}
    with dask.config.set(missing):
        yield
