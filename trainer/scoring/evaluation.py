"""Score an estimator on a split of the shards, and read what an evaluation says.

Each track is separated by the process that scores it: scoring takes far longer than the model, and
only the scores have to be stored. An evaluation is a folder with ``evaluation.json``, which says
what was scored, and ``scores/``, one JSON file a track in museval's format.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flsep.cache import Layout, ShardFile, Shards, TrackRecord, write_json
from flsep.cache.format import fingerprint
from flsep.cache.memory import free_host_bytes
from flsep.trainer.errors import EvaluationError
from flsep.trainer.runs.folder import Run
from flsep.trainer.runs.upgrade import upgrade_config
from flsep.trainer.scoring.engine import DEFAULT_ENGINE, Engine, FailedTrack, TrackJob
from flsep.trainer.scoring.estimators import Estimator, LoadTrack
from flsep.trainer.scoring.pool import load_engine, score_tracks

_FORMAT, _VERSION = "flsep-evaluation", 1
_SEPARATION_BYTES = 1 << 30
"""What a process needs to separate a track before it is scored: torch, the model, a chunk."""


def describe_run(checkpoint: Path, layout: Layout) -> dict[str, Any]:
    """Return what ``evaluation.json`` says of a run.

    Raises CheckpointError if the checkpoint is unusable, or was trained on data of another kind
    than `layout`.
    """
    from flsep.trainer.runs.checkpoint import load_checkpoint, require_same_data

    loaded = load_checkpoint(checkpoint)
    require_same_data(loaded, layout, str(checkpoint))
    return {
        "config": loaded.config.to_json(),
        "fingerprint": loaded.fingerprint,
        "epoch": loaded.epoch,
        "validation_loss": loaded.metrics["valid"]["separation"],
    }


def evaluate(
    estimator: Estimator,
    shards: Shards,
    folder: Path,
    *,
    split: str,
    num_workers: int | None,
    progress: bool,
    description: dict[str, Any],
    engine: str = DEFAULT_ENGINE,
) -> tuple[list[Path], list[FailedTrack]]:
    """Score every track of a split, except those whose stored scores are current.

    Returns the files of scores, one a track, and the tracks that could not be scored. Without
    `num_workers`, as many processes are started as cores and memory allow. `description` holds
    further entries of ``evaluation.json``, about the estimator.

    Raises EvaluationError if the split has no track, CacheError if its shards are missing or
    damaged or hold no audio, ConfigError if there is no such engine, and ScoringError if the
    engine cannot work here or the folder cannot be written.
    """
    tracks = shards.tracks(split)
    if not tracks:
        raise EvaluationError(f"{shards.folder}: no track in the split {split!r}")
    shards.check_files(split)
    audio = _identify_audio(shards, tracks)
    identity, layout = estimator.identity(), shards.layout
    jobs = [
        TrackJob(
            name=track.name,
            sources=layout.sources,
            sample_rate_hz=layout.sample_rate_hz,
            # Scores are current while neither the estimator nor the track has changed.
            fingerprint=fingerprint([identity, track.digest]),
            load=LoadTrack(estimator, shards, track),
        )
        for track in tracks
    ]
    chosen = load_engine(engine)
    chosen.prepare()  # before anything is removed, as the engine may not work here
    if num_workers is None:
        num_workers = _choose_num_workers(chosen, layout, tracks)
    summary, scores = folder / "evaluation.json", folder / "scores"
    # Written last: while the summary is missing, nothing is compared with half an evaluation.
    if summary.exists():  # False also where a parent is a file
        summary.unlink()
    done, failed = score_tracks(
        jobs, scores, engine=engine, num_workers=num_workers, progress=progress
    )
    # Scores of tracks that failed, or are no longer in the split.
    for stale in set(scores.glob("*.json")) - set(done):
        stale.unlink()
    write_json(
        summary,
        {
            "format": _FORMAT,
            "version": _VERSION,
            "kind": estimator.kind,
            "wiener": estimator.wiener,
            "engine": chosen.name,
            "split": split,
            "shards": str(shards.folder.resolve()),
            "audio": audio,
            "num_tracks": len(done),
            "failed": [[failure.track, failure.reason] for failure in failed],
            **description,
        },
    )
    return done, failed


def _identify_audio(shards: Shards, tracks: Sequence[TrackRecord]) -> str:
    """Identify what is scored by its audio alone, whatever teacher or STFT is stored beside it."""
    files = {name: ShardFile(shards.folder / name) for name in {track.shard for track in tracks}}
    digests = []
    for track in tracks:
        if not track.has_audio:
            shards.read_audio(track, 0)  # raises an error that says what to do
        stored = files[track.shard].tracks[track.position]
        digests.append([track.name, *stored.datasets["audio"].sha256, *stored.audio_scale])
    return fingerprint([list(shards.layout.sources), sorted(digests)])


def _choose_num_workers(engine: Engine, layout: Layout, tracks: Sequence[TrackRecord]) -> int:
    """Return how many processes fit the cores and the memory."""
    # Any process may get the longest track.
    longest = max(track.num_samples for track in tracks)
    peak_bytes = _SEPARATION_BYTES + engine.predict_peak_bytes(
        len(layout.sources), layout.num_channels, longest
    )
    num_cores = len(os.sched_getaffinity(0))
    return max(1, min(num_cores, free_host_bytes() // peak_bytes, len(tracks)))


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A finished evaluation: ``evaluation.json`` as `summary`, and its folder.

    `label` is the folder as the user named it, `name` the user's name for its row in a comparison.
    """

    label: str
    name: str | None
    folder: Path
    summary: dict[str, Any]


