"""Score what a run, or no model at all, makes of a split of the shards; compare the scores.

Each track is separated by the process that scores it: museval takes far longer than the model, and
nothing but the scores has to be stored. An evaluation is a folder with ``evaluation.json``, which
says what was scored, and ``scores/``, one JSON file a track in museval's format.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flsep.cache import Layout, ShardFile, Shards, TrackRecord, write_json
from flsep.cache.format import fingerprint
from flsep.trainer.comparison import Comparison, Scores, compare_scores
from flsep.trainer.config import TrainConfig, list_differences
from flsep.trainer.runs import Run
from flsep.trainer.scoring import Failure, TrackJob, predict_peak_bytes, score_tracks

_FORMAT = "flsep-evaluation"
# What a process needs to separate a track before museval starts: torch, the model, a chunk.
_SEPARATION_BYTES = 1 << 30

Audio = tuple[NDArray[np.float32], NDArray[np.float32]]


class EvaluationError(ValueError):
    """Something that cannot be evaluated or compared."""


@dataclass(frozen=True, slots=True)
class Estimator:
    """What makes the estimates.

    Attributes
    ----------
    kind : {'run', 'floor', 'oracle'}
        A trained model, the mixture as every estimate, or the ideal ratio mask.
    checkpoint : Path or None
        Of a run.
    wiener : bool
        Refine a run's estimates with a Wiener filter.
    """

    kind: Literal["run", "floor", "oracle"]
    checkpoint: Path | None = None
    wiener: bool = False

    def identity(self) -> str:
        """Identify the estimates: by the content of the checkpoint, not by its place."""
        digest = None
        if self.checkpoint is not None:
            with open(self.checkpoint, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        return fingerprint([self.kind, digest, self.wiener])


@dataclass(frozen=True, slots=True)
class LoadTrack:
    """Read a track's audio from the shards and estimate its sources; called where it is scored."""

    estimator: Estimator
    shards: Shards
    track: TrackRecord

    def __call__(self) -> Audio:
        """Return references and estimates, float32 [source, sample, channel]."""
        shards = self.shards
        mixture, *sources = (
            shards.read_audio(self.track, signal).T for signal in range(len(shards.layout.signals))
        )
        references = np.stack(sources)
        if self.estimator.kind == "floor":
            return references, np.broadcast_to(mixture, references.shape)
        if self.estimator.kind == "oracle":
            from flsep.trainer.references import oracle_irm

            layout = shards.layout
            return references, oracle_irm(
                references, mixture, n_fft=layout.n_fft, hop=layout.hop_samples
            )
        return references, self._separate(shards, mixture)

    def _separate(self, shards: Shards, mixture: NDArray[np.float32]) -> NDArray[np.float32]:
        import torch

        from flsep.trainer.inference import TrackSeparator

        assert self.estimator.checkpoint is not None
        torch.set_num_threads(1)
        separator = TrackSeparator(
            self.estimator.checkpoint, device=torch.device("cpu"), wiener=self.estimator.wiener
        )
        embeddings = shards.read(self.track, "embedding", 0) if separator.needs_teacher else None
        blocks = list(separator.separate([mixture.T], embeddings))
        return np.concatenate(blocks, axis=2).transpose(0, 2, 1)


def describe_run(checkpoint: Path, layout: Layout) -> dict[str, Any]:
    """Return what ``evaluation.json`` says of a run.

    Raises
    ------
    CheckpointError
        If the checkpoint is unusable, or was trained on data of another kind than `layout`.
    """
    from flsep.trainer.checkpoint import load_checkpoint, require_same_data

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


def compare_evaluations(
    runs: Sequence[Evaluated], *, floor: Evaluated, oracle: Evaluated | None
) -> Comparison:
    """Compare evaluated runs in one table.

    Runs make one row of seeds where their configurations differ in the seed alone. Rows are named
    after the approach; after the teacher's signal too if it is the stems, after the mixing if
    the runs differ in it, after the Wiener filter, or as the user says.

    Raises
    ------
    EvaluationError
        If they were not scored on the same audio, or two runs of one name differ in more.
    ComparisonError
        As `compare_scores`.
    """
    members = [*runs, floor, *([oracle] if oracle else [])]
    for member in members:
        if (member.summary["audio"], member.summary["split"]) != (
            floor.summary["audio"],
            floor.summary["split"],
        ):
            raise EvaluationError(
                f"{member.label} and {floor.label} were scored on different audio (splits "
                f"{member.summary['split']} and {floor.summary['split']} of "
                f"{member.summary['shards']} and {floor.summary['shards']}); "
                "evaluate both on the same shards"
            )
    mixings = {run.config.data.mixing for run in runs}
    rows: dict[str, Evaluated] = {}
    scores = []
    for run in runs:
        row = run.name or _name_row(run, with_mixing=len(mixings) > 1)
        _require_alike(rows.setdefault(row, run), run, row)
        scores.append(
            Scores(
                label=run.label,
                approach=row,
                seed=run.config.fit.seed,
                folder=run.folder / "scores",
            )
        )
    return compare_scores(
        scores,
        floor=_as_scores(floor, "mixture"),
        oracle=_as_scores(oracle, "ideal ratio mask") if oracle else None,
    )


def _as_scores(evaluated: Evaluated, name: str) -> Scores:
    return Scores(
        label=evaluated.label, approach=name, seed=None, folder=evaluated.folder / "scores"
    )


def _name_row(run: Evaluated, *, with_mixing: bool) -> str:
    config = run.config
    name: str = config.approach.name
    if name != "none" and config.approach.teacher_signal == "stems":
        name += " stems"
    if with_mixing:
        name += f" {config.data.mixing}"
    return name + (" +wiener" if run.summary["wiener"] else "")


def _require_alike(first: Evaluated, other: Evaluated, row: str) -> None:
    differences = list_differences(first.config, other.config)
    differences.pop("fit.seed", None)
    for name, (old, new) in differences.items():
        raise EvaluationError(
            f"{first.label} and {other.label} are both {row!r} but differ in {name} "
            f"({old}, {new}): name one apart, e.g. 'other {row}={other.label}'"
        )
    if first.summary["fingerprint"] != other.summary["fingerprint"]:
        raise EvaluationError(
            f"{first.label} and {other.label} are both {row!r} but were trained on shards of "
            f"different configurations: name one apart, e.g. 'other {row}={other.label}'"
        )
