"""Say what a run without workers waits for, and notice when none will come."""

import subprocess
import sys
from pathlib import Path
from typing import Any

_LISTINGS = {"slurm": "squeue", "pbs": "qstat", "lsf": "bjobs", "sge": "qstat"}
_ENDED_STATES = "BF,CA,CD,DL,F,NF,OOM,PR,TO"  # all in which a job of SLURM stays


class WorkerWatch:
    """Called now and then while no task ends.

    Parameters
    ----------
    client : Client
        Of the scheduler that the workers connect to.
    kind : str, optional
        What `start_cluster` started; None if the scheduler was there.
    """

    def __init__(self, client: Any, kind: str | None) -> None:
        self._client = client
        self._kind = kind
        self._ended: set[str] = set()

    def __call__(self) -> None:
        """Say that no worker is connected, if so.

        Raises
        ------
        ConnectionError
            If all jobs had ended when it was called before, and were not replaced since. Only
            SLURM is asked; a job that waits in its queue is none that ended.
        """
        if self._client.scheduler_info(n_workers=-1)["workers"]:
            return
        if self._kind not in _LISTINGS:
            _say(f"waiting for workers: none is connected to {self._client.scheduler.address}")
            return
        # No name is left for a job here: Dask asserts that those it closed are nobody's any more.
        jobs = self._client.cluster.workers
        folders = {str(job.job_id): job.log_directory for job in list(jobs.values())}
        logs = next(filter(None, folders.values()), Path.cwd())
        if folders and folders.keys() <= self._ended:
            raise ConnectionError(
                f"no worker is connected, and all jobs have ended ({', '.join(sorted(folders))}); "
                f"read why in their output in {logs}, then run the same command again"
            )
        if self._kind == "slurm":
            self._ended |= _ended_jobs()
        num_ended = len(folders.keys() & self._ended)
        ended = f", {num_ended} of them ended" if num_ended else ""
        _say(
            f"waiting for workers: {len(folders)} jobs submitted{ended}, none is connected; see "
            f"{_LISTINGS[self._kind]}, and the jobs' output in {logs}"
        )


def _ended_jobs() -> set[str]:
    """Return the user's jobs that SLURM remembers to have ended, for five minutes as a rule."""
    command = ["squeue", "--me", "--noheader", "--format=%A", f"--states={_ENDED_STATES}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return set(done.stdout.split())


def _say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)  # above the bar
