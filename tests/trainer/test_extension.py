"""A separator, an approach and a scoring engine from outside, through the commands.

`toys.py` holds them. Nothing ties them to flsep but their lines in the registry.
"""

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import toys
from click.testing import CliRunner, Result

from flsep.trainer import registry
from flsep.trainer.cli import main

SETTINGS = (
    "data.excerpt_seconds=0.7",
    "data.excerpts_per_track=3",
    "data.batch_size=2",
    "fit.epochs=4",
    "optim.learning_rate=0.1",
)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run flsep-train with the toys registered."""
    monkeypatch.setitem(registry.SEPARATORS, "toy", "toys:ToySeparator")
    monkeypatch.setitem(registry.APPROACHES, "loudness", "toys:Loudness")
    monkeypatch.setitem(registry.ENGINES, "plain", "toys:PlainSDR")

    def run(*arguments: object, status: int = 0) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == status, result.output
        return result

    return run


@pytest.fixture
def teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a teacher in the place of the pipeline's: embeddings of six equal numbers."""

    class Teacher:
        info = SimpleNamespace(
            handle="tiny",
            digest="0" * 64,
            sample_rate_hz=8000,
            window_samples=2400,
            hop_samples=2400,
        )

        def __call__(self, waveform: np.ndarray) -> np.ndarray:
            return np.ones((len(waveform) // 2400, 6), np.float32)

        @classmethod
        def load(cls, handle: str) -> "Teacher":
            return cls()

    module = ModuleType("flsep.pipeline.teachers.loading")
    module.load_teacher = Teacher.load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flsep.pipeline.teachers.loading", module)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1")


def fit_options(*settings: str) -> list[str]:
    return [part for setting in (*SETTINGS, *settings) for part in ("--set", setting)]


@pytest.fixture
def run(command: Callable[..., Result], shards: Path, tmp_path: Path) -> Path:
    """A trained run of the toy separator with the toy approach."""
    folder = tmp_path / "run"
    result = command(
        *("fit", shards, "--run", folder, "--approach", "loudness", "--weight", "0.25"),
        *fit_options(
            "separator.name=toy",
            "separator.sharpness=2",
            "loss.floor=1e-5",
            "approach.dimensions=0,2",
        ),
    )
    assert "separator  toy masks; 0.00 M parameters" in result.output
    assert "approach   loudness of the mixture" in result.output
    return folder


def test_toys_train_and_resume(command: Callable[..., Result], run: Path, shards: Path) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config["separator"] == {"name": "toy", "sharpness": 2.0}
    assert config["approach"] == {
        "name": "loudness",
        "weight": 0.25,
        "dimensions": [0, 2],
    }
    assert config["loss"] == {"floor": 1e-5}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["valid"]["separation"] < lines[0]["valid"]["separation"]
    for line in lines:
        terms = line["train"]
        expected = terms["separation"] + 0.25 * terms["regularizer"]
        assert terms["total"] == pytest.approx(expected, rel=1e-5)
    command("fit", shards, "--run", run, "--resume", "--set", "fit.epochs=5")
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.usefixtures("teacher")
def test_toys_separate(
    command: Callable[..., Result],
    run: Path,
    tracks: dict[str, tuple[str, np.ndarray]],
    tmp_path: Path,
) -> None:
    mixture = tracks["five"][1][0]
    soundfile.write(tmp_path / "song.wav", mixture.T, 8000, subtype="FLOAT")
    command("separate", run, tmp_path / "song.wav", tmp_path / "out")
    names = ("drums", "bass", "vocals")
    estimates = [soundfile.read(tmp_path / "out/song" / f"{name}.wav")[0] for name in names]
    # The masks of the sources add up to one.
    np.testing.assert_allclose(sum(estimates), mixture.T, atol=1e-5)


def test_toys_score_and_compare(
    command: Callable[..., Result], run: Path, shards: Path, tmp_path: Path
) -> None:
    floor = tmp_path / "floor"
    command(
        *("evaluate", run, shards, "--floor", floor, "--engine", "plain", "--workers", "0"),
    )
    summary = json.loads((run / "evaluation/evaluation.json").read_text())
    assert summary["engine"] == "plain"
    table = command("compare", run, "--floor", floor).output
    (row,) = [line for line in table.splitlines() if line.startswith("loudness  ")][:1]
    assert float(row.split()[2]) > 0  # better than -3 dB, the floor of three sources alike


def test_a_bug_of_an_engine_is_shown_and_costs_no_other_run(
    command: Callable[..., Result],
    run: Path,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    score = toys.PlainSDR.score

    def fail_for_the_run(self: toys.PlainSDR, references: Any, estimates: Any, **how: Any) -> Any:
        if estimates[0].any() and not (estimates[0] == estimates[1]).all():
            return {}["gain"]
        return score(self, references, estimates, **how)

    monkeypatch.setattr(toys.PlainSDR, "score", fail_for_the_run)
    floor = tmp_path / "floor"
    failed = command(
        *("evaluate", run, shards, "--floor", floor, "--engine", "plain", "--workers", "0"),
        status=70,
    )
    assert "a bug in flsep, KeyError: 'gain'" in failed.stderr
    assert "in fail_for_the_run" in failed.stderr
    assert (floor / "evaluation.json").exists()


@pytest.mark.parametrize("table", ["SEPARATORS", "APPROACHES", "ENGINES"])
def test_what_is_registered_has_the_name_of_its_entry(table: str) -> None:
    entries = getattr(registry, table)
    for name in entries:
        entry = registry.load(entries, name, "entry")
        assert (entry.name if table == "ENGINES" else entry.Config().name) == name


def test_only_their_own_fields_are_known(
    command: Callable[..., Result], shards: Path, tmp_path: Path
) -> None:
    options = ("fit", shards, "--run", tmp_path / "run", *fit_options("separator.name=toy"))
    refused = command(*options, "--set", "separator.hidden_size=8", status=1)
    message = "section 'separator' of 'toy' has no field 'hidden_size'; choose from sharpness"
    assert message in refused.stderr
    refused = command(*options, "--set", "loss.time_weight=1", status=1)
    assert "section 'loss' has no field 'time_weight'; choose from floor" in refused.stderr
    refused = command(*options, "--approach", "distance", "--teacher-signal", "stems", status=1)
    assert "compares the latent 'sources', and the separator toy has 'shared'" in refused.stderr
    refused = command(
        *(*options, "--approach", "loudness", "--set", "approach.dimensions=0,x"), status=1
    )
    assert "'approach.dimensions=0,x': 'x' is not a whole number" in refused.stderr
    refused = command(*options, "--set", "separator.sharpness=0", status=1)
    assert "separator.sharpness is 0.0; expected > 0" in refused.stderr
    assert not (tmp_path / "run").exists()
