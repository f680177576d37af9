"""What ``flsep-train fit`` does: from options to a training, alone or as one of several."""

import ctypes
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm

from flsep.cache import Mixes, Shards
from flsep.trainer.config import TrainConfig, apply_settings, list_differences
from flsep.trainer.errors import RunError
from flsep.trainer.parallel import joined, local_rank, wait_for_all
from flsep.trainer.recipes import RECIPES
from flsep.trainer.runs.checkpoint import load_checkpoint
from flsep.trainer.runs.folder import Run, describe_environment
from flsep.trainer.training.loop import fit
from flsep.trainer.training.progress import describe_place, describe_training
from flsep.trainer.training.state import Training
from flsep.trainer.training.stopping import Stopped

_FIELDS = {
    "approach": "approach.name",
    "mixing": "data.mixing",
    "teacher_signal": "approach.teacher_signal",
    "weight": "approach.weight",
    "temperature": "approach.temperature",
    "seed": "fit.seed",
    "precision": "compute.precision",
}


def launch(
    shards: Path,
    run: Path,
    *,
    recipe: str | None,
    options: Mapping[str, Any],
    resume: bool,
    overwrite: bool,
    mixes: Path | None,
    seconds_between_saves: float,
    resident: str | None,
    num_workers: int,
    device: str,
    verify: bool,
) -> int:
    """Train as one of the processes that share the work, and say how it goes.

    Parameters
    ----------
    shards, run : Path
        Folders to read from and to write to.
    recipe : str or None
        Name of the configuration to start from; None for that of the run to resume.
    options : mapping
        Values of the named options of ``fit``, None where not given, and its ``settings``.
    resume, overwrite : bool
        Go on with the run in the folder, or replace it.
    mixes : Path or None
        Folder of rendered mixes.
    seconds_between_saves : float
        Within an epoch.
    resident : {'device', 'host'} or None
        Where to load all data to.
    num_workers : int
        Threads that read.
    device : str
        ``auto``, or a name that torch knows.
    verify : bool
        Compare digests as data are read.

    Returns
    -------
    int
        Exit status: 0, or 128 and the number of the signal that stopped the training.
    """
    chosen = choose_device(device, local_rank())
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # its streams and events are the current ones
    else:
        keep_freed_memory()
    folder = Run(run)
    with joined(chosen) as part:
        is_first = part.rank == 0

        def report(line: str) -> None:
            if is_first:
                click.echo(line)

        checkpoint = load_checkpoint(folder.last) if resume and folder.last.exists() else None
        if checkpoint is None:
            config = _apply_options(RECIPES[recipe or "xumx"](), options)
        else:
            given = checkpoint.config if recipe is None else RECIPES[recipe]()
            config = resume_config(checkpoint.config, _apply_options(given, options), run)
        with _loading_bar(shown=is_first and resident is not None) as loaded:
            training = Training(
                config,
                Shards(shards, verify=verify),
                device=chosen,
                num_workers=num_workers,
                part=part,
                resident=resident,
                report=loaded,
                mixes=Mixes(mixes) if mixes else None,
            )
        if checkpoint is not None:
            training.restore(checkpoint, str(folder.last))
        wait_for_all()  # each has read what it needs of the folder
        if is_first:
            _prepare(folder, training, shards, resume=resume, overwrite=overwrite)
        for line in describe_training(training):
            report(line)
        report(f"results    {run}: best.safetensors, last.safetensors, metrics.jsonl, events.*")
        if resume:
            place = "the start: there is no last.safetensors yet"
            report(f"resumes    at {place if checkpoint is None else describe_place(training)}")
        try:
            fit(training, folder, report=report, seconds_between_saves=seconds_between_saves)
        except Stopped as stopped:
            if is_first:
                command = ["flsep-train", "fit", str(shards), "--run", str(run), "--resume"]
                command += ["--mixes", str(mixes)] if mixes else []
                click.echo(
                    f"Stopped by {stopped.number.name}, saved in {stopped.place}; go on with: "
                    f"{shlex.join(command)}",
                    err=True,
                )
            return 128 + stopped.number
        position = training.position
        report(
            f"best validation loss {position.best_loss:.4f} in epoch {position.best_epoch + 1}: "
            f"{folder.best}"
        )
        return 0


def _prepare(
    folder: Run, training: Training, shards: Path, *, resume: bool, overwrite: bool
) -> None:
    """Make the run folder, or see that it can be written to."""
    if folder.last.exists() and resume:
        folder.require_writable()
    else:
        # A run that was killed before its first checkpoint has nothing to lose: start again.
        folder.prepare(overwrite=overwrite or (resume and folder.is_unfinished))
    config = training.config
    mixes = training.mixes and str(training.mixes.folder.resolve())
    data = {"shards": str(shards.resolve()), "fingerprint": training.fingerprint, "mixes": mixes}
    folder.write_description(
        {**config.to_json(), **data},
        describe_environment(str(training.device), config.fit.seed),
    )


@contextmanager
def _loading_bar(*, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Give what shows the progress of loading data, where it is to be shown."""
    if not shown:
        yield None
        return
    with tqdm(unit="B", unit_scale=True, desc="loading", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _apply_options(config: TrainConfig, options: Mapping[str, Any]) -> TrainConfig:
    """Apply the named options, then ``--set``."""
    named = [
        f"{field}={options[option]}"
        for option, field in _FIELDS.items()
        if options[option] is not None
    ]
    return apply_settings(config, [*named, *options["settings"]])


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device of this process: ``cuda`` is one of its own for each."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise click.UsageError(f"--device {name} cannot be used here ({reason})") from error
    return device


_CAN_CHANGE = {"fit.epochs", "fit.patience"}


def resume_config(stored: TrainConfig, wanted: TrainConfig, folder: Path) -> TrainConfig:
    """Return the configuration to resume a run with: its own, with what may change.

    Parameters
    ----------
    stored, wanted : TrainConfig
        Of the run, and what is asked for now.
    folder : Path
        Of the run, for the message.

    Raises
    ------
    RunError
        If anything but the number of epochs and the patience differs.
    """
    for name, (old, new) in list_differences(stored, wanted).items():
        if name not in _CAN_CHANGE:
            raise RunError(
                f"{folder} was started with {name}={old}, not {new}: resume it with its own "
                "settings, or choose another --run"
            )
    return wanted


_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Let the C library reuse freed blocks instead of giving them back to the system.

    A training step on the CPU frees and asks for the same large blocks again and again; by default
    each comes as fresh pages that have to be cleared first. Kept, a step of the demo was 2 to 4
    times faster on two cores (docs/experiments.md). It costs memory that stays at its peak, and
    does nothing where the C library is not glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
