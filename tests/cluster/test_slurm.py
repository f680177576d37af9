"""Precomputing as jobs of a real SLURM."""

import os
import shlex
from pathlib import Path

import pytest
from cluster_runs import Runner, contents, wait_until
from slurm_node import call, submit

pytestmark = pytest.mark.heavy


@pytest.fixture
def jobs(slurm: Path, runner: Runner) -> Runner:
    runner.environment["SLURM_CONF"] = os.environ["SLURM_CONF"]
    return runner


def submit_run(jobs: Runner, script: str, *options: str) -> str:
    return submit(script, jobs.folder, *options, environment=jobs.environment)


ON_LOOPBACK = ("--cluster", "slurm", "--cluster-option", "interface=lo")


def test_jobs_do_the_work(jobs: Runner, undisturbed: dict[str, bytes]) -> None:
    output = jobs.run(*ON_LOOPBACK, "--workers", "2")
    assert contents(jobs.shards) == undisturbed
    assert set(jobs.attempts().values()) == {1}
    assert len({line.split()[2] for line in jobs.lines()}) == 2, output
    wait_until(lambda: not call("squeue", "-h"))


def test_a_cancelled_job_costs_its_task_only(jobs: Runner, undisturbed: dict[str, bytes]) -> None:
    process = jobs.start(*ON_LOOPBACK, "--workers", "2", FLSEP_STUCK="t0")
    wait_until(lambda: jobs.attempts()["t0"] == 1, process)
    (line,) = [line for line in jobs.lines() if line.startswith("t0 ")]
    call("scancel", line.split()[2])
    wait_until(lambda: jobs.attempts()["t0"] == 2, process)
    jobs.let_go()
    jobs.finish(process)
    assert contents(jobs.shards) == undisturbed
    assert jobs.attempts()["t0"] == 2
    assert {count for name, count in jobs.attempts().items() if name != "t0"} == {1}
    wait_until(lambda: not call("squeue", "-h"))


def test_the_client_killed_and_run_again(jobs: Runner, undisturbed: dict[str, bytes]) -> None:
    """The scheduler lives in the client: both are gone, and the jobs end by themselves."""
    process = jobs.start(*ON_LOOPBACK, "--workers", "2", FLSEP_SLOW="0.3")
    wait_until(lambda: list(jobs.shards.glob("*.h5")), process)
    process.kill()
    process.communicate()
    wait_until(lambda: not call("squeue", "-h"))
    kept = {path.name: path.stat().st_mtime_ns for path in jobs.shards.glob("*.h5")}
    assert 0 < len(kept) < 6
    assert not (jobs.shards / "index.json").exists()
    jobs.run(*ON_LOOPBACK, "--adapt", "1:2")
    assert contents(jobs.shards) == undisturbed
    assert {name: (jobs.shards / name).stat().st_mtime_ns for name in kept} == kept
    wait_until(lambda: not call("squeue", "-h"))


def test_an_array_makes_the_parts(jobs: Runner, undisturbed: dict[str, bytes]) -> None:
    part = jobs.command("--workers", "1", "--part")
    array = submit_run(jobs, f"{shlex.join(part)} $SLURM_ARRAY_TASK_ID/3", "--array=1-3")
    finalise = shlex.join(jobs.command("--finalise"))
    last = submit_run(jobs, finalise, f"--dependency=afterany:{array}")
    wait_until(lambda: not call("squeue", "-h", "-j", f"{array},{last}", check=False), seconds=180)
    logs = {path.name: path.read_text() for path in jobs.folder.glob("job-*.log")}
    assert len(logs) == 4, logs
    assert contents(jobs.shards) == undisturbed, logs
    assert set(jobs.attempts().values()) == {1}


def test_a_partition_that_does_not_exist_is_one_line(jobs: Runner) -> None:
    output = jobs.run(*ON_LOOPBACK, "--workers", "1", "--cluster-option", "queue=no", status=1)
    assert "invalid partition" in output


def test_workers_and_scheduler_talk_through_tls(
    jobs: Runner, undisturbed: dict[str, bytes]
) -> None:
    pytest.importorskip("cryptography", reason="certificates need the package cryptography")
    process = jobs.start("--cluster", "slurm", "--workers", "1", FLSEP_STUCK="t0")
    wait_until(lambda: jobs.attempts()["t0"] == 1, process)
    keys = list(jobs.shards.glob(".dask-jobqueue.worker.key*"))
    assert [path.stat().st_mode & 0o777 for path in keys] == [0o600]
    jobs.let_go()
    assert "at tls://" in jobs.finish(process)
    assert not list(jobs.shards.glob(".dask*"))
    assert contents(jobs.shards) == undisturbed


def test_one_job_grows_its_own_workers(jobs: Runner, undisturbed: dict[str, bytes]) -> None:
    job = submit_run(jobs, shlex.join(jobs.command(*ON_LOOPBACK, "--adapt", "1:3")), "--mem=2G")
    wait_until(lambda: not call("squeue", "-h", "-j", job, check=False))
    log = next(jobs.folder.glob("job-*.log")).read_text()
    assert contents(jobs.shards) == undisturbed, log
    assert set(jobs.attempts().values()) == {1}
    assert job not in {line.split()[2] for line in jobs.lines()}
    wait_until(lambda: not call("squeue", "-h"))


def test_jobs_that_end_at_once_end_the_run(jobs: Runner) -> None:
    hurried = (
        "from flsep.pipeline import cli\n"
        "from flsep.pipeline.execution import runners\n"
        "runners._PATIENCE_SECONDS = 2\n"
        "cli.main()"
    )
    prologue = ("--cluster-option", 'job_script_prologue=["exit 3"]')
    logs = ("--cluster-option", f"log_directory={jobs.folder / 'logs'}")
    command = jobs.command(*ON_LOOPBACK, "--workers", "2", *prologue, *logs)
    process = jobs.start_program([command[0], "-c", hurried, *command[3:]])
    output = jobs.finish(process, 1)
    assert "waiting for workers: 2 jobs submitted" in output
    assert "Error: no worker is connected, and all jobs have ended (" in output
    assert f"in {jobs.folder / 'logs'}, then run" in output
    assert jobs.attempts() == {}
    wait_until(lambda: not call("squeue", "-h"))
