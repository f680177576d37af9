"""Two processes against one: the same weights, metrics and files."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import flsep.cache
import flsep.trainer.config
from flsep.cache import Shards
from flsep.trainer.config import TrainConfig, list_differences
from flsep.trainer.parallel import BatchNorm, Rank, count_ranks, gather_objects, gather_rows, joined
from flsep.trainer.runs.checkpoint import load_checkpoint
from flsep.trainer.runs.folder import Run
from flsep.trainer.training.loop import fit
from flsep.trainer.training.state import Training

# 9 excerpts in 3 batches of 3: one process has two of each, the other one.
SHARED = ("data.batch_size=3", "optim.learning_rate=1e-2", "fit.epochs=2")
SETTINGS = {
    "none": ("optim.accumulate=2", "optim.clip_norm=0.5", "optim.ema_decay=0.9"),
    "concat": ("approach.name=concat",),
    "contrastive": ("approach.name=contrastive", "data.mixing=random"),
    "distance": ("approach.name=distance", "approach.teacher_signal=stems"),
}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from flsep.cache import Shards
from flsep.trainer.config import TrainConfig
from flsep.trainer.parallel import joined
from flsep.trainer.runs.folder import Run
from flsep.trainer.training.loop import fit
from flsep.trainer.training.state import Training
shards, runs, configs = sys.argv[1:]
cpu = torch.device("cpu")
with joined(cpu) as rank:
    for name, values in json.loads(Path(configs).read_text()).items():
        training = Training(
            TrainConfig.from_json(values), Shards(shards), device=cpu, num_workers=1, rank=rank
        )
        fit(training, Run(Path(runs) / name), report=lambda line: None)
"""


def configure(tiny: Callable[..., TrainConfig], name: str) -> TrainConfig:
    settings = list(SETTINGS[name])
    if name == "contrastive":
        settings.append("approach.teacher_signal=stems")
    return tiny(*SHARED, *settings)


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def two_processes(
    tiny: Callable[..., TrainConfig], shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Run folders that two processes have made together."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "script.py").write_text(SCRIPT)
    configs = {name: configure(tiny, name).to_json() for name in SETTINGS}
    (folder / "configs.json").write_text(json.dumps(configs))
    for name in SETTINGS:
        (folder / name).mkdir()
    arguments = [folder / "script.py", shards, folder, folder / "configs.json"]
    # A warning ends the training, as it would end a test.
    strict = {**environment(), "PYTHONWARNINGS": "error::FutureWarning,error::DeprecationWarning"}
    subprocess.run([*TORCHRUN, *arguments], check=True, timeout=300, env=strict)
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_train_as_one(
    tiny: Callable[..., TrainConfig],
    shards: Path,
    two_processes: Path,
    tmp_path: Path,
    read_metrics: Callable[[Path], list[dict[str, Any]]],
    name: str,
) -> None:
    alone = Run(tmp_path)
    training = Training(
        configure(tiny, name), Shards(shards), device=torch.device("cpu"), num_workers=0
    )
    before = {key: value.clone() for key, value in training.model.state_dict().items()}
    fit(training, alone, report=lambda line: None)
    together = Run(two_processes / name)
    for file in ("best", "last"):
        first, second = (load_checkpoint(getattr(run, file)) for run in (alone, together))
        for key, value in first.tensors.items():
            # Batch norm takes the encoders' shift out again: its gradient is rounding noise, of
            # which Adam makes whole steps.
            noise = "input_mean" in key or key.endswith("encoder_norm.running_mean")
            if not (noise or key.startswith("random")):
                # A weight here and there may do so too: what counts is the root mean square.
                error = (second.tensors[key].double() - value).square().mean().sqrt()
                assert error < 5e-4 + 1e-3 * value.double().square().mean().sqrt(), key
    moved = [
        float((second.tensors[f"model.{key}"] - value).abs().max()) for key, value in before.items()
    ]
    assert max(moved) > 0.02  # far more than they may differ
    for one, two in zip(read_metrics(alone.folder), read_metrics(together.folder), strict=True):
        for values in (one["train"], two["train"]):
            values.pop("retrieval_accuracy", None)  # may hang on the last digit
        assert two["train"] == pytest.approx(one["train"], rel=2e-3)
        # The statistics that evaluation takes lag behind the noise above.
        for term in ("separation", "total"):
            assert two["valid"][term] == pytest.approx(one["valid"][term], rel=1e-2)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=2e-3)


