"""Report what a run without workers waits for, and end it when no worker will come."""

import subprocess
import sys
from pathlib import Path
from typing import Any

_LISTINGS = {"slurm": "squeue", "pbs": "qstat", "lsf": "bjobs", "sge": "qstat"}
_ENDED_STATES = "BF,CA,CD,DL,F,NF,OOM,PR,TO"  # all final states of a SLURM job


class WorkerWatch:
    """Checks for workers; to be called from time to time while no task finishes.

    `kind` is that of the cluster that `start_cluster` started, None for a scheduler that ran
    before.
    """

    def __init__(self, client: Any, kind: str | None) -> None:
        self._client = client
        self._kind = kind
        self._ended: set[str] = set()

    def __call__(self) -> None:
        """Print a line if no worker is connected.

        ConnectionError means that all jobs had ended at the previous call already and have not been
        replaced. Only SLURM is asked; a job that waits in the queue has not ended.
        """
        if self._client.scheduler_info(n_workers=-1)["workers"]:
            return
        if self._kind not in _LISTINGS:
            _say(f"waiting for workers: none is connected to {self._client.scheduler.address}")
            return
        # Keep no reference to a job: Dask asserts that nobody holds the jobs that it has closed.
        jobs = self._client.cluster.workers
        folders = {str(job.job_id): job.log_directory for job in list(jobs.values())}
        logs = next(filter(None, folders.values()), Path.cwd())
        # `_ended` is as old as the previous call, so Dask has had time to replace these jobs.
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
    """Return the user's ended jobs; SLURM remembers them for five minutes by default."""
    command = ["squeue", "--me", "--noheader", "--format=%A", f"--states={_ENDED_STATES}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return set(done.stdout.split())


def _say(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stderr)  # above the progress bar
