import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flsep.cache import CacheError, Layout, Shards
from flsep.trainer.config import TrainConfig
from flsep.trainer.errors import CheckpointError, EvaluationError
from flsep.trainer.runs.folder import Run
from flsep.trainer.scoring.estimators import (
    Estimator,
    IdealRatioMask,
    LoadTrack,
    MixtureEstimator,
    TrainedModel,
)
from flsep.trainer.scoring.evaluation import Evaluated, describe_run, evaluate, read_evaluation
from flsep.trainer.scoring.museval_engine import Museval
from flsep.trainer.study.rows import compare_evaluations
from flsep.trainer.training.loop import fit
from flsep.trainer.training.state import Training


@pytest.fixture(scope="module")
def runs(
    tiny: Callable[..., TrainConfig], shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Run]:
    """One trained epoch of some approaches."""
    made = {}
    for name in ("none", "concat"):
        run = made[name] = Run(tmp_path_factory.mktemp(name))
        config = tiny(f"approach.name={name}", "fit.epochs=1")
        training = Training(config, Shards(shards), device=torch.device("cpu"), num_workers=0)
        fit(training, run, report=lambda line: None)
    return made


def load(estimator: Estimator, shards: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    opened = Shards(shards)
    (track,) = (track for track in opened.tracks("test") if track.name == name)
    # It goes to another process.
    job: LoadTrack = pickle.loads(pickle.dumps(LoadTrack(estimator, opened, track)))
    return job()


def test_the_floor_is_the_mixture(shards: Path, tracks: dict[str, tuple[str, np.ndarray]]) -> None:
    references, estimates = load(MixtureEstimator(), shards, "six")
    waveforms = tracks["six"][1].transpose(0, 2, 1)
    np.testing.assert_allclose(references, waveforms[1:], atol=1e-4)
    for estimate in estimates:
        np.testing.assert_allclose(estimate, waveforms[0], atol=1e-4)


def test_the_oracle_is_nearly_right(shards: Path) -> None:
    references, estimates = load(IdealRatioMask(), shards, "six")
    assert np.square(estimates - references).sum() < 0.01 * np.square(references).sum()


@pytest.mark.parametrize("approach", ["none", "concat"])
def test_a_run_separates_what_the_shards_hold(
    runs: dict[str, Run], shards: Path, approach: str
) -> None:
    from flsep.trainer.inference.separate import TrackSeparator

    best = runs[approach].best
    references, estimates = load(TrainedModel(best), shards, "five")
    assert estimates.shape == references.shape == (3, 20_000, 2)
    opened = Shards(shards)
    track = opened.tracks("test")[0]
    separator = TrackSeparator(best, device=torch.device("cpu"))
    embeddings = opened.read(track, "embedding", 0) if approach == "concat" else None
    (expected,) = separator.separate([opened.read_audio(track, 0)], embeddings)
    np.testing.assert_array_equal(estimates, expected.transpose(0, 2, 1))


def test_estimates_go_by_the_content_of_the_checkpoint(
    runs: dict[str, Run], tmp_path: Path
) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(runs["none"].best.read_bytes())
    identity = TrainedModel(runs["none"].best).identity()
    assert TrainedModel(copy).identity() == identity
    others = [
        TrainedModel(copy, wiener=True),
        TrainedModel(runs["concat"].best),
        MixtureEstimator(),
        IdealRatioMask(),
    ]
    assert len({identity, *(other.identity() for other in others)}) == 5


@pytest.fixture
def quick_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare museval; tests/trainer/test_cli.py runs it for real."""

    def score(
        self: Museval, references: np.ndarray, estimates: np.ndarray, **options: Any
    ) -> dict[str, Any]:
        assert references.shape == estimates.shape
        targets = [{"name": source, "frames": []} for source in options["sources"]]
        return {"targets": targets}

    monkeypatch.setattr(Museval, "score", score)


def run_evaluate(estimator: Estimator, shards: Path, folder: Path, **changes: Any) -> Any:
    options: dict[str, Any] = {
        "split": "test",
        "num_workers": 0,
        "progress": False,
        "description": {},
    }
    return evaluate(estimator, Shards(shards), folder, **{**options, **changes})


@pytest.mark.usefixtures("quick_scores")
def test_an_evaluation_is_complete_and_kept(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, failed = run_evaluate(MixtureEstimator(), shards, tmp_path)
    assert failed == []
    assert [json.loads(path.read_text())["track"] for path in done] == ["five", "six"]
    summary = json.loads((tmp_path / "evaluation.json").read_text())
    assert (summary["kind"], summary["split"], summary["num_tracks"]) == ("floor", "test", 2)
    assert summary["engine"] == json.loads(done[0].read_text())["engine"] == "museval"
    times = [path.stat().st_mtime_ns for path in done]
    (tmp_path / "scores" / "old.json").write_text("{}")
    again, _ = run_evaluate(MixtureEstimator(), shards, tmp_path)
    assert [path.stat().st_mtime_ns for path in again] == times
    assert sorted((tmp_path / "scores").iterdir()) == sorted(done)

    # Interrupted, there is no summary: nothing can be compared with half an evaluation.
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flsep.trainer.scoring.evaluation.score_tracks", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_evaluate(MixtureEstimator(), shards, tmp_path)
    with pytest.raises(EvaluationError, match="not evaluated; run flsep-train evaluate --floor"):
        read_evaluation(tmp_path, kind="floor")


@pytest.mark.usefixtures("quick_scores")
def test_a_track_that_fails_is_named(
    runs: dict[str, Run], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = LoadTrack.__call__

    def fail(self: LoadTrack) -> Any:
        if self.track.name == "five":
            raise CacheError("no such audio")
        return inner(self)

    monkeypatch.setattr(LoadTrack, "__call__", fail)
    done, failed = run_evaluate(MixtureEstimator(), shards, tmp_path)
    assert len(done) == 1
    assert [failure[:2] for failure in failed] == [("five", "no such audio")]
    assert json.loads((tmp_path / "evaluation.json").read_text())["failed"] == [
        ["five", "no such audio"]
    ]


def test_splits_that_cannot_be_scored(
    shards: Path, new_shards: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CacheError, match=r"has no audio in .* --audio-splits naming 'valid'"):
        run_evaluate(MixtureEstimator(), shards, tmp_path, split="valid")
    folder = new_shards(tmp_path / "s", {"a": ("train", 1.0)})
    with pytest.raises(EvaluationError, match="no track in the split 'test'"):
        run_evaluate(MixtureEstimator(), folder, tmp_path / "out")


def test_a_run_on_other_data_is_refused(runs: dict[str, Run], layout: Layout) -> None:
    assert describe_run(runs["none"].best, layout)["epoch"] == 1
    with pytest.raises(CheckpointError, match="trained with sources drums, bass, vocals"):
        describe_run(runs["none"].best, replace(layout, sources=("a", "b")))
    other = replace(layout, teacher_digest="1" * 64)
    describe_run(runs["none"].best, other)
    with pytest.raises(CheckpointError, match="trained with teacher_digest"):
        describe_run(runs["concat"].best, other)


@pytest.fixture
def evaluated(tmp_path: Path, tiny: Callable[..., TrainConfig]) -> Callable[..., Evaluated]:
    """Write scores without museval: every frame of every source has the same SDR."""

    def make(
        folder: str,
        *settings: str,
        kind: str = "run",
        sdr: float = 1.0,
        name: str | None = None,
        **changes: Any,
    ) -> Evaluated:
        place = tmp_path / folder / "evaluation" if kind == "run" else tmp_path / folder
        (place / "scores").mkdir(parents=True)
        metrics = {"SDR": sdr, "SIR": 0.0, "ISR": 0.0, "SAR": 0.0}
        frames = [{"time": t, "duration": 1, "metrics": metrics} for t in range(2)]
        targets = [{"name": source, "frames": frames} for source in ("drums", "bass")]
        scores = {"targets": targets, "track": "t", "sample_rate_hz": 1, "num_samples": 2}
        (place / "scores" / "t.json").write_text(json.dumps(scores))
        summary = {
            "format": "flsep-evaluation",
            "version": 1,
            "kind": kind,
            "wiener": False,
            "split": "test",
            "shards": "s",
            "audio": "a",
            "config": tiny(*settings).to_json(),
            "fingerprint": "f",
            **changes,
        }
        (place / "evaluation.json").write_text(json.dumps(summary))
        return read_evaluation(tmp_path / folder, kind=kind, name=name)

    return make


def test_rows_are_named_after_what_differs(evaluated: Callable[..., Evaluated]) -> None:
    floor = evaluated("floor", kind="floor", sdr=0.0)
    oracle = evaluated("oracle", kind="oracle", sdr=9.0)
    runs = [
        evaluated("a", sdr=2.0),
        evaluated("b", "fit.seed=1", sdr=4.0),
        evaluated("c", "approach.name=distance"),
        evaluated("d", "approach.name=distance", "approach.teacher_signal=stems"),
        evaluated("e", "approach.name=distance", "approach.weight=2", name="heavy"),
        evaluated("f", wiener=True),
    ]
    comparison = compare_evaluations(runs, floor=floor, oracle=oracle)
    rows = {entry.approach: entry for entry in comparison.entries}
    assert list(rows) == [
        "mixture", "none", "distance", "distance stems", "heavy", "none +wiener",
        "ideal ratio mask",
    ]  # fmt: skip
    assert rows["none"].seeds == (0, 1)
    assert rows["none"].improvement_db == 3.0
    assert rows["heavy"].difference_to_none_db == -2.0
    assert rows["ideal ratio mask"].improvement_db == 9.0


def test_mixing_is_named_only_if_it_differs(evaluated: Callable[..., Evaluated]) -> None:
    floor = evaluated("floor", kind="floor")
    random = evaluated("a", "data.mixing=random")
    names = [e.approach for e in compare_evaluations([random], floor=floor, oracle=None).entries]
    assert names == ["mixture", "none"]
    both = [random, evaluated("b")]
    names = [e.approach for e in compare_evaluations(both, floor=floor, oracle=None).entries]
    assert names == ["mixture", "none random", "none original"]


def test_what_cannot_be_compared_is_refused(evaluated: Callable[..., Evaluated]) -> None:
    floor = evaluated("floor", kind="floor")
    run = evaluated("a")
    for other, message in (
        (evaluated("b", audio="other"), "b and .*floor were scored on different audio"),
        (evaluated("c", split="valid"), "different audio .splits valid and test"),
        (
            evaluated("d", "fit.seed=1", "optim.learning_rate=1"),
            r"both 'none' but differ in optim.learning_rate \(0.001, 1.0\): name one apart",
        ),
        (evaluated("e", "fit.seed=1", fingerprint="g"), "shards of different configurations"),
        (evaluated("f"), "both approach 'none' with seed 0"),
        (
            evaluated("g", engine="toy"),
            r"g and .*floor were scored with different engines .toy and m",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            compare_evaluations([run, other], floor=floor, oracle=None)


def test_evaluations_that_are_not_there(
    evaluated: Callable[..., Evaluated], tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match=r"not evaluated; run flsep-train evaluate .*/x SH"):
        read_evaluation(tmp_path / "x", kind="run")
    evaluated("floor", kind="floor")
    with pytest.raises(EvaluationError, match="holds scores of the floor, expected the oracle"):
        read_evaluation(tmp_path / "floor", kind="oracle")
    summary = tmp_path / "floor" / "evaluation.json"
    for text, message in {
        "{": "Expecting property name",
        "[]": "no JSON object",
        '{"format": "x"}': "format 'x' version None; expected 'flsep-evaluation' version 1",
        summary.read_text().replace('"split"', '"splat"'): "lacks split",
    }.items():
        summary.write_text(text)
        with pytest.raises(EvaluationError, match=rf"not readable \({message}.* evaluate again"):
            read_evaluation(tmp_path / "floor", kind="floor")
    with pytest.raises(EvaluationError, match=r"lacks config.approach.name, config.data.mixing"):
        evaluated("run", config={"fit": {"seed": 1}})


def test_runs_of_any_configuration_are_compared(evaluated: Callable[..., Evaluated]) -> None:
    """An approach or a separator that this flsep does not know has fields of its own."""
    floor = evaluated("floor", kind="floor")

    def config(seed: int, **fields: Any) -> dict[str, Any]:
        return {
            "approach": {"name": "own", **fields},
            "data": {"mixing": "random"},
            "fit": {"seed": seed},
        }

    first = evaluated("a", config=config(0))
    comparison = compare_evaluations(
        [first, evaluated("b", config=config(1))], floor=floor, oracle=None
    )
    assert comparison.entries[1].seeds == (0, 1)
    assert comparison.entries[1].approach == "own"
    other = evaluated("c", config=config(1, depth=3))
    with pytest.raises(EvaluationError, match=r"differ in approach.depth \(None, 3\): name one"):
        compare_evaluations([first, other], floor=floor, oracle=None)


def test_an_evaluation_of_an_earlier_flsep_is_in_the_row_of_a_new_one(
    evaluated: Callable[..., Evaluated], tiny: Callable[..., TrainConfig]
) -> None:
    """Configurations did not name the separator, and gave each approach the fields of all."""
    floor = evaluated("floor", kind="floor")
    old = tiny("approach.name=distance").to_json()
    del old["separator"]["name"]
    old["approach"] |= {"temperature": 0.1, "projection_size": 128}
    new = evaluated("new", "approach.name=distance", "fit.seed=1")
    comparison = compare_evaluations([evaluated("old", config=old), new], floor=floor, oracle=None)
    assert comparison.entries[1].seeds == (0, 1)


def test_comparing_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "import flsep.trainer.scoring.evaluation, flsep.trainer.study.rows\n"
        "import flsep.trainer.study.tables\n"
        "assert not {'torch', 'flsep.trainer.config', 'museval'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
