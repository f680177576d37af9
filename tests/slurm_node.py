"""A real SLURM of one node, on the loopback, with its own configuration and keys."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from cluster_runs import wait_until

DAEMONS = ("munged", "slurmctld", "slurmd")
NUM_CPUS = 4

CONFIGURATION = """
ClusterName=flsep
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={controller_port}
SlurmdPort={node_port}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={num_cpus} RealMemory=16000
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def call(*command: str, check: bool = True, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0 or not check, done.stderr
    return done.stdout.strip()


def end(name: str, pid_file: Path) -> None:
    """End a daemon by the number it wrote, if that is still the daemon."""
    with suppress(FileNotFoundError, ValueError, psutil.NoSuchProcess, psutil.TimeoutExpired):
        process = psutil.Process(int(pid_file.read_text()))
        if process.name() == name:
            process.terminate()
            process.wait(10)


@contextmanager
def running_slurm(folder: Path) -> Iterator[Path]:
    """Start the daemons; ``SLURM_CONF`` in the environment leads all programs to them."""
    if missing := [name for name in (*DAEMONS, "sbatch") if shutil.which(name) is None]:
        pytest.skip(f"no {', '.join(missing)}: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("SLURM's daemons want to be root here")
    for path in (folder, *folder.parents[:2]):
        path.chmod(0o755)  # munged refuses a socket that others cannot reach
    for name in ("state", "spool"):
        (folder / name).mkdir(mode=0o700)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(
            host=socket.gethostname().split(".")[0],
            folder=folder,
            controller_port=free_port(),
            node_port=free_port(),
            num_cpus=NUM_CPUS,
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(configuration))
        try:
            call(
                *("munged", f"--key-file={key}", f"--socket={folder}/munge.socket"),
                *(f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log"),
                f"--seed-file={folder}/munged.seed",
            )
            call("slurmctld")
            call("slurmd")
            wait_until(lambda: call("sinfo", "-h", "-o", "%t", check=False) == "idle", seconds=20)
            yield folder
        finally:
            call("scancel", "--user=root", check=False)
            with suppress(AssertionError):
                wait_until(lambda: not call("squeue", "-h", check=False), seconds=15)
            for name in reversed(DAEMONS):
                end(name, folder / f"{name}.pid")


def submit(
    script: str, folder: Path, *options: str, environment: dict[str, str] | None = None
) -> str:
    """Submit a script, its output going to job-*.log; return the number of the job."""
    path = folder / "job.sh"
    path.write_text(f"#!/bin/bash\n{script}\n")
    output = ("--output", str(folder / "job-%A-%a.log"), "--open-mode=append", "--parsable")
    output += ("--chdir", str(folder))  # where the jobs of a job write what they say
    return call("sbatch", *output, *options, str(path), env=environment)
