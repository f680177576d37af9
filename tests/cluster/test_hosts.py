"""Hosts with a network of their own, in namespaces; one is cut off in the middle of a task."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator

import pytest
from cluster_runs import Runner, contents, wait_until

pytestmark = pytest.mark.heavy

ADDRESSES = ("10.77.0.1", "10.77.0.2", "10.77.0.3")
PATIENCE = {
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "5s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "11s",
}


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def hosts() -> Iterator[dict[str, str]]:
    """Addresses of three hosts by name; the first holds the bridge that joins them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("only root can make network namespaces, with iproute2")
    names = [f"flsep{os.getpid()}-{number}" for number in range(len(ADDRESSES))]
    first = names[0]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("-n", first, "link", "add", "net", "type", "bridge")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for name in names[1:]:
            ip("-n", first, "link", "add", name, "type", "veth", "peer", "net", "netns", name)
            ip("-n", first, "link", "set", name, "master", "net", "up")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "net")
            ip("-n", name, "link", "set", "net", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield dict(zip(names, ADDRESSES, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def test_a_host_cut_off_in_the_middle_of_a_task(
    hosts: dict[str, str], runner: Runner, undisturbed: dict[str, bytes]
) -> None:
    def start(host: str, *command: str) -> "subprocess.Popen[str]":
        return runner.start_program(["ip", "netns", "exec", host, *command], **PATIENCE)

    def start_dask(host: str, program: str, *options: str) -> None:
        place = ("--host", hosts[host], "--dashboard-address", "127.0.0.1:0")
        start(host, sys.executable, "-m", f"distributed.cli.dask_{program}", *place, *options)

    first, *others = hosts
    address = f"tcp://{hosts[first]}:8786"
    runner.environment["FLSEP_STUCK"] = "t0"
    start_dask(first, "scheduler", "--port", "8786")
    for host in others:
        start_dask(host, "worker", address, "--nthreads", "1")
    process = start(first, *runner.command("--scheduler", address))
    wait_until(lambda: len(list(runner.shards.glob("*.h5"))) == 5, process)
    (line,) = [line for line in runner.lines() if line.startswith("t0 ")]
    cut = ip("netns", "identify", line.split()[1])
    assert cut in others
    ip("-n", cut, "link", "set", "net", "down")
    wait_until(lambda: runner.attempts()["t0"] == 2, process, seconds=60)
    again = [line for line in runner.lines() if line.startswith("t0 ")][1]
    assert {cut, ip("netns", "identify", again.split()[1])} == set(others)
    runner.let_go()
    output = runner.finish(process)
    assert address in output
    assert contents(runner.shards) == undisturbed
    assert runner.attempts() == Counter({f"t{number}": 1 for number in range(6)}) + Counter(t0=1)
