"""Compute what shards hold again from the corpus, and compare."""

import tempfile
from collections import defaultdict
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from flsep.cache import Index, ShardFile, TrackRecord, read_index
from flsep.pipeline.config import FeatureConfig
from flsep.pipeline.corpus.tracks import find_corpus
from flsep.pipeline.errors import TeacherError
from flsep.pipeline.shards.build import ShardSettings, make_shard
from flsep.pipeline.shards.plan import Plan, PlannedTrack, ShardTask, stored_samples
from flsep.pipeline.teachers.teacher import Teacher, resolve

TOLERANCE = 2e-3
"""Largest difference, relative to the largest value, that rounding may make: float16 has 1e-3."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of one shard.

    Attributes
    ----------
    name : str
        The shard's file name.
    num_entries : int
        Signals of datasets that were compared.
    num_rounded : int
        How many of them are equal but for rounding; the others are so bit for bit.
    problems : tuple of str
        What is not equal.
    """

    name: str
    num_entries: int
    num_rounded: int
    problems: tuple[str, ...]


def plan_recheck(
    folder: Path, corpus: Path, teacher: str | None = None
) -> tuple[Plan, ShardSettings, list[str]]:
    """Find the stored tracks in a corpus again.

    Parameters
    ----------
    folder : Path
        Of the shards.
    corpus : Path
        That they were made from.
    teacher : str, optional
        Handle; by default the one that the shards name.

    Returns
    -------
    plan : Plan
        A task for each shard that can be compared.
    settings : ShardSettings
        Those that the shards were made with.
    problems : list of str
        Tracks that the corpus does not have, or has in another length.

    Raises
    ------
    ValueError
        If the corpus or the teacher cannot be used, or the teacher is another one.
    CacheError
        If the index cannot be used.
    """
    index = read_index(folder)
    config = _read_config(index)
    found = find_corpus(
        corpus.absolute(),
        sources=index.layout.sources,
        valid_fraction=config.valid_fraction,
        test_fraction=config.test_fraction,
        seed=config.seed,
        num_channels=config.num_channels,
    )
    handle = teacher or index.layout.teacher
    info = Teacher.load(handle).info
    if info.digest != index.layout.teacher_digest:
        raise TeacherError(
            f"--teacher {handle}: has the digest {info.digest[:12]}, the shards were made with "
            f"{index.layout.teacher_digest[:12]}; name that one"
        )
    tracks = {track.name: track for track in found.tracks}
    reasons = dict(found.rejected)
    shards: defaultdict[str, list[TrackRecord]] = defaultdict(list)
    for record in index.tracks:
        shards[record.shard].append(record)
    tasks, problems = [], []
    for name, records in shards.items():
        bad = []
        for record in records:
            if record.name not in tracks:
                reason = reasons.get(record.name, "it is not in the corpus")
                bad.append(f"{folder / name}: track {record.name!r}: {reason}")
            elif (length := stored_samples(found.infos[record.name], config)) != record.num_samples:
                bad.append(
                    f"{folder / name}: track {record.name!r} has {record.num_samples} samples, "
                    f"{length} in the corpus"
                )
        if not bad:
            planned = tuple(
                PlannedTrack(replace(tracks[r.name], split=r.split), r.num_samples)
                for r in sorted(records, key=lambda record: record.position)
            )
            tasks.append(ShardTask(name, planned, index.shard_bytes[name]))
        problems += bad
    settings = ShardSettings(
        folder=folder.absolute(),
        config=config,
        sources=index.layout.sources,
        teacher=info,
        teacher_folder=resolve(handle).absolute(),
        num_threads=None,
    )
    return Plan(tuple(tasks), rejected=()), settings, problems


def _read_config(index: Index) -> FeatureConfig:
    names = {field.name for field in fields(FeatureConfig)}
    values = {name: value for name, value in index.config.items() if name in names}
    return FeatureConfig(**{**values, "audio_splits": tuple(values["audio_splits"])})


def recheck_shard(task: ShardTask, settings: ShardSettings) -> Comparison:
    """Make a shard again in a temporary folder and compare it with the stored one.

    Raises
    ------
    CacheError
        If the stored shard cannot be read.
    OSError
        If the temporary folder has no room.
    """
    stored = ShardFile(settings.folder / task.name)
    with tempfile.TemporaryDirectory(prefix="flsep-") as folder:
        report = make_shard(task, replace(settings, folder=Path(folder)))
        if report.rejected:
            problems = (f"{stored.path}: track {name!r}: {why}" for name, why in report.rejected)
            return Comparison(task.name, 0, 0, tuple(problems))
        return _compare(stored, ShardFile(Path(folder) / task.name))


def _compare(stored: ShardFile, again: ShardFile) -> Comparison:
    num_entries = num_rounded = 0
    problems = []
    for position, (old, new) in enumerate(zip(stored.tracks, again.tracks, strict=True)):
        for name, dataset in old.datasets.items():
            for entry, digest in enumerate(dataset.sha256):
                num_entries += 1
                if digest == new.datasets[name].sha256[entry]:
                    continue
                difference = _difference(
                    stored.read(position, name, entry, verify=True),
                    again.read(position, name, entry, verify=False),
                )
                if difference <= TOLERANCE:
                    num_rounded += 1
                else:
                    problems.append(
                        f"{stored.path}: {name}[{entry}] of track {old.name!r} differs from the "
                        f"corpus by {difference:.2g} of its largest value"
                    )
    return Comparison(stored.path.name, num_entries, num_rounded, tuple(problems))


def _difference(old: np.ndarray[Any, Any], new: np.ndarray[Any, Any]) -> float:
    """Return the largest difference of two arrays, relative to the largest value in the first."""
    largest = most = 0.0
    for row_old, row_new in zip(old, new, strict=True):  # a row at a time: arrays may be large
        wide = row_old.astype(np.float64)
        largest = max(largest, float(np.abs(wide).max()))
        most = max(most, float(np.abs(wide - row_new.astype(np.float64)).max()))
    return most / max(largest, np.finfo(np.float64).tiny)
