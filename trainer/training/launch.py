"""What ``flsep-train fit`` does: from a request to a training, alone or as one of several ranks."""

import ctypes
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from tqdm import tqdm

from flsep.cache import Mixes, Shards
from flsep.trainer.config import TrainConfig, list_differences
from flsep.trainer.errors import RunError
from flsep.trainer.parallel import Rank, joined, local_rank, wait_for_all
from flsep.trainer.recipes import resolve_config
from flsep.trainer.runs.checkpoint import Checkpoint, load_checkpoint
from flsep.trainer.runs.folder import Run, describe_environment
from flsep.trainer.settings import apply_settings
from flsep.trainer.training.loop import fit
from flsep.trainer.training.progress import describe_position, describe_training
from flsep.trainer.training.state import Training
from flsep.trainer.training.stopping import Stopped

DEFAULT_RECIPE = "xumx"

# Both decide only when a training ends, not what it does until then.
_CAN_CHANGE = {"fit.epochs", "fit.patience"}
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True, kw_only=True, slots=True)
class FitRequest:
    """What the user asks of ``flsep-train fit``.

    `recipe` is None for the default, or for the configuration of the run to resume. `settings` have
    the form ``section.field=value``. `resident` is the memory to load all data into, 'device' or
    'host', or None.
    """

    shards: Path
    run: Path
    mixes: Path | None
    recipe: str | None
    settings: tuple[str, ...]
    resume: bool
    overwrite: bool
    seconds_between_saves: float
    resident: str | None
    num_workers: int
    device: str
    verify: bool


def launch(request: FitRequest) -> int:
    """Train as one of the processes that share the work, and return the exit status."""
    device = choose_device(request.device, local_rank())
    if device.type == "cuda":
        torch.cuda.set_device(device)  # makes its streams and events the current ones
    else:
        keep_freed_memory()
    folder = Run(request.run)
    with joined(device) as rank:
        report = click.echo if rank.number == 0 else _say_nothing
        checkpoint = None
        if request.resume and folder.last.exists():
            checkpoint = load_checkpoint(folder.last)
        training = _build_training(request, checkpoint, device, rank)
        wait_for_all()  # the first process may only write once all have read the folder
        if rank.number == 0:
            _prepare_folder(folder, training, request)
        for line in describe_training(training):
            report(line)
        report(
            f"results    {request.run}: best.safetensors, last.safetensors, metrics.jsonl, events.*"
        )
        if request.resume:
            start = "the start: there is no last.safetensors yet"
            report(f"resumes    at {describe_position(training) if checkpoint else start}")
        try:
            fit(
                training,
                folder,
                report=report,
                seconds_between_saves=request.seconds_between_saves,
            )
        except Stopped as stopped:
            if rank.number == 0:
                click.echo(_explain_stop(stopped, request), err=True)
            # The status that shells give for a process that a signal has ended.
            return 128 + stopped.number
        position = training.position
        report(
            f"best validation loss {position.best_loss:.4f} in epoch {position.best_epoch + 1}: "
            f"{folder.best}"
        )
        return 0


def _say_nothing(line: str) -> None:
    pass


def _build_training(
    request: FitRequest, checkpoint: Checkpoint | None, device: torch.device, rank: Rank
) -> Training:
    """Build a new training, or the one that a checkpoint belongs to."""
    if checkpoint is None:
        config = resolve_config(request.recipe or DEFAULT_RECIPE, request.settings)
    else:
        if request.recipe is None:
            # Settings change the run's own configuration, so that they need not be repeated.
            wanted = apply_settings(checkpoint.config, request.settings)
        else:
            wanted = resolve_config(request.recipe, request.settings)
        config = resume_config(checkpoint.config, wanted, request.run)
    with _loading_bar(shown=rank.number == 0 and request.resident is not None) as loaded:
        training = Training(
            config,
            Shards(request.shards, verify=request.verify),
            device=device,
            num_workers=request.num_workers,
            rank=rank,
            resident=request.resident,
            report=loaded,
            mixes=Mixes(request.mixes) if request.mixes else None,
        )
    if checkpoint is not None:
        training.restore(checkpoint, str(Run(request.run).last))
    return training


def resume_config(stored: TrainConfig, wanted: TrainConfig, folder: Path) -> TrainConfig:
    """Return the wanted configuration; raise RunError if more differs than what may change."""
    for name, (old, new) in list_differences(stored, wanted).items():
        if name not in _CAN_CHANGE:
            raise RunError(
                f"{folder} was started with {name}={old}, not {new}; resume it with its own "
                "settings, or choose another --run"
            )
    return wanted


def _prepare_folder(folder: Run, training: Training, request: FitRequest) -> None:
    """Make the run folder, or check that it can be written to, and describe the run in it."""
    if folder.last.exists() and request.resume:
        folder.require_writable()
    else:
        # A run that was killed before its first checkpoint has nothing to lose: start again.
        folder.prepare(overwrite=request.overwrite or (request.resume and folder.is_unfinished))
    config, mixes = training.config, training.mixes
    data = {
        "shards": str(request.shards.resolve()),
        "fingerprint": training.fingerprint,
        "mixes": mixes and str(mixes.folder.resolve()),
    }
    folder.write_description(
        {**config.to_json(), **data},
        describe_environment(str(training.device), config.fit.seed),
    )


@contextmanager
def _loading_bar(*, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function that shows the progress of loading data, if it is to be shown."""
    if not shown:
        yield None
        return
    with tqdm(unit="B", unit_scale=True, desc="loading", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _explain_stop(stopped: Stopped, request: FitRequest) -> str:
    command = ["flsep-train", "fit", str(request.shards), "--run", str(request.run), "--resume"]
    command += ["--mixes", str(request.mixes)] if request.mixes else []
    return (
        f"Stopped by {stopped.number.name}, saved in {stopped.place}; continue with: "
        f"{shlex.join(command)}"
    )


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device of this process; ``cuda`` is another one for each local rank."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        # A name can be valid where its device cannot be used; only an allocation shows that.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise click.UsageError(f"--device {name} cannot be used here ({reason})") from error
    return device


def keep_freed_memory() -> None:
    """Let the C library, if it is glibc, reuse freed blocks instead of returning them.

    A training step on the CPU frees and allocates the same large blocks again and again; by default
    each comes as fresh pages that have to be cleared first. With this setting a step of the demo
    was 2 to 4 times faster on two cores (docs/experiments.md). The process keeps its peak memory.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # Blocks from mmap go back to the system when they are freed: use the heap for all of them,
        # and never trim the heap.
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
