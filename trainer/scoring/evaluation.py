"""Score what a run, or no model at all, makes of a split of the shards; compare the scores.

Each track is separated by the process that scores it: museval takes far longer than the model, and
nothing but the scores has to be stored. An evaluation is a folder with ``evaluation.json``, which
says what was scored, and ``scores/``, one JSON file a track in museval's format.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flsep.cache import Layout, ShardFile, Shards, TrackRecord, write_json
from flsep.cache.format import fingerprint
from flsep.trainer.config import TrainConfig
from flsep.trainer.errors import EvaluationError
from flsep.trainer.runs.folder import Run
from flsep.trainer.scoring.bsseval import predict_peak_bytes
from flsep.trainer.scoring.engine import Failure, TrackJob
from flsep.trainer.scoring.estimators import Estimator, LoadTrack
from flsep.trainer.scoring.pool import score_tracks

_FORMAT = "flsep-evaluation"
# What a process needs to separate a track before museval starts: torch, the model, a chunk.
_SEPARATION_BYTES = 1 << 30


def describe_run(checkpoint: Path, layout: Layout) -> dict[str, Any]:
    """Return what ``evaluation.json`` says of a run.

    Raises
    ------
    CheckpointError
        If the checkpoint is unusable, or was trained on data of another kind than `layout`.
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
) -> tuple[list[Path], list[Failure]]:
    """Score every track of a split; scores that hold already are kept.

    Parameters
    ----------
    estimator : Estimator
        What is scored.
    shards : Shards
        Whose audio.
    folder : Path
        Where the evaluation goes.
    split : {'train', 'valid', 'test'}
        Which tracks.
    num_workers : int or None
        Processes; None takes as many as cores and memory allow.
    progress : bool
        Show a bar.
    description : dict
        What ``evaluation.json`` says of the estimator besides.

    Returns
    -------
    done : list of Path
        The scores, a file a track.
    failed : list of Failure
        Tracks that could not be scored.

    Raises
    ------
    EvaluationError
        If the split has no track.
    CacheError
        If its shards are missing or damaged, or hold no audio.
    ScoringError
        If museval cannot work here, or the folder cannot be written.
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
            fingerprint=fingerprint([identity, track.digest]),
            load=LoadTrack(estimator, shards, track),
        )
        for track in tracks
    ]
    if num_workers is None:
        num_workers = _choose_num_workers(layout.sources, layout.num_channels, tracks)
    summary, scores = folder / "evaluation.json", folder / "scores"
    # Written last: while it is missing, nothing is compared with half an evaluation.
    if summary.exists():
        summary.unlink()
    done, failed = score_tracks(jobs, scores, num_workers=num_workers, progress=progress)
    for stale in set(scores.glob("*.json")) - set(done):
        stale.unlink()
    write_json(
        summary,
        {
            "format": _FORMAT,
            "version": 1,
            "kind": estimator.kind,
            "wiener": estimator.wiener,
            "split": split,
            "shards": str(shards.folder.resolve()),
            "audio": audio,
            "num_tracks": len(done),
            "failed": [list(failure) for failure in failed],
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
            shards.read_audio(track, 0)  # raises, and says what to do
        stored = files[track.shard].tracks[track.position]
        digests.append([track.name, *stored.datasets["audio"].sha256, *stored.audio_scale])
    return fingerprint([list(shards.layout.sources), sorted(digests)])


def _choose_num_workers(
    sources: Sequence[str], num_channels: int, tracks: Sequence[TrackRecord]
) -> int:
    longest = max(track.num_samples for track in tracks)
    peak_bytes = _SEPARATION_BYTES + predict_peak_bytes(len(sources), num_channels, longest)
    available_bytes = peak_bytes
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available_bytes = int(line.split()[1]) * 1024
    num_cores = len(os.sched_getaffinity(0))
    return max(1, min(num_cores, available_bytes // peak_bytes, len(tracks)))


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A finished evaluation.

    Attributes
    ----------
    label : str
        The folder as the user named it.
    name : str or None
        The name of the row that the user wants it in.
    folder : Path
        Of the evaluation.
    summary : dict
        Its ``evaluation.json``.
    """

    label: str
    name: str | None
    folder: Path
    summary: dict[str, Any]

    @property
    def config(self) -> TrainConfig:
        """Of the run's training."""
        return TrainConfig.from_json(self.summary["config"])


def read_evaluation(folder: Path, *, kind: str, name: str | None = None) -> Evaluated:
    """Read what ``evaluation.json`` says.

    Parameters
    ----------
    folder : Path
        A run folder, or the folder given to ``--floor`` or ``--oracle``.
    kind : {'run', 'floor', 'oracle'}
        What is expected there.
    name : str, optional
        Of the row in a comparison.

    Raises
    ------
    EvaluationError
        If there is no evaluation of that kind.
    """
    place = Run(folder).evaluation if kind == "run" else folder
    path = place / "evaluation.json"
    option = folder if kind == "run" else f"--{kind} {folder}"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if summary["format"] != _FORMAT or summary["version"] != 1:
            raise ValueError(f"format {summary['format']!r} version {summary['version']!r}")
        found = summary["kind"]
    except FileNotFoundError as error:
        raise EvaluationError(
            f"{place}: not evaluated; run flsep-train evaluate {option} SHARDS"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: not readable ({error}); evaluate again") from error
    if found != kind:
        raise EvaluationError(f"{path}: holds scores of the {found}, expected the {kind}")
    return Evaluated(str(folder), name, place, summary)
