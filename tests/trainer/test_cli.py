"""Every command for real: its result, its refusals, its interruptions."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from click.testing import CliRunner, Result

from flsep.trainer.cli import main
from flsep.trainer.runs.checkpoint import load_checkpoint
from flsep.trainer.training import loop
from flsep.trainer.training.state import Training

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def tiny_settings(tiny: Callable[..., Any]) -> list[str]:
    """``--set`` for everything in which a tiny training differs from the default."""
    from flsep.trainer.config import TrainConfig, list_differences

    changed = list_differences(TrainConfig(), tiny())
    return [part for name, (_, new) in changed.items() for part in ("--set", f"{name}={new}")]


@pytest.fixture
def command(shards: Path, mixes: Path, tmp_path: Path, tiny_settings: list[str]) -> Run:
    """Run flsep-train; in arguments, SHARDS and MIXES are tiny ones, TINY a tiny training."""

    def run(line: str) -> Result:
        arguments: list[str] = []
        for word in shlex.split(line):
            if word == "TINY":
                arguments += tiny_settings
            else:
                word = word.replace("SHARDS", str(shards)).replace("MIXES", str(mixes))
                arguments.append(word.replace("TMP", str(tmp_path)))
        return CliRunner().invoke(main, arguments)

    return run


def assert_one_line(result: Result, message: str, status: int = 1) -> None:
    __tracebackhide__ = True
    assert result.exit_code == status, result.output
    (line,) = result.stderr.strip().splitlines()
    assert message in line


def test_help_comes_at_once_and_lists_every_command(command: Run) -> None:
    text = command("--help").output
    for name in ("fit", "separate", "evaluate", "compare"):
        assert f"\n  {name} " in text
        assert f"flsep-train {name} " in command(f"{name} --help").output
    assert command("--version").output.startswith("flsep-train, version ")


def test_help_is_up_to_date(command: Run) -> None:
    from flsep.trainer.approaches.contrastive import ContrastiveConfig
    from flsep.trainer.config import DataConfig, FitConfig

    text = " ".join(command("fit --help").output.split())
    for stated in (
        f"the regularizer (contrastive, distance). [default: {ContrastiveConfig().weight}]",
        f"Divisor of the similarities (contrastive). [default: {ContrastiveConfig().temperature}]",
        f"[default: {DataConfig().mixing}]",
        f"[default: {ContrastiveConfig().teacher_signal}]",
        f"Seed of weights, dropout and excerpts. [default: {FitConfig().seed}]",
    ):
        assert stated in text


def test_the_trainer_loads_neither_tensorflow_nor_dask(tmp_path: Path) -> None:
    code = (
        "import sys, flsep.trainer.cli\n"
        "assert 'torch' not in sys.modules, 'help must be fast'\n"
        "import pkgutil, importlib, flsep.trainer\n"
        "for module in pkgutil.walk_packages(flsep.trainer.__path__, 'flsep.trainer.'):\n"
        "    importlib.import_module(module.name)\n"
        "from pathlib import Path\n"
        "flsep.trainer.runs.folder.EventLog(Path(sys.argv[1]), 0).add(0, {'a': 1.0})\n"
        "unwanted = {'tensorflow', 'dask', 'librosa', 'flsep.pipeline', 'museval', 'norbert'}\n"
        "assert not unwanted & set(sys.modules), unwanted & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("signal_name", ["mixture", "stems"])
@pytest.mark.parametrize("mixing", ["original", "random", "rendered"])
@pytest.mark.parametrize("approach", ["concat", "contrastive", "distance"])
def test_every_combination_trains_or_says_why_not(
    command: Run, tmp_path: Path, approach: str, mixing: str, signal_name: str
) -> None:
    result = command(
        f"fit SHARDS --run TMP/run TINY --set fit.epochs=1 --approach {approach} "
        f"--mixing {mixing} --teacher-signal {signal_name}"
        + " --weight 0.5" * (approach != "concat")
        + " --mixes MIXES" * (mixing == "rendered")
    )
    reason = None
    if approach == "concat" and signal_name == "stems":
        reason = "approach.teacher_signal is 'stems'; expected 'mixture': concat needs"
    elif mixing == "random" and signal_name == "mixture":
        reason = "random mixture has no precomputed embedding; use --mixing original"
    if reason is not None:
        assert_one_line(result, reason)
        assert not (tmp_path / "run").exists()
        return
    assert result.exit_code == 0, result.output
    assert "all 1 epochs are done" in result.output
    names = {path.name.split(".tfevents")[0] for path in (tmp_path / "run").iterdir()}
    assert names == {
        "best.safetensors", "last.safetensors", "config.json", "environment.json",
        "events.out", "metrics.jsonl",
    }  # fmt: skip
    config = load_checkpoint(tmp_path / "run" / "best.safetensors").config
    assert (config.approach.name, config.data.mixing) == (approach, mixing)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    assert stored["approach"]["teacher_signal"] == signal_name
    assert len(stored["fingerprint"]) == 64


@pytest.mark.parametrize("mixing", ["original", "random", "rendered"])
def test_the_separator_alone_trains_with_any_mixing(
    command: Run, tmp_path: Path, mixing: str
) -> None:
    result = command(
        f"fit SHARDS --run TMP/run TINY --set fit.epochs=1 --mixing {mixing}"
        + " --mixes MIXES" * (mixing == "rendered")
    )
    assert result.exit_code == 0, result.output
    assert "approach   none: the separator alone" in result.output


def test_options_without_effect_are_refused(command: Run) -> None:
    result = command("fit SHARDS --run TMP/run TINY --approach distance --temperature 0.2")
    assert_one_line(result, "section 'approach' of 'distance' has no field 'temperature'")


def test_settings_beat_options_beat_the_recipe(command: Run, tmp_path: Path) -> None:
    result = command(
        "fit SHARDS --run TMP/run --recipe demo TINY --set fit.epochs=1 --weight 3 --seed 5 "
        "--approach distance "
        "--set approach.weight=4"
    )
    assert result.exit_code == 0, result.output
    config = load_checkpoint(tmp_path / "run" / "last.safetensors").config
    assert (config.approach.weight, config.fit.seed) == (4, 5)
    assert config.optim.learning_rate == 3e-3  # the demo's


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fit TMP/none --run TMP/run", "none: no such folder"),
        ("fit TMP --run TMP/run", "index.json: no index"),
        ("fit SHARDS --run TMP/run --set fit.epoch=1", "no field 'epoch'; did you mean epochs"),
        (
            "fit SHARDS --run TMP/run --approach distance --weight -1",
            "approach.weight is -1.0; expected > 0",
        ),
        ("fit SHARDS --run TMP/file TINY", "cannot write the run folder"),
        ("fit SHARDS --run TMP/file/run TINY", "cannot write the run folder"),
        ("fit SHARDS --run TMP/full TINY", "is not empty: add --resume"),
        ("fit SHARDS --run TMP/full TINY --resume", "last.safetensors: truncated or no safetens"),
        ("separate TMP/full TMP/file TMP/out", "best.safetensors: no such checkpoint"),
        ("separate TMP/full TMP/gone.wav TMP/out", "gone.wav: no such file or folder"),
        ("evaluate TMP/full SHARDS", "best.safetensors: no such checkpoint"),
        ("evaluate SHARDS --floor TMP/file/floor", "cannot make the folder"),
        ("evaluate SHARDS --floor TMP/out --split valid", "has no audio"),
        ("compare TMP/full --floor TMP/floor", "evaluation: not evaluated"),
    ],
)
def test_bad_input_is_one_line(command: Run, tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "last.safetensors").write_text("x")
    (tmp_path / "file").touch()
    assert_one_line(command(line), message)


@pytest.mark.parametrize(
    "line",
    [
        "fit SHARDS",
        "fit SHARDS --run TMP/run --approach other",
        "fit SHARDS --run TMP/run --resume --overwrite",
        "fit SHARDS --run TMP/run --device quantum",
        "fit SHARDS --run TMP/run --save-every nan",
        "evaluate SHARDS",
        "evaluate SHARDS --floor SHARDS/index.json",
        "compare --floor TMP",
        "unknown",
    ],
)
def test_wrong_usage_has_status_2(command: Run, line: str) -> None:
    assert command(line).exit_code == 2


def test_a_bug_is_not_hidden(command: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("bug")

    monkeypatch.setattr(Training, "__init__", fail)
    result = command("fit SHARDS --run TMP/run TINY")
    assert result.exit_code == 70
    assert "Traceback (most recent call last)" in result.stderr
    assert "AssertionError: bug" in result.stderr


def test_running_out_of_gpu_memory_is_one_line(
    command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError("long\nstory")

    monkeypatch.setattr(loop, "train_batch", fail)
    assert_one_line(command("fit SHARDS --run TMP/run TINY"), "out of GPU memory; use --set data.")


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Send signals from within a step, by its number."""

    def install(step_number: int, *numbers: signal.Signals) -> None:
        train_batch, count = loop.train_batch, 0

        def step(training: Training, batch: Any, names: list[str]) -> dict[str, float]:
            nonlocal count
            count += 1
            values = train_batch(training, batch, names)
            if count == step_number:
                for number in numbers:
                    signal.raise_signal(number)
            return values

        monkeypatch.setattr(loop, "train_batch", step)

    return install


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)]
)
def test_signals_save_and_say_how_to_go_on(
    command: Run,
    tmp_path: Path,
    interrupt: Callable[..., None],
    number: signal.Signals,
    status: int,
) -> None:
    interrupt(3, number)
    result = command("fit SHARDS --run TMP/run TINY")
    assert_one_line(result, f"Stopped by {number.name}, saved in epoch 1, 3 of 5 batches", status)
    assert f"--run {tmp_path}/run --resume" in result.stderr
    training = load_checkpoint(tmp_path / "run" / "last.safetensors").training
    assert training is not None
    assert training["position"]["batch"] == 3
    result = command("fit SHARDS --run TMP/run --resume")
    assert result.exit_code == 0, result.output
    assert "resumes    at epoch 1, 3 of 5 batches" in result.output
    assert "all 2 epochs are done" in result.output


