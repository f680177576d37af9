"""What a run makes of the outcomes of its tasks; bugs against expected failures, by the command."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import soundfile

from flsep.cache.errors import CacheError, FlsepError
from flsep.pipeline.errors import TrackError
from flsep.pipeline.execution.lock import CONFIG_NAME
from flsep.pipeline.execution.stage import Stage, Summary, TaskReport, run_stage

RATE_HZ = 16000
OPTIONS = ["--sample-rate", str(RATE_HZ), "--n-fft", "512", "--hop", "128", "--sources", "a,b"]

# Run before the command, and again in each worker: the third track meets a bug.
PLANT = """
from flsep.pipeline.shards import track

decode = track.decode


def planted(source, **options):
    if source.path.parent.name == "t2":
        list(zip([1], [1, 2], strict=True))
    return decode(source, **options)


def dask_setup(worker=None):
    track.decode = planted
"""


class Task(NamedTuple):
    name: str
    num_bytes: int = 1


@pytest.fixture
def fill(tmp_path: Path) -> Callable[..., Summary]:
    """Run a stage of three tasks; the error is raised by the second."""

    def fill(error: Exception | None = None, *, is_part: bool = False, **fields: Any) -> Summary:
        def run_task(task: Task) -> TaskReport:
            if error is not None and task.name == "b":
                raise error
            kept = task.name == "c"
            return TaskReport(task.name, 2, 3.0, kept=kept, found=None if kept else "cut")

        stage = Stage(
            folder=tmp_path / "out",
            config={"n": 1},
            run_task=run_task,
            items_of=lambda task: [f"{task.name}1", f"{task.name}2"],
            write_index=lambda names: (tmp_path / "index").write_text(" ".join(names)),
            rejected=[("z", "planned without")],
            **fields,
        )
        return run_stage(stage, [Task("c"), Task("b"), Task("a")], is_part=is_part)

    return fill


def test_reports_are_summed_and_indexed(fill: Callable[..., Summary], tmp_path: Path) -> None:
    summary = fill()
    assert (summary.num_made, summary.num_kept, summary.audio_seconds) == (4, 2, 6.0)
    assert summary.failed == [("z", "planned without")]
    assert summary.renewed == ["cut", "cut"]
    assert (tmp_path / "index").read_text() == "a b c"
    assert (tmp_path / "out" / CONFIG_NAME).exists()


def test_an_expected_failure_is_that_tasks_alone(
    fill: Callable[..., Summary], tmp_path: Path
) -> None:
    summary = fill(FlsepError("no"))
    assert summary.failed == [("b1", "no"), ("b2", "no"), ("z", "planned without")]
    assert (tmp_path / "index").read_text() == "a c"


def test_parts_and_incomplete_folders_have_no_index(
    fill: Callable[..., Summary], tmp_path: Path
) -> None:
    assert fill(is_part=True).failed == []
    assert fill(FlsepError("no"), needs_all=True).num_made == 2
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("error", [OSError(28, "full"), ValueError("bug"), CacheError("cut")])
def test_what_all_tasks_would_meet_ends_the_run(
    fill: Callable[..., Summary], tmp_path: Path, error: Exception
) -> None:
    with pytest.raises(type(error)) as caught:
        fill(error, stops_at=(CacheError,))
    assert caught.value is error
    assert not (tmp_path / "index").exists()


def test_a_track_error_survives_the_way_from_a_worker() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(TrackError("x", "too short")))
    assert (error.track, error.reason, str(error)) == ("x", "too short", "x: too short")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for number in range(4):
        folder = tmp_path / "corpus" / "train" / f"t{number}"
        folder.mkdir(parents=True)
        rng = np.random.default_rng(number)
        for name in ("a", "b", "mixture"):
            waveform = rng.uniform(-0.4, 0.4, (2 * RATE_HZ, 2))
            if number == 3:
                waveform[100] = np.nan
            soundfile.write(folder / f"{name}.wav", waveform, RATE_HZ, "FLOAT")
    return tmp_path / "corpus"


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_bug_in_a_task_shows_its_traceback(
    corpus: Path, tmp_path: Path, tiny_teacher: Path, workers: str
) -> None:
    (tmp_path / "plant.py").write_text(PLANT)
    program = "import plant; from flsep.pipeline.cli import main; plant.dask_setup(); main()"
    arguments = ["run", str(corpus), str(tmp_path / "s"), "--teacher", str(tiny_teacher), *OPTIONS]
    process = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--workers", workers],
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "DASK_DISTRIBUTED__WORKER__PRELOAD": str(tmp_path / "plant.py"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 70, process.stderr
    assert "Traceback" in process.stderr
    assert "in planted" in process.stderr  # where it happened, also on a worker
    assert "zip() argument 2 is longer than argument 1" in process.stderr
    records = [path.read_text() for path in (tmp_path / "s").glob("*.failed.json")]
    assert not any("t2" in text for text in records)
    assert not (tmp_path / "s" / "index.json").exists()


def test_a_bad_track_is_rejected_alone(corpus: Path, tmp_path: Path, tiny_teacher: Path) -> None:
    program = "from flsep.pipeline.cli import main; main()"
    arguments = ["run", str(corpus), str(tmp_path / "s"), "--teacher", str(tiny_teacher), *OPTIONS]
    process = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--workers", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1, process.stderr
    assert "stored   3 tracks" in process.stdout
    assert "t3: " in process.stderr
    assert "Traceback" not in process.stderr
