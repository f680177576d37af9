"""Training as jobs of a real SLURM: requeued, and gone on with."""

import re
import sys
import time
from pathlib import Path

import pytest
from cluster_runs import Runner, wait_until
from slurm_node import call, submit

pytestmark = pytest.mark.heavy

BIN = Path(sys.executable).parent
TINY = (
    "separator.hidden_size=8", "separator.num_layers=1", "separator.dropout=0",
    "data.excerpt_seconds=1", "data.excerpts_per_track=2", "data.batch_size=4",
)  # fmt: skip

# The scripts of the how-to, with a training that takes no GPU.
ALONE = """
srun {fit} --resume
status=$?
if [ "$status" -eq 138 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""
SEVERAL = """
trap 'again=yes; kill -TERM "$pid"' USR1
{bin}/torchrun --standalone --nproc-per-node 2 --no-python -- {fit} --resume &
pid=$!
wait "$pid"
status=$?
if [ -n "$again" ]; then
    wait "$pid"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


@pytest.fixture(scope="module")
def shards(corpus: Path, tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runner = Runner(corpus, tiny_teacher, tmp_path_factory.mktemp("training"))
    runner.run("--workers", "0", "--valid-fraction", "0.3")
    return runner.shards


def fit(shards: Path, run: Path, *options: str) -> str:
    settings = " ".join(f"--set {setting}" for setting in (*TINY, *options))
    return f"env OMP_NUM_THREADS=1 {BIN}/flsep-train fit {shards} --run {run} {settings}"


def read_log(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.glob("job-*.log"))


def wait_for_start(folder: Path, job: str, count: int) -> None:
    """Wait until a job has trained for the `count`-th time and saved an epoch since."""
    last = folder / "run" / "last.safetensors"

    moved = False

    def has_started() -> bool:
        nonlocal moved
        state = call("squeue", "-h", "-o", "%T", "-j", job, check=False)
        assert state, f"the job has ended: {read_log(folder)}"
        if state == "PENDING" and not moved:
            # SLURM lets a requeued job wait for two minutes; at once its node refuses it.
            call("scontrol", "update", f"JobId={job}", "StartTime=now+3seconds")
            moved = True
        time.sleep(0.2)
        return read_log(folder).count("resumes    at") == count

    wait_until(has_started)
    since = time.time()
    wait_until(lambda: last.exists() and last.stat().st_mtime > since)


def resumed_epochs(folder: Path) -> list[int]:
    return [int(epoch) for epoch in re.findall(r"resumes    at epoch (\d+),", read_log(folder))]


def num_epochs(folder: Path) -> int:
    return len((folder / "run" / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("script", [ALONE, SEVERAL], ids=["alone", "several"])
def test_a_requeued_training_goes_on(
    slurm: Path, shards: Path, tmp_path: Path, script: str
) -> None:
    text = script.format(fit=fit(shards, tmp_path / "run", "fit.epochs=100000"), bin=BIN)
    to_script = () if script == ALONE else ("--batch",)
    job = submit(text, tmp_path, "--requeue", "--ntasks=1", "--cpus-per-task=2")
    try:
        wait_for_start(tmp_path, job, 1)
        call("scancel", *to_script, "--signal=USR1", job)  # as --signal does near the time limit
        wait_for_start(tmp_path, job, 2)
        before = num_epochs(tmp_path)
        call("scontrol", "requeue", job)  # as preemption does
        wait_for_start(tmp_path, job, 3)
        assert "Stopped by SIG" in read_log(tmp_path)
        first, second = resumed_epochs(tmp_path)
        assert 1 < first < second
        assert second >= before
    finally:
        call("scancel", job, check=False)
        wait_until(lambda: not call("squeue", "-h", "-j", job, check=False))


def test_an_array_over_approaches_and_seeds(slurm: Path, shards: Path, tmp_path: Path) -> None:
    lines = [
        fit(shards, tmp_path / f"{approach}-{seed}", "fit.epochs=2", f"approach.name={approach}")
        + f" --seed {seed} --resume"
        for approach in ("none", "distance")
        for seed in (0, 1)
    ]
    (tmp_path / "runs.txt").write_text("\n".join(lines) + "\n")
    script = f'srun bash -c "exec $(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {tmp_path}/runs.txt)"'
    job = submit(script, tmp_path, "--array=1-4", "--requeue")
    wait_until(lambda: not call("squeue", "-h", "-j", job, check=False))
    log = read_log(tmp_path)
    assert log.count("all 2 epochs are done") == 4, log
    assert {path.parent.name for path in tmp_path.glob("*/best.safetensors")} == {
        "none-0", "none-1", "distance-0", "distance-1"
    }  # fmt: skip
