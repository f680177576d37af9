"""The command ``flsep-precompute mixes``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flsep.cache import SPLITS, MixesConfig, Shards
from flsep.cache.mixes.file import EMBEDDING_DTYPES
from flsep.pipeline.commands.parameter_types import FOLDER, Pair
from flsep.pipeline.commands.reporting import (
    describe_part,
    describe_summary,
    show_bytes,
    show_hours,
    show_progress,
)
from flsep.pipeline.commands.stages import run_with_workers
from flsep.pipeline.commands.worker_options import choose_workers, describe_workers, worker_options

if TYPE_CHECKING:
    from flsep.pipeline.mixes.task import MixesTask

# Options whose names are those of fields in MixesConfig.
_CHOSEN = ("split", "seed", "min_gain", "max_gain", "swap_probability", "embedding_dtype")


@click.command("mixes")
@click.argument("shards", type=FOLDER)
@click.argument("out", type=FOLDER)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    required=True,
    help="Number of epochs; longer trainings start over. More can be added later.",
)
@click.option(
    "--excerpts-per-track",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Mixes in an epoch for each track.",
)
@click.option("--seconds", type=float, default=6.0, show_default=True, help="Length of an excerpt.")
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Draws the mixes, as the seed of `flsep-train fit --mixing random` does.",
)
@click.option(
    "--split", type=click.Choice(SPLITS), default="train", show_default=True, help="Tracks to mix."
)
@click.option(
    "--min-gain", type=float, default=0.25, show_default=True, help="Least gain of a source."
)
@click.option(
    "--max-gain", type=float, default=1.25, show_default=True, help="Largest gain of a source."
)
@click.option(
    "--swap-probability",
    type=float,
    default=0.5,
    show_default=True,
    help="Probability of reversing the order of a source's channels.",
)
@click.option("--stems", is_flag=True, help="Embed each scaled stem of a mix too.")
@click.option(
    "--embedding-dtype",
    type=click.Choice(EMBEDDING_DTYPES),
    default="float32",
    show_default=True,
    help="float16 halves the size.",
)
@click.option(
    "--teacher",
    metavar="HANDLE",
    help="Where the teacher of the shards is now. [default: where it was]",
)
@click.option(
    "--part",
    type=Pair("/"),
    metavar="I/N",
    help="Make only part I of N; the same command without it then writes the index.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare each signal of SHARDS with its digest when a worker first reads it.",
)
@click.option("--dry-run", is_flag=True, help="Show what would be done, and the script of jobs.")
@worker_options
def mixes_command(
    shards: Path,
    out: Path,
    epochs: int,
    excerpts_per_track: int,
    seconds: float,
    teacher: str | None,
    stems: bool,
    part: tuple[int, int] | None,
    verify: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Render random mixes of the tracks of SHARDS, and write their embeddings to OUT.

    Each source of a mix comes from a random track, at a random position, with its own gain and
    channel swap. A mix takes a few kilobytes: its recipe, and the teacher's embedding of the
    mixture. `flsep-train fit SHARDS --mixing rendered --mixes OUT` repeats the same mixes from
    SHARDS, so that every approach can be trained on random mixes, including concat.

    If a run is stopped, the same command resumes it.

    \b
    Examples:
      flsep-precompute mixes shards/ mixes/ --epochs 20
      flsep-precompute mixes shards/ mixes/ --epochs 100 --cluster slurm --workers 16
    """
    from flsep.pipeline.execution.parts import tasks_of_part
    from flsep.pipeline.mixes.run import make_config, mixes_stage, plan_mixes
    from flsep.pipeline.mixes.task import MixesSettings
    from flsep.pipeline.teachers.loading import load_teacher
    from flsep.pipeline.teachers.model_folder import resolve

    workers = choose_workers(out.absolute(), options)
    opened = Shards(shards.absolute(), verify=verify)
    opened.check_files(options["split"])
    handle = teacher or opened.layout.teacher
    folder = resolve(handle).absolute()
    info = load_teacher(str(folder)).info
    config = make_config(
        opened,
        info,
        excerpt_seconds=seconds,
        excerpts_per_track=excerpts_per_track,
        with_stems=stems,
        **{name: options[name] for name in _CHOSEN},
    )
    tasks: Sequence[MixesTask] = plan_mixes(config, epochs)
    describe_mixes(config, epochs)
    if part:
        tasks = tasks_of_part(tasks, *part)
    describe_part(part, len(tasks), "files")
    if dry_run:
        describe_workers(workers)
        return
    settings = MixesSettings(
        folder=out.absolute(),
        shards=opened.folder,
        config=config,
        teacher=info,
        teacher_folder=folder,
        num_threads=1 if workers else None,
        verify=verify,
    )
    progress = show_progress(
        tasks,
        "mixes",
        count=lambda task: len(task.indices),
        audio_seconds=lambda task: len(task.indices) * seconds,
    )
    stage = mixes_stage(epochs, settings)
    summary = run_with_workers(stage, tasks, workers, progress, is_part=bool(part))
    speed = summary.num_made / summary.wall_seconds
    describe_summary(
        summary,
        out,
        verb="rendered",
        noun="mixes",
        failing="files",
        speed=f"{speed:.1f} mixes a second",
    )
    if part:
        click.echo("when all parts have finished, run the same command without --part")
    if summary.failed:
        raise click.exceptions.Exit(1)


def describe_mixes(config: MixesConfig, num_epochs: int) -> None:
    """Print what some epochs of mixes hold, and their size."""
    # The datasets only: HDF5 adds a little for each file.
    num_bytes = config.num_bytes(config.num_mixes)
    hours = config.num_mixes * config.excerpt_seconds / 3600
    click.echo(
        f"mixes    {num_epochs} epochs of {config.num_mixes}, {show_hours(hours)} each: "
        f"{config.num_sources} sources from {config.num_tracks} tracks ({config.split}), "
        f"{config.excerpt_seconds:g} s, seed {config.seed}"
    )
    heard = "the mixture and each scaled stem" if config.with_stems else "the mixture"
    click.echo(
        f"teacher  {config.num_windows} windows of {heard}, {config.embedding_size} dimensions, "
        f"{config.embedding_dtype}"
    )
    click.echo(
        f"size     {show_bytes(num_bytes)} an epoch, {show_bytes(num_bytes / config.num_mixes)} a "
        f"mix, {show_bytes(num_bytes * num_epochs)} in all"
    )
