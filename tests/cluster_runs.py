"""Runs in processes of their own, watched and disturbed through a module that workers preload."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import soundfile

RATE_HZ = 16000
OPTIONS = ["--sample-rate", str(RATE_HZ), "--n-fft", "512", "--hop", "128", "--sources", "a,b"]
PROGRAM = [sys.executable, "-c", "from flsep.pipeline.cli import main; main()"]

# Each attempt at a shard is noted before it begins. What else happens is up to the environment.
PRELOAD = """
import os
import time
from pathlib import Path

from flsep.pipeline.shards import build, track

FOLDER = Path(os.environ["FLSEP_WATCH"])
make_shard, decode = build.make_shard, track.decode


def watched(task, settings, **options):
    with open(FOLDER / "attempts", "a") as file:
        file.write(f"{task.tracks[0].track.name} {os.getpid()} {os.environ.get('SLURM_JOB_ID')}\\n")
    return make_shard(task, settings, **options)


def disturbed(source, **options):
    name = source.path.parent.name
    time.sleep(float(os.environ.get("FLSEP_SLOW", 0)))
    if name == os.environ.get("FLSEP_STUCK"):
        while not (FOLDER / "go").exists():
            time.sleep(0.02)
    if name == os.environ.get("FLSEP_HUNGRY"):
        hoard = []
        while True:
            hoard.append(bytearray(b"x") * (48 << 20))
            time.sleep(0.02)
    return decode(source, **options)


def dask_setup(worker):
    build.make_shard, track.decode = watched, disturbed
"""


def write_track(folder: Path, seed: int, seconds: float) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name in ("a", "b", "mixture"):
        waveform = rng.uniform(-0.4, 0.4, (int(seconds * RATE_HZ), 2))
        soundfile.write(folder / f"{name}.wav", waveform, RATE_HZ)


def contents(folder: Path) -> dict[str, bytes]:
    """What a run leaves, without the lock and its kind."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


def wait_until(
    condition: Callable[[], object],
    process: "subprocess.Popen[str] | None" = None,
    seconds: float = 240,
) -> None:
    """Wait for something that a process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended too early: {process.communicate()}")
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class Runner:
    """Starts ``flsep-precompute run`` over the corpus, a shard a track."""

    def __init__(self, corpus: Path, teacher: Path, folder: Path) -> None:
        self.corpus, self.teacher, self.folder = corpus, teacher, folder
        self.shards = folder / "shards"
        self._started: list[subprocess.Popen[str]] = []
        (folder / "watch").mkdir()
        (folder / "preload.py").write_text(PRELOAD)
        self.environment = {
            **os.environ,
            "FLSEP_WATCH": str(folder / "watch"),
            "DASK_DISTRIBUTED__WORKER__PRELOAD": str(folder / "preload.py"),
            "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "3s",
        }

    def command(self, *options: str) -> list[str]:
        arguments = ["run", str(self.corpus), str(self.shards), "--teacher", str(self.teacher)]
        return [*PROGRAM, *arguments, *OPTIONS, "--shard-size", "1M", *options]

    def start(self, *options: str, **environment: str) -> "subprocess.Popen[str]":
        return self.start_program(self.command(*options), **environment)

    def start_program(self, command: list[str], **environment: str) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            command,
            env={**self.environment, **environment},
            cwd=self.folder,  # where jobs write what they say
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def finish(self, process: "subprocess.Popen[str]", status: int = 0, seconds: int = 300) -> str:
        """Wait for the end; return all it said, having checked that it was no traceback."""
        output, errors = process.communicate(timeout=seconds)
        assert process.returncode == status, output + errors
        assert "Traceback" not in errors, errors
        return output + errors

    def run(self, *options: str, status: int = 0, **environment: str) -> str:
        return self.finish(self.start(*options, **environment), status)

    def attempts(self) -> Counter[str]:
        """How often each track's shard was begun on a worker."""
        return Counter(line.split()[0] for line in self.lines())

    def lines(self) -> list[str]:
        path = self.folder / "watch" / "attempts"
        return path.read_text().splitlines() if path.exists() else []

    def let_go(self) -> None:
        (self.folder / "watch" / "go").touch()

    def stop(self) -> None:
        for process in self._started:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.communicate()


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
