"""The command ``flsep-precompute mixes``."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flsep.cache import SPLITS, MixesConfig, Shards
from flsep.cache.mixes_file import EMBEDDING_DTYPES
from flsep.pipeline.commands.reporting import describe_time, show_bytes, show_hours
from flsep.pipeline.commands.workers import (
    Pair,
    choose_workers,
    describe_workers,
    start_workers,
    worker_options,
)

if TYPE_CHECKING:
    from flsep.pipeline.mixes.run import MixesSummary
    from flsep.pipeline.mixes.task import MixesReport, MixesTask

_FOLDER = click.Path(path_type=Path, file_okay=True)


@click.command("mixes")
@click.argument("shards", type=_FOLDER)
@click.argument("out", type=_FOLDER)
@click.option(
    "--epochs",
    type=click.IntRange(min=1),
    required=True,
    help="How many; a longer training begins again with the first. More can be added later.",
)
@click.option(
    "--excerpts-per-track",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="An epoch has this many mixes for each track.",
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
    "--split", type=click.Choice(SPLITS), default="train", show_default=True, help="What to mix."
)
@click.option("--min-gain", type=float, default=0.25, show_default=True, help="Of a source.")
@click.option("--max-gain", type=float, default=1.25, show_default=True, help="Of a source.")
@click.option(
    "--swap-probability",
    type=float,
    default=0.5,
    show_default=True,
    help="Of reversing the order of a source's channels.",
)
@click.option("--stems", is_flag=True, help="Let the teacher hear each scaled stem of a mix too.")
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
    help="Make one of N parts alone; the same command without it then writes the index.",
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
    """Render random mixes of the tracks of SHARDS, and write what the teacher hears to OUT.

    Each source of a mix comes from a random track, at a random position, with its own gain and
    channel swap. A mix takes a few kilobytes: its recipe, and the teacher's embedding of the
    mixture. `flsep-train fit SHARDS --mixing rendered --mixes OUT` mixes the same again from
    SHARDS. So each approach can be trained on random mixes, concat too.

    Stopped at any point, the same command goes on where it was.

    \b
    Examples:
      flsep-precompute mixes shards/ mixes/ --epochs 20
      flsep-precompute mixes shards/ mixes/ --epochs 100 --cluster slurm --workers 16
    """
    from flsep.pipeline.execution.parts import share_tasks
    from flsep.pipeline.mixes.run import make_config, plan_mixes, run_mixes
    from flsep.pipeline.mixes.task import MixesSettings
    from flsep.pipeline.teachers.teacher import Teacher, resolve

    workers = choose_workers(out.absolute(), options)
    opened = Shards(shards.absolute(), verify=verify)
    opened.check_files(options["split"])
    handle = teacher or opened.layout.teacher
    folder = resolve(handle).absolute()
    info = Teacher.load(str(folder)).info
    config = make_config(
        opened,
        info,
        excerpt_seconds=seconds,
        excerpts_per_track=excerpts_per_track,
        with_stems=stems,
        **{
            name: options[name]
            for name in (
                "split", "seed", "min_gain", "max_gain", "swap_probability", "embedding_dtype"
            )
        },
    )  # fmt: skip
    tasks: Sequence[MixesTask] = plan_mixes(config, epochs)
    describe_mixes(config, epochs)
    if part:
        tasks = share_tasks(tasks, *part)
        click.echo(f"part     {part[0]} of {part[1]}: {len(tasks)} files")
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
    with contextlib.ExitStack() as stack:
        runner = stack.enter_context(start_workers(workers))
        report = stack.enter_context(_progress(tasks))
        summary = run_mixes(epochs, settings, runner=runner, report=report, part=part)
    _describe_summary(summary, out)
    if part:
        click.echo("when all parts are done, run the same command without --part")
    if summary.failed:
        raise click.exceptions.Exit(1)


def describe_mixes(config: MixesConfig, num_epochs: int) -> None:
    """Say what some epochs of mixes are, and what they take."""
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


@contextlib.contextmanager
def _progress(tasks: "Sequence[MixesTask]") -> "Iterator[Callable[[MixesTask, Any], None]]":
    from tqdm import tqdm

    total = sum(len(task.indices) for task in tasks)
    with tqdm(total=total, unit=" mixes", dynamic_ncols=True, mininterval=0.5) as bar:

        def report(task: "MixesTask", mixes: "MixesReport | None") -> None:
            bar.update(len(task.indices))

        yield report


def _describe_summary(summary: "MixesSummary", out: Path) -> None:
    speed = summary.num_made / summary.wall_seconds
    click.echo(
        f"rendered {summary.num_made + summary.num_kept} mixes in {out} ({summary.num_kept} were "
        f"there already) in {summary.wall_seconds:.1f} s: {speed:.1f} mixes a second"
    )
    describe_time(summary.seconds)
    for problem in summary.renewed:
        click.echo(f"renewed  {problem}", err=True)
    for name, reason in summary.failed:
        click.echo(f"failed   {name}: {reason}", err=True)
