"""Which workers are asked for; nothing is started but on this machine."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
from click.testing import CliRunner, Result

from flsep.pipeline.cli import cli
from flsep.pipeline.commands import worker_options
from flsep.pipeline.commands.worker_options import choose_workers
from flsep.pipeline.execution import cluster
from flsep.pipeline.execution.cluster import ClusterSettings, job_script, start_cluster

NEEDED = 3 << 30


def settings(kind: str = "slurm", **options: object) -> ClusterSettings:
    return ClusterSettings(
        kind=kind,
        min_workers=1,
        max_workers=2,
        options=options,
        worker_bytes=NEEDED,
        folder=Path("/shards"),
    )


def test_a_script_with_defaults() -> None:
    script = job_script(settings())
    for line in (
        "#SBATCH --cpus-per-task=1",
        "#SBATCH --mem=3G",
        "#SBATCH --no-requeue",
        "tls://<host>:<port>",
        "--memory-limit 3.00GiB",
        "--nthreads 1 --dashboard-address 127.0.0.1:0",
        "--tls-key /shards/<key>",
    ):
        assert line in script


def test_options_and_the_configuration_of_dask_count(monkeypatch: pytest.MonkeyPatch) -> None:
    import dask
    import dask_jobqueue  # noqa: F401 (adds its defaults)

    with dask.config.set(
        {
            "jobqueue.slurm.queue": "slow",
            "jobqueue.slurm.walltime": "07:00:00",
            "jobqueue.slurm.job-extra-directives": ["--nice=5"],
            "jobqueue.slurm.worker-extra-args": ["--lifetime", "6h"],
        }
    ):
        script = job_script(settings(queue="fast", cores=2, memory="8GiB", interface="lo"))
    for line in (
        "#SBATCH -p fast",
        "#SBATCH -t 07:00:00",
        "#SBATCH --nice=5",
        "#SBATCH --no-requeue",
        "#SBATCH --cpus-per-task=2",
        "#SBATCH --mem=8G",
        "tcp://<host>:<port>",
        "--lifetime 6h --nthreads 1",
        "--interface lo",
    ):
        assert line in script
    assert "tls" not in script


@pytest.mark.parametrize(
    ("kind", "line"), [("pbs", "#PBS -q fast"), ("lsf", "#BSUB -q fast"), ("sge", "#$ -q fast")]
)
def test_other_batch_systems(kind: str, line: str) -> None:
    assert line in job_script(settings(kind, queue="fast"))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("slurm", {"quue": "x"}, "--cluster-option quue: unknown .* did you mean queue"),
        ("slurm", {"n_workers": 2}, "unknown"),
        ("local", {"queue": "x"}, "unknown to --cluster local"),
        ("slurm", {"memory": "much"}, "memory=much: not a size; write, for example, 4GiB"),
        ("slurm", {"memory": "2GiB"}, "memory gives a worker 2048 MiB, it needs about 3072 MiB"),
    ],
)
def test_wrong_options_are_refused(kind: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job_script(settings(kind, **options))


def test_a_worker_with_too_little_memory_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="memory_limit gives a worker 1024 MiB"),
        start_cluster(settings("local", memory_limit="1GiB")),
    ):
        pass


def test_without_the_batch_system_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with (
        pytest.raises(ValueError, match="there is no program sbatch here"),
        start_cluster(settings(interface="lo")),
    ):
        pass


def test_local_workers_listen_on_the_loopback_alone() -> None:
    local = ClusterSettings(
        kind="local", min_workers=1, max_workers=2, worker_bytes=0, folder=Path("/")
    )
    with start_cluster(local) as client:
        client.wait_for_workers(1)
        this = psutil.Process()
        listening = {
            connection.laddr.ip
            for process in (this, *this.children(recursive=True))
            for connection in process.net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
    assert listening == {"127.0.0.1"}


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    monkeypatch.setattr(worker_options, "require_memory", lambda number: None)
    monkeypatch.setattr(cluster, "count_cores", lambda: 3)
    defaults = {
        "workers": None,
        "adapt": None,
        "cluster": "local",
        "cluster_settings": (),
        "scheduler": None,
    }

    def choose(**options: object) -> object:
        return choose_workers(Path("/shards"), {**defaults, **options})

    return choose


def test_choices(choose: Callable[..., object]) -> None:
    assert choose(workers=0) is None
    assert choose(scheduler="tcp://x:1") == "tcp://x:1"
    for options, bounds in (
        ({}, (3, 3)),
        ({"workers": 2}, (2, 2)),
        ({"adapt": (0, 9)}, (0, 9)),
        ({"workers": 4, "cluster": "pbs", "cluster_settings": (("cores", 2),)}, (4, 4)),
    ):
        chosen = choose(**options)
        assert isinstance(chosen, ClusterSettings)
        assert (chosen.min_workers, chosen.max_workers) == bounds
        assert chosen.kind == options.get("cluster", "local")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduler": "tcp://x:1", "workers": 1}, "--scheduler tcp://x:1: its workers are there"),
        ({"workers": 1, "adapt": (1, 2)}, "--workers and --adapt"),
        ({"adapt": (3, 2)}, "--adapt 3:2"),
        ({"adapt": (0, 0)}, "--adapt 0:0"),
        ({"cluster": "slurm"}, "give --workers N or --adapt MIN:MAX"),
        ({"cluster": "slurm", "workers": 0}, "give --workers N or --adapt MIN:MAX"),
        ({"workers": 0, "cluster_settings": (("memory_limit", 1),)}, "has no effect"),
    ],
)
def test_contradictions_are_refused(
    choose: Callable[..., object], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        choose(**options)


@pytest.fixture
def dry_run(tmp_path: Path) -> Callable[..., Result]:
    for number in range(3):
        for name in ("a", "b"):
            path = tmp_path / "corpus" / str(number) / f"{name}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, np.zeros((20000, 2)), 16000)

    def dry_run(*options: str) -> Result:
        arguments = ["run", str(tmp_path / "corpus"), str(tmp_path / "shards"), "--sources", "a,b"]
        return CliRunner().invoke(cli, [*arguments, "--dry-run", *options])

    return dry_run


def test_a_dry_run_starts_nothing(dry_run: Callable[..., Result], tmp_path: Path) -> None:
    result = dry_run("--cluster", "slurm", "--adapt", "1:8", "--cluster-option", "queue=7")
    assert result.exit_code == 0, result.output
    assert "tracks   3" in result.output
    assert "workers  1 to 8, slurm" in result.output
    assert "#SBATCH -p 7" in result.output
    assert not (tmp_path / "shards").exists()
    result = dry_run("--workers", "1", "--part", "2/4")
    assert "part     2 of 4: 1 shards" in result.output
    assert "workers  1, local" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--adapt", "3"), "write two numbers, such as 1:8"),
        (("--part", "1:2"), "write two numbers, such as 1/8"),
        (("--cluster-option", "queue"), "write KEY=VALUE"),
        (("--cluster", "cray"), "Invalid value"),
    ],
)
def test_misspelt_options_are_usage_errors(
    dry_run: Callable[..., Result], options: tuple[str, ...], message: str
) -> None:
    result = dry_run(*options)
    assert result.exit_code == 2
    assert message in result.output


def test_cores_are_counted_as_dask_does() -> None:
    from dask.system import cpu_count

    assert cluster.count_cores() == cpu_count()
