"""Score tracks: each in its own process, into its own JSON file.

The result of a track is what the engine returns with five more keys: ``track`` (the name as it is,
since file names are made safe), ``sample_rate_hz``, ``num_samples``, ``fingerprint`` (of the
estimates) and ``engine``.
"""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import traceback
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from flsep.cache.errors import FlsepError
from flsep.cache.files import remove_leftovers, write_text
from flsep.trainer.errors import ScoringError
from flsep.trainer.registry import ENGINES, load
from flsep.trainer.scoring.engine import DEFAULT_ENGINE, Engine, FailedTrack, TrackJob

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
# Well below what a pipe holds, so that a process never waits for its parent to read.
_REASON_CHARACTERS = 2000
_TRACEBACK_CHARACTERS = 10_000


def load_engine(name: str) -> Engine:
    """Return the engine of this name; raises ConfigError if there is none."""
    engine: Engine = load(ENGINES, name, "scoring engine")()
    return engine


def safe_name(track_name: str) -> str:
    """Return a file name (no suffix) for any track name: readable, short, ASCII and unique."""
    ascii_name = unicodedata.normalize("NFKD", track_name).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9]+", "_", ascii_name)[:60].strip("_") or "track"
    # Names that differ only in case, or in characters that a file name cannot hold, differ in
    # the digest, so that they never share a file.
    digest = hashlib.sha256(track_name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{slug}-{digest[:10]}"


def score_tracks(
    jobs: Sequence[TrackJob],
    folder: Path,
    *,
    engine: str,
    num_workers: int,
    progress: bool = False,
) -> tuple[list[Path], list[FailedTrack]]:
    """Score tracks, each in a process of its own, and write one JSON file a track.

    A process that is killed (out of memory) costs its own track only. A stored result of the same
    engine, track, sources, rate and fingerprint is kept; any other one is replaced. An engine may
    need gigabytes for one track: see `Engine.predict_peak_bytes` before choosing `num_workers`;
    0 scores in this process.

    Returns the JSON files, kept or new, and the tracks that failed, both in the order of `jobs`.

    Raises
    ------
    ConfigError
        If there is no such engine.
    ScoringError
        If the engine cannot work here, two tracks have one name, or `folder` cannot be written.
    """
    chosen = load_engine(engine)
    # What the engine lacks is said once, not by every track.
    chosen.prepare()
    from tqdm import tqdm

    names = [job.name for job in jobs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ScoringError(f"tracks {twice} come more than once; give each its own name")
    _require_writable(folder)
    paths = {job.name: folder / f"{safe_name(job.name)}.json" for job in jobs}
    pending = [
        (job, paths[job.name]) for job in jobs if not _is_current(paths[job.name], job, chosen.name)
    ]
    # What killed scorers have left; nobody else may be scoring into this folder.
    remove_leftovers(folder)
    failed: dict[str, FailedTrack] = {}
    if num_workers:
        results = _score_in_processes(pending, chosen, num_workers)
    else:
        results = ((job.name, _score_job(job, path, chosen)) for job, path in pending)
    num_kept = len(jobs) - len(pending)
    with tqdm(
        total=len(jobs), initial=num_kept, desc=chosen.name, unit="track", disable=not progress
    ) as bar:
        for name, failure in results:
            bar.update()
            if failure is not None:
                failed[name] = failure
    done = [path for name, path in paths.items() if name not in failed]
    return done, [failed[name] for name in paths if name in failed]


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScoringError(f"cannot make the folder {folder} ({error.strerror})") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ScoringError(f"cannot write into {folder}: choose another folder for the scores")


def _is_current(path: Path, job: TrackJob, engine: str) -> bool:
    """Whether a file holds the scores that a job would give; a damaged file does not."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return (
            stored["track"] == job.name
            and stored["fingerprint"] == job.fingerprint
            and stored["sample_rate_hz"] == job.sample_rate_hz
            and stored.get("engine", DEFAULT_ENGINE) == engine
            and [target["name"] for target in stored["targets"]] == list(job.sources)
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _score_job(job: TrackJob, path: Path, engine: Engine) -> FailedTrack | None:
    """Score one track into its file; return why it failed, if it did."""
    from threadpoolctl import threadpool_limits

    try:
        # A result of other estimates must not outlive a failure.
        path.unlink(missing_ok=True)
        engine.prepare()  # another process prepared it, unless tracks are scored in this one
        # The processes share the cores: BLAS threads would only compete for them.
        with threadpool_limits(1):
            references, estimates = job.load()
            scores = engine.score(
                references,
                estimates,
                sources=job.sources,
                sample_rate_hz=job.sample_rate_hz,
                name=job.name,
            )
        scores |= {
            "track": job.name,
            "sample_rate_hz": job.sample_rate_hz,
            "num_samples": references.shape[1],
            "fingerprint": job.fingerprint,
            "engine": engine.name,
        }
        write_text(path, json.dumps(scores, indent=2) + "\n")
    except Exception as error:  # one track must not stop the others, even where flsep has a bug
        return _explain(job.name, error)
    return None


def _explain(track: str, error: Exception) -> FailedTrack:
    """Explain an expected failure in one line, and a bug by its traceback, too."""
    details = ""
    match error:
        case FlsepError():
            text = " ".join([str(error), *getattr(error, "__notes__", [])])
        case OSError() | MemoryError():
            text = f"{type(error).__name__}: {error}"
        case _:
            text = f"a bug in flsep, {type(error).__name__}: {error}"
            # The end of a traceback says most.
            details = "".join(traceback.format_exception(error))[-_TRACEBACK_CHARACTERS:]
    return FailedTrack(track, " ".join(text.split())[:_REASON_CHARACTERS], details)


def _score_in_processes(
    pending: Sequence[tuple[TrackJob, Path]], engine: Engine, num_workers: int
) -> Iterator[tuple[str, FailedTrack | None]]:
    """Yield each track's name and why it failed, if it did, in order of completion."""
    context = multiprocessing.get_context("spawn")
    queue = list(reversed(pending))
    running: dict[int, tuple[str, Any, Connection]] = {}
    try:
        while queue or running:
            while queue and len(running) < num_workers:
                job, path = queue.pop()
                receiver, sender = context.Pipe(duplex=False)
                # The engine itself is sent, not its name: a pickled object imports its own
                # module, so that engines which this process registered work there too.
                process = context.Process(
                    target=_score_and_report, args=(job, path, engine, sender), daemon=True
                )
                with _child_settings():
                    process.start()
                # While the parent has the sending end open, a dead child is not noticed.
                sender.close()
                running[process.sentinel] = (job.name, process, receiver)
            for sentinel in wait(list(running)):
                assert isinstance(sentinel, int)
                name, process, receiver = running.pop(sentinel)
                process.join()
                yield name, _receive_failure(receiver, name, process.exitcode)
                process.close()
    finally:
        for _, process, receiver in running.values():
            process.terminate()
            process.join()
            receiver.close()


def _score_and_report(job: TrackJob, path: Path, engine: Engine, sender: Connection) -> None:
    sender.send(_score_job(job, path, engine))


def _receive_failure(receiver: Connection, track: str, exit_code: int | None) -> FailedTrack | None:
    try:
        failure: FailedTrack | None = receiver.recv()
        return failure
    except EOFError:
        reason = f"its process ended with status {exit_code} before it reported"
        if exit_code is not None and exit_code < 0:
            name = signal.Signals(-exit_code).name
            reason = f"its process was killed by {name}; if memory ran out, use fewer workers"
        return FailedTrack(track, reason)
    finally:
        receiver.close()


@contextmanager
def _child_settings() -> Iterator[None]:
    """Start processes that limit BLAS to one thread and leave Ctrl-C to their parent."""
    # BLAS reads its variables when NumPy is imported, before any code of ours runs in the child.
    saved = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    # If the resource tracker started with the first process, it would unblock the signal before
    # that process inherits it.
    resource_tracker.ensure_running()
    # The child inherits the blocked signal; the parent gets a Ctrl-C of this time afterwards.
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
