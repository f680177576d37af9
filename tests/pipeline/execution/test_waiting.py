"""What is said, and when a run ends, while no worker is connected."""

import operator
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flsep.pipeline.execution import runners as execute
from flsep.pipeline.execution.waiting import WorkerWatch


@pytest.fixture
def list_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let a program squeue list jobs that ended."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def list_ended(*jobs: str, status: int = 0) -> None:
        (tmp_path / "squeue").write_text(
            f"#!/bin/sh\nprintf '%s\\n' {' '.join(jobs)}\nexit {status}"
        )
        (tmp_path / "squeue").chmod(0o755)

    list_ended()
    return list_ended


def client(*jobs: str, workers: int = 0, logs: str | None = None) -> Any:
    return SimpleNamespace(
        scheduler_info=lambda n_workers: {"workers": dict.fromkeys(range(workers))},
        scheduler=SimpleNamespace(address="tcp://node1:8786"),
        cluster=SimpleNamespace(
            workers={job: SimpleNamespace(job_id=job, log_directory=logs) for job in jobs}
        ),
    )


def test_with_a_worker_nothing_is_said(
    list_ended: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    list_ended("7")
    watch = WorkerWatch(client("7", workers=1), "slurm")
    watch()
    watch()
    assert capsys.readouterr() == ("", "")


def test_jobs_in_a_queue_are_waited_for(
    list_ended: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    list_ended("6")  # of another run
    watch = WorkerWatch(client("7", "8", logs="/logs"), "slurm")
    line = (
        "waiting for workers: 2 jobs submitted, none is connected; see squeue, and the jobs' "
        "output in /logs\n"
    )
    for _ in range(3):
        watch()
        assert capsys.readouterr() == ("", line)
    list_ended("8")
    watch()
    assert "2 jobs submitted, 1 of them ended, none" in capsys.readouterr().err
    list_ended()  # it is forgotten after some minutes
    watch()
    assert "2 jobs submitted, 1 of them ended, none" in capsys.readouterr().err


def test_when_all_jobs_have_ended_so_does_the_run(
    list_ended: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    list_ended("7", "8")
    watch = WorkerWatch(client("7", "8"), "slurm")
    watch()  # they may be replaced in a moment
    assert "2 jobs submitted, 2 of them ended" in capsys.readouterr().err
    with pytest.raises(
        ConnectionError, match=r"all jobs have ended \(7, 8\); read .* in "
    ) as error:
        watch()
    assert str(Path.cwd()) in str(error.value)


def test_jobs_in_the_place_of_those_that_ended_are_waited_for(
    list_ended: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    list_ended("7")
    ours = client("7")
    watch = WorkerWatch(ours, "slurm")
    watch()
    ours.cluster.workers = client("8").cluster.workers
    watch()
    watch()
    assert capsys.readouterr().err.count("1 jobs submitted, none") == 2


def test_a_queue_that_cannot_be_asked_ends_nothing(
    list_ended: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    list_ended(status=1)
    watch = WorkerWatch(client("7"), "slurm")
    watch()
    watch()
    assert capsys.readouterr().err.count("waiting") == 2


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("pbs", "1 jobs submitted, none is connected; see qstat"),
        ("lsf", "see bjobs"),
        ("sge", "see qstat"),
        ("local", "none is connected to tcp://node1:8786"),
        (None, "none is connected to tcp://node1:8786"),
    ],
)
def test_other_schedulers(kind: str | None, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    watch = WorkerWatch(client("7"), kind)
    watch()
    watch()
    assert capsys.readouterr().err.count(said) == 2


def test_idle_is_called_while_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import Client, LocalCluster

    monkeypatch.setattr(execute, "_PATIENCE_SECONDS", 0.1)
    calls = []

    def start() -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            cluster.scale(1)

    def give_up() -> None:
        raise ConnectionError("enough")

    with (
        LocalCluster(
            n_workers=0, threads_per_worker=1, processes=False, dashboard_address=None
        ) as cluster,
        Client(cluster) as client,
    ):
        with pytest.raises(ConnectionError, match="enough"):
            list(execute.run_on(client, operator.neg, [1, 2], idle=give_up))
        outcomes = list(execute.run_on(client, operator.neg, [1, 2, 3], idle=start))
    assert calls[:3] == [0, 1, 2]
    assert {outcome.task: outcome.result for outcome in outcomes} == {1: -1, 2: -2, 3: -3}
