"""Score separated tracks with museval (BSS Eval v4), one process and one JSON file a track.

The result of a track is museval's own JSON (``museval.TrackStore``) with four more keys: ``track``
(the name as it is, since file names are made safe), ``sample_rate_hz``, ``num_samples`` and, from
`score_tracks`, ``fingerprint`` (of the estimates).

museval takes about 1 s of one core per second of 4 stereo sources, plus about 9 s a track, and its
whole-track FFTs take gigabytes: see `predict_peak_bytes` before choosing a number of processes.
"""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from flsep.cache.files import write_text
from flsep.trainer.errors import ScoringError
from flsep.trainer.scoring.bsseval import prepare_museval, score_track
from flsep.trainer.scoring.engine import Failure, TrackJob

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def safe_name(track_name: str) -> str:
    """Return a file name (no suffix) for any track name: readable, short, ASCII and unique.

    Names that differ only in case, or in characters that a file name cannot hold, differ in the
    digest at the end, so they never share a file.
    """
    ascii_name = unicodedata.normalize("NFKD", track_name).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9]+", "_", ascii_name)[:60].strip("_") or "track"
    digest = hashlib.sha256(track_name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{slug}-{digest[:10]}"


def score_tracks(
    jobs: Sequence[TrackJob], out_dir: Path, *, num_workers: int, progress: bool = False
) -> tuple[list[Path], list[Failure]]:
    """Score tracks, each in a process of its own, and write one JSON file a track.

    A process holds one track, with BLAS held to one thread, and gives its memory back when it
    ends; one that is killed (out of memory) costs its own track only. A stored result of the same
    track, sources, rate and fingerprint is kept; any other under its name is removed first.

    Parameters
    ----------
    jobs
        The tracks; names differ.
    out_dir
        Folder of the JSON files, made if needed.
    num_workers
        Processes at a time; 0 scores in this process.
    progress
        Show a progress bar on stderr.

    Returns
    -------
    done : list of Path
        The JSON files that hold, kept or new, in the order of `jobs`.
    failed : list of Failure
        The tracks that failed, in the order of `jobs`.

    Raises
    ------
    ScoringError
        Where museval is missing, a name comes twice or `out_dir` cannot be written.
    """
    prepare_museval()
    from tqdm import tqdm

    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ScoringError(f"tracks {twice} come more than once; give each its own name")
    _check_folder(out_dir)
    paths = {job.name: out_dir / f"{safe_name(job.name)}.json" for job in jobs}
    pending = [(job, paths[job.name]) for job in jobs if not _is_current(paths[job.name], job)]
    reasons: dict[str, str] = {}
    scoring = _score_in_processes(pending, num_workers) if num_workers else _score_here(pending)
    with tqdm(
        total=len(jobs),
        initial=len(jobs) - len(pending),
        desc="museval",
        unit="track",
        disable=not progress,
    ) as bar:
        for name, reason in scoring:
            bar.update()
            if reason is not None:
                reasons[name] = reason
    done = [path for name, path in paths.items() if name not in reasons]
    return done, [Failure(name, reasons[name]) for name in paths if name in reasons]


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScoringError(f"cannot make the folder {folder} ({error.strerror})") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ScoringError(f"cannot write into {folder}: choose another folder for the scores")


def _is_current(path: Path, job: TrackJob) -> bool:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return (
            stored["track"] == job.name
            and stored["fingerprint"] == job.fingerprint
            and stored["sample_rate_hz"] == job.sample_rate_hz
            and [target["name"] for target in stored["targets"]] == list(job.sources)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _score_job(job: TrackJob, path: Path) -> str | None:
    """Score one track into its file; return why it failed, or None."""
    from threadpoolctl import threadpool_limits

    try:
        path.unlink(missing_ok=True)
        with threadpool_limits(1):
            references, estimates = job.load()
            scores = score_track(
                references,
                estimates,
                sources=job.sources,
                sample_rate_hz=job.sample_rate_hz,
                name=job.name,
            )
        scores["fingerprint"] = job.fingerprint
        write_text(path, json.dumps(scores, indent=2) + "\n")
    except Exception as error:  # whatever is wrong with one track must not stop the others
        kind = "" if isinstance(error, ScoringError) else f"{type(error).__name__}: "
        return " ".join(f"{kind}{error}".split())
    return None


def _score_here(pending: Sequence[tuple[TrackJob, Path]]) -> Iterator[tuple[str, str | None]]:
    for job, path in pending:
        yield job.name, _score_job(job, path)


def _score_in_processes(
    pending: Sequence[tuple[TrackJob, Path]], num_workers: int
) -> Iterator[tuple[str, str | None]]:
    context = multiprocessing.get_context("spawn")
    queue = list(reversed(pending))
    running: dict[int, tuple[str, Any, Connection]] = {}
    try:
        while queue or running:
            while queue and len(running) < num_workers:
                job, path = queue.pop()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_score_and_report, args=(job, path, sender), daemon=True
                )
                with _child_settings():
                    process.start()
                sender.close()
                running[process.sentinel] = (job.name, process, receiver)
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                name, process, receiver = running.pop(sentinel)
                process.join()
                yield name, _receive_reason(receiver, process.exitcode)
                process.close()
    finally:
        for _, process, receiver in running.values():
            process.terminate()
            process.join()
            receiver.close()


def _score_and_report(job: TrackJob, path: Path, sender: Connection) -> None:
    reason = _score_job(job, path)
    # well below what a pipe holds, so that the process never waits for its parent to read
    sender.send(None if reason is None else reason[:2000])


def _receive_reason(receiver: Connection, exit_code: int | None) -> str | None:
    try:
        reason: str | None = receiver.recv()
        return reason
    except EOFError:
        if exit_code is not None and exit_code < 0:
            name = signal.Signals(-exit_code).name
            return f"its process was killed by {name}; if memory ran out, use fewer workers"
        return f"its process ended with status {exit_code} before it reported"
    finally:
        receiver.close()


@contextmanager
def _child_settings() -> Iterator[None]:
    """Start processes that hold BLAS to one thread and leave Ctrl-C to their parent.

    BLAS reads its variables when NumPy is imported, before any code of ours runs in the child. The
    blocked signal is inherited too; the parent gets one that came meanwhile when it unblocks.
    """
    saved = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    # Started with the first process, it would unblock the signal before that one inherits it.
    resource_tracker.ensure_running()
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