def test_a_killed_run_goes_on_to_the_same_weights(
    command: Run, shards: Path, tmp_path: Path, tiny_settings: list[str]
) -> None:
    arguments = [*tiny_settings, "--set", "separator.num_layers=2", "--set", "fit.epochs=6"]
    arguments += ["--set", "separator.dropout=0.5", "--approach", "contrastive"]
    whole = command(f"fit SHARDS --run TMP/whole {shlex.join(arguments)}")
    assert whole.exit_code == 0, whole.output
    program = str(Path(sys.executable).with_name("flsep-train"))
    last = tmp_path / "run" / "last.safetensors"
    process = subprocess.Popen(
        [program, "fit", shards, "--run", last.parent, *arguments, "--save-every", "0.0001"],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 120
    while not last.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    position = (load_checkpoint(last).training or {})["position"]
    assert position["epoch"] < 6
    resumed = command(f"fit SHARDS --run TMP/run --resume {shlex.join(arguments)}")
    assert resumed.exit_code == 0, resumed.output
    for name in ("best", "last"):
        first, second = (
            load_checkpoint(tmp_path / run / f"{name}.safetensors").tensors
            for run in ("whole", "run")
        )
        assert first.keys() == second.keys()
        assert [key for key in first if not torch.equal(first[key], second[key])] == []
    assert not list((tmp_path / "run").glob(".*"))  # what the killed one was writing


def test_a_second_ctrl_c_does_not_wait(
    command: Run, tmp_path: Path, interrupt: Callable[..., None]
) -> None:
    interrupt(2, signal.SIGINT, signal.SIGINT)
    assert_one_line(command("fit SHARDS --run TMP/run TINY"), "Interrupted.", 130)
    assert not (tmp_path / "run" / "last.safetensors").exists()


def test_resume_starts_a_run_again_that_was_killed_before_it_saved(
    command: Run, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    refused = command("fit SHARDS --run TMP/run TINY")
    assert_one_line(refused, "is not empty: add --resume")
    result = command("fit SHARDS --run TMP/run TINY --resume")
    assert result.exit_code == 0, result.output
    assert "resumes    at the start" in result.output
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("")
    assert_one_line(command("fit SHARDS --run TMP/notes TINY --resume"), "is not empty")


def test_resume_starts_what_is_not_there(command: Run, tmp_path: Path) -> None:
    result = command("fit SHARDS --run TMP/run TINY --resume")
    assert result.exit_code == 0, result.output
    assert "resumes    at the start: there is no last.safetensors yet" in result.output
    # The very same command again: nothing left to do.
    again = command("fit SHARDS --run TMP/run TINY --resume")
    assert again.exit_code == 0, again.output
    assert "all 2 epochs are done" in again.output
    longer = command("fit SHARDS --run TMP/run --resume --set fit.epochs=3")
    assert "all 3 epochs are done" in longer.output
    other = command("fit SHARDS --run TMP/run --resume --approach distance")
    assert_one_line(other, "was started with approach.name=none, not distance")
    recipe = command("fit SHARDS --run TMP/run --resume --recipe demo")
    assert_one_line(recipe, "was started with separator.hidden_size=8, not ")


def test_overwrite_replaces_a_run(command: Run, tmp_path: Path) -> None:
    assert command("fit SHARDS --run TMP/run TINY --set fit.epochs=1").exit_code == 0
    (tmp_path / "run" / "notes.txt").touch()
    result = command("fit SHARDS --run TMP/run TINY --overwrite --seed 1")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "notes.txt").exists()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(list((tmp_path / "run").glob("events.*"))) == 1


def test_sigterm_in_mid_epoch_and_resume_equal_an_uninterrupted_run(
    command: Run,
    shards: Path,
    tmp_path: Path,
    tiny_settings: list[str],
    read_metrics: Callable[[Path], list[dict[str, Any]]],
) -> None:
    settings = "--approach contrastive --set fit.epochs=8 --set data.excerpts_per_track=4"
    code = "import torch; torch.set_num_threads(1); from flsep.trainer.cli import main; main()"
    run = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "fit", str(shards), "--run", str(run), "--workers", "2",
         *tiny_settings, *settings.split()],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (run / "last.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 143, error
    assert "Stopped by SIGTERM" in error
    stopped = load_checkpoint(run / "last.safetensors").training
    assert stopped is not None
    assert stopped["position"]["epoch"] < 8
    resumed = command(f"fit SHARDS --run TMP/killed --resume --workers 0 {settings}")
    assert resumed.exit_code == 0, resumed.output
    whole = command(f"fit SHARDS --run TMP/whole TINY {settings}")
    assert whole.exit_code == 0, whole.output
    assert read_metrics(run) == read_metrics(tmp_path / "whole")
    for name in ("best", "last"):
        one, two = (
            load_checkpoint(folder / f"{name}.safetensors").tensors
            for folder in (run, tmp_path / "whole")
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_separate_a_folder_with_a_bad_file(
    command: Run, tmp_path: Path, tracks: dict[str, tuple[str, np.ndarray]]
) -> None:
    assert command("fit SHARDS --run TMP/run TINY --set fit.epochs=1").exit_code == 0
    songs = tmp_path / "songs"
    songs.mkdir()
    waveform = tracks["five"][1][0]
    soundfile.write(songs / "stereo.flac", waveform.T, 8000)
    soundfile.write(songs / "mono, fast.wav", waveform[0], 16000)
    (songs / "bad.mp3").write_text("no music")
    result = command("separate TMP/run TMP/songs TMP/out --targets vocals,bass")
    assert result.exit_code == 1
    first, last = result.stderr.splitlines()
    assert first.startswith(f"Error: {songs}/bad.mp3: cannot be decoded")
    assert last == "Error: 1 of 3 files could not be separated, see above"
    assert not (tmp_path / "out" / "bad").exists()
    assert "stereo: vocals.wav, bass.wav (2.5 s at 8000 Hz)" in result.stdout
    for name, num_samples in (("stereo", 20_000), ("mono, fast", 10_000)):
        folder = tmp_path / "out" / name
        assert sorted(path.name for path in folder.iterdir()) == ["bass.wav", "vocals.wav"]
        info = soundfile.info(folder / "bass.wav")
        assert (info.samplerate, info.channels, info.subtype) == (8000, 2, "FLOAT")
        assert abs(info.frames - num_samples) <= 8
    only = command("separate TMP/run/last.safetensors TMP/songs/stereo.flac TMP/only")
    assert only.exit_code == 0, only.output
    assert len(list((tmp_path / "only" / "stereo").iterdir())) == 3
    assert_one_line(command("separate TMP/run TMP/songs/bad.mp3 TMP/only"), "cannot be decoded")
    assert_one_line(
        command("separate TMP/run TMP/songs TMP/only --targets voice"), "no source 'voice'"
    )
    assert_one_line(
        command("separate TMP/run TMP/songs TMP/only --teacher x"), "separates without it"
    )


def test_fit_evaluate_compare(
    command: Run, new_shards: Callable[..., Path], tmp_path: Path
) -> None:
    # Two mono sources and one short test track: museval takes seconds for more.
    new_shards(
        tmp_path / "data",
        {"a": ("train", 1.5), "b": ("valid", 1.0), "the / test": ("test", 2.2)},
        sources=("drums", "bass"),
        num_channels=1,
    )
    for name in ("none", "concat"):
        result = command(f"fit TMP/data --run TMP/{name} TINY --set fit.epochs=1 --approach {name}")
        assert result.exit_code == 0, result.output
    result = command("evaluate TMP/none TMP/concat TMP/data --floor TMP/floor --workers 0")
    assert result.exit_code == 0, result.output
    (scores,) = (tmp_path / "concat" / "evaluation" / "scores").iterdir()
    stored = json.loads(scores.read_text())
    assert stored["track"] == "the / test"
    assert [target["name"] for target in stored["targets"]] == ["drums", "bass"]
    assert len(stored["targets"][0]["frames"]) == 2
    result = command("compare TMP/none mine=TMP/concat --floor TMP/floor --out TMP/comparison")
    assert result.exit_code == 0, result.output
    assert "mixture (floor)" in result.stdout
    assert "\nmine " in result.stdout
    saved = {path.suffix for path in (tmp_path / "comparison").iterdir()}
    assert saved == {".txt", ".md", ".csv", ".json"}
    comparison = json.loads((tmp_path / "comparison" / "comparison.json").read_text())
    assert comparison["tracks"] == ["the / test"]
    assert [entry["approach"] for entry in comparison["entries"]] == ["mixture", "none", "mine"]
    assert_one_line(
        command("compare TMP/none --floor TMP/none/evaluation"),
        "holds scores of the run, expected the floor",
    )
