"""Failures injected into runs on this machine: attempts are counted, bytes compared."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from cluster_runs import Runner, contents, kill, wait_until

pytestmark = pytest.mark.heavy
TRACKS = [f"t{number}" for number in range(6)]
ONCE = Counter(TRACKS)


def worker_of(runner: Runner, track: str) -> int:
    """The process that began a track last."""
    return int([line for line in runner.lines() if line.startswith(f"{track} ")][-1].split()[1])


def one_line(output: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith("Error: ")]
    return line


def test_a_worker_killed_in_the_middle_of_a_track(
    runner: Runner, undisturbed: dict[str, bytes]
) -> None:
    process = runner.start("--workers", "1", FLSEP_STUCK="t0")
    for attempt in (1, 2):
        wait_until(lambda: runner.attempts()["t0"] == attempt, process)  # noqa: B023
        wait_until(lambda: len(list(runner.shards.glob(".*.h5.*.part"))) == attempt, process)  # noqa: B023
        kill(worker_of(runner, "t0"))
    wait_until(lambda: runner.attempts()["t0"] == 3, process)
    runner.let_go()
    runner.finish(process)
    assert runner.attempts() == ONCE + Counter(t0=2)
    assert contents(runner.shards) == undisturbed


def test_a_worker_out_of_memory_each_time(runner: Runner, undisturbed: dict[str, bytes]) -> None:
    """Its nanny ends it four times; the track is named, the others are stored."""
    memory = ("--cluster-option", "memory_limit=2400MiB")
    output = runner.run("--workers", "1", *memory, status=1, FLSEP_HUNGRY="t3")
    assert "t3: its worker died each time it was tried (out of memory?)" in output
    assert "failed   1 tracks" in output
    assert runner.attempts() == ONCE + Counter(t3=3)
    shards = {name: data for name, data in undisturbed.items() if name.endswith(".h5")}
    assert contents(runner.shards).items() >= {
        (name, data) for name, data in shards.items() if (runner.shards / name).exists()
    }
    assert len(list(runner.shards.glob("*.h5"))) == 5
    runner.run("--workers", "0")
    assert contents(runner.shards) == undisturbed


def test_the_client_and_its_scheduler_killed(runner: Runner, undisturbed: dict[str, bytes]) -> None:
    process = runner.start("--workers", "2", FLSEP_STUCK="t3")
    wait_until(lambda: len(list(runner.shards.glob("*.h5"))) == 5, process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    runner.let_go()
    _, alive = psutil.wait_procs(children, 60)
    assert alive == []
    assert not (runner.shards / "index.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in runner.shards.glob("*.h5")}
    output = runner.run("--workers", "1")
    assert f"({len(kept)} were there already)" in output
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert contents(runner.shards) == undisturbed
    assert not list(runner.shards.glob(".*.part"))


def start_program(runner: Runner, name: str, *options: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", f"distributed.cli.dask_{name}", *options],
        env=runner.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def start_scheduler(runner: Runner) -> "tuple[subprocess.Popen[bytes], str]":
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    options = ("--host", "127.0.0.1", "--port", str(port), "--dashboard-address", "127.0.0.1:0")
    return start_program(runner, "scheduler", *options), f"tcp://127.0.0.1:{port}"


def test_a_scheduler_elsewhere_killed(runner: Runner, undisturbed: dict[str, bytes]) -> None:
    scheduler, address = start_scheduler(runner)
    worker_options = ("--nthreads", "1", "--dashboard-address", "127.0.0.1:0")
    runner.environment["FLSEP_STUCK"] = "t3"
    worker = start_program(runner, "worker", address, "--host", "127.0.0.1", *worker_options)
    try:
        process = runner.start("--scheduler", address)
        wait_until(lambda: runner.attempts()["t3"] == 1, process)
        finished = len(list(runner.shards.glob("*.h5")))
        assert finished == 3  # t3 comes after t0, t1 and t2
        scheduler.kill()
        assert "the Dask scheduler is gone" in one_line(runner.finish(process, 1))
        assert not (runner.shards / "index.json").exists()
        runner.let_go()
    finally:
        for program in (scheduler, worker):
            with suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.wait()
    runner.run("--workers", "0")
    assert contents(runner.shards) == undisturbed


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_gets_full(runner: Runner, undisturbed: dict[str, bytes]) -> None:
    """The disk has room for three of the six shards."""
    size = max(len(data) for data in undisturbed.values())
    runner.shards.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={4 * size + (1 << 20)}", "none", runner.shards],
        check=False,
    )
    if done.returncode:
        pytest.skip("no disk may be mounted here")
    try:
        line = one_line(runner.run("--workers", "2", status=1))
        assert "the disk is full" in line
        assert str(runner.shards) in line
        stored = {path.name: path.read_bytes() for path in runner.shards.glob("*.h5")}
        assert 2 <= len(stored) <= 4
        assert stored.items() <= undisturbed.items()
        assert not (runner.shards / "index.json").exists()
        subprocess.run(["mount", "-o", "remount,size=1G", runner.shards], check=True)
        output = runner.run("--workers", "0")
        assert f"({len(stored)} were there already)" in output
        assert contents(runner.shards) == undisturbed
    finally:
        subprocess.run(["umount", runner.shards], check=True)


def test_an_output_that_cannot_be_written(runner: Runner) -> None:
    runner.shards.mkdir()
    if os.geteuid() == 0:  # whom no mode of a folder stops
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", str(runner.shards)]
        if subprocess.run(mount, check=False).returncode:
            pytest.skip("no disk may be mounted here")
    else:
        runner.shards.chmod(0o500)
    try:
        line = one_line(runner.run("--workers", "0", status=1))
        assert re.search(r"no permission \(.*\); choose another place", line)
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", runner.shards], check=True)


def test_a_slow_file_delays_and_a_vanished_one_is_named(
    runner: Runner, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    whole = runner.corpus
    runner.corpus = tmp_path / "copy"
    shutil.copytree(whole, runner.corpus)
    process = runner.start("--workers", "2", FLSEP_STUCK="t3")
    wait_until(lambda: len(list(runner.shards.glob("*.h5"))) == 5, process)
    hidden = (runner.corpus / "train" / "t3" / "a.wav").rename(tmp_path / "a.wav")
    runner.let_go()
    output = runner.finish(process, 1)
    assert "t3: " in output
    assert "a.wav: no such file" in output
    hidden.rename(runner.corpus / "train" / "t3" / "a.wav")
    runner.run("--workers", "0")
    assert contents(runner.shards) == undisturbed


def test_two_runs_at_once(runner: Runner, undisturbed: dict[str, bytes]) -> None:
    first = runner.start("--workers", "1", FLSEP_STUCK="t0")
    wait_until(lambda: runner.attempts()["t0"] == 1, first)
    for options in ([], ["--part", "1/2"], ["--finalise"]):
        second = one_line(runner.run("--workers", "0", *options, status=1))
        assert "another run is writing into it" in second
    runner.let_go()
    runner.finish(first)
    assert contents(runner.shards) == undisturbed
    assert runner.attempts() == ONCE


def test_parts_at_once_some_of_them_killed(runner: Runner, undisturbed: dict[str, bytes]) -> None:
    parts = [runner.start("--workers", "0", "--part", f"{part}/2") for part in (1, 2)]
    wait_until(lambda: list(runner.shards.glob("*.h5")))
    parts[1].kill()
    runner.finish(parts[0])
    parts[1].communicate()
    runner.run("--workers", "0", "--part", "2/2")
    runner.run("--workers", "0", "--finalise")
    assert contents(runner.shards) == undisturbed
    assert not list(runner.shards.glob(".*.part"))


@pytest.mark.parametrize("options", [("--workers", str(n)) for n in (1, 2, 3, 5, 8)])
def test_any_number_of_workers_gives_the_same_bytes(
    runner: Runner, undisturbed: dict[str, bytes], options: tuple[str, ...]
) -> None:
    runner.run(*options)
    assert contents(runner.shards) == undisturbed


def test_workers_come_and_go(runner: Runner, undisturbed: dict[str, bytes]) -> None:
    runner.run("--adapt", "0:3")
    assert contents(runner.shards) == undisturbed
    assert runner.attempts() == ONCE