def test_each_process_has_its_own_random_state(two_processes: Path) -> None:
    tensors = load_checkpoint(two_processes / "none" / "last.safetensors").tensors
    assert not torch.equal(tensors["random.cpu.0"], tensors["random.cpu.1"])
    assert "random.cpu.2" not in tensors


@pytest.fixture
def together(
    tiny: Callable[..., TrainConfig], shards: Path, tmp_path: Path
) -> Callable[..., "subprocess.Popen[str]"]:
    """Start flsep-train fit in two processes."""
    changed = list_differences(TrainConfig(), tiny(*SHARED))
    settings = [part for name, (_, new) in changed.items() for part in ("--set", f"{name}={new}")]

    command = str(Path(sys.executable).with_name("flsep-train"))
    # Without the two dashes torchrun takes --run for its own --run-path.
    launch = [*TORCHRUN, "--no-python", "--", command, "fit", str(shards)]

    def start(*options: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*launch, "--run", str(tmp_path / "run"), *settings, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    return start


def list_own_frames(errors: str) -> list[str]:
    """Return the files of flsep in tracebacks; torchrun's own tracebacks name other files."""
    folders = [Path(module.__file__).resolve().parent for module in (flsep.cache, flsep.trainer)]
    files = [Path(name) for name in re.findall(r'File "([^"]+)", line', errors)]
    return [str(file) for file in files if any(file.resolve().is_relative_to(f) for f in folders)]


def test_own_frames_are_told_from_others() -> None:
    others = f'  File "{torch.__file__}", line 1\n  File "/x/flsep/.venv/bin/torchrun", line 1\n'
    assert list_own_frames(f"flsep: {others}") == []
    own = flsep.trainer.config.__file__
    assert list_own_frames(f'{others}  File "{own}", line 3, in fit') == [own]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGUSR1, "Stopped by SIG"),
        (signal.SIGKILL, "Error: another process of this training has ended; see its message"),
    ],
)
def test_a_signal_to_one_process_stops_all_and_the_run_goes_on(
    together: Callable[..., "subprocess.Popen[str]"],
    tmp_path: Path,
    number: signal.Signals,
    message: str,
) -> None:
    process = together("--set", "fit.epochs=100000")
    last = tmp_path / "run" / "last.safetensors"
    deadline = time.monotonic() + 120
    while not last.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(workers[-1]), number)
    output, errors = process.communicate(timeout=120)
    assert message in errors
    assert list_own_frames(errors) == [], errors
    assert output.count("epochs: at most 100000, on 2 x cpu") == 1  # the first one speaks for all
    epoch = load_checkpoint(last).epoch
    process = together("--resume", "--set", f"fit.epochs={epoch + 2}")
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"all {epoch + 2} epochs are done" in output
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == epoch + 2


def test_too_small_a_last_batch_is_refused(
    together: Callable[..., "subprocess.Popen[str]"], tmp_path: Path
) -> None:
    process = together("--set", "data.batch_size=2")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Error: the last batch of an epoch has 1 of its 9 excerpts, too few for 2" in errors
    assert list_own_frames(errors) == [], errors
    assert not (tmp_path / "run").exists()


def test_alone_nothing_is_shared() -> None:
    with joined(torch.device("cpu")) as rank:
        assert rank == Rank(0, 1)
    assert count_ranks() == 1
    assert gather_objects("a") == ["a"]
    rows = torch.ones(2, 3, requires_grad=True)
    assert gather_rows(rows) is rows


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_that_of_torch(training: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = (kind(5).train(training) for kind in (BatchNorm, torch.nn.BatchNorm1d))
    rows = torch.randn(4, 3, 5)
    torch.testing.assert_close(ours(rows), theirs(rows.flatten(0, 1)).unflatten(0, (4, 3)))
    assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())
    torch.testing.assert_close(
        ours(rows, torch.full((5,), 2.0), torch.ones(5)), 2 * ours(rows) + 1, atol=1e-5, rtol=1e-4
    )