def read_evaluation(folder: Path, *, kind: str, name: str | None = None) -> Evaluated:
    """Read what ``evaluation.json`` says; raises EvaluationError if there is no such evaluation.

    `folder` is a run folder, or the folder given to ``--floor`` or ``--oracle``; `kind` the kind of
    estimator that is expected there.
    """
    place = Run(folder).evaluation if kind == "run" else folder
    path = place / "evaluation.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        option = folder if kind == "run" else f"--{kind} {folder}"
        raise EvaluationError(
            f"{place}: not evaluated; run flsep-train evaluate {option} SHARDS"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not UTF-8
        raise EvaluationError(f"{path}: not readable ({error}); evaluate again") from error
    if problem := _find_problem(summary):
        raise EvaluationError(f"{path}: not readable ({problem}); evaluate again")
    if summary["kind"] != kind:
        raise EvaluationError(f"{path}: holds scores of the {summary['kind']}, expected the {kind}")
    if kind == "run":
        summary["config"] = upgrade_config(summary["config"])
    # Older summaries name no engine: the default takes its place.
    return Evaluated(str(folder), name, place, {"engine": DEFAULT_ENGINE, **summary})


def _find_problem(summary: Any) -> str | None:
    """Return what keeps a summary from being used, or None."""
    if not isinstance(summary, dict):
        return "no JSON object"
    found = summary.get("format"), summary.get("version")
    if found != (_FORMAT, _VERSION):
        return f"format {found[0]!r} version {found[1]!r}; expected {_FORMAT!r} version {_VERSION}"
    needed = ["kind", "wiener", "split", "shards", "audio"]
    missing = [name for name in needed if name not in summary]
    if summary.get("kind") == "run":
        missing += [] if "fingerprint" in summary else ["fingerprint"]
        # What `compare` makes rows of; the other fields depend on separator and approach.
        for section, name in (("approach", "name"), ("data", "mixing"), ("fit", "seed")):
            try:
                summary["config"][section][name]
            except (KeyError, TypeError):
                missing.append(f"config.{section}.{name}")
    return f"lacks {', '.join(missing)}" if missing else None
