"""The commands ``flsep-precompute plan`` and ``flsep-precompute run``."""

from pathlib import Path
from typing import Any

import click

from flsep.pipeline.commands.options import corpus_options, make_plan
from flsep.pipeline.commands.parameter_types import FOLDER, Pair
from flsep.pipeline.commands.reporting import (
    describe_part,
    describe_plan,
    describe_summary,
    show_progress,
)
from flsep.pipeline.commands.stages import run_with_workers
from flsep.pipeline.commands.worker_options import choose_workers, describe_workers, worker_options
from flsep.pipeline.errors import SettingsError


@click.command("plan")
@click.argument("corpus", type=FOLDER)
@corpus_options
def plan_command(corpus: Path, **options: Any) -> None:
    """Show what `run` would do with CORPUS: tracks, hours, shards, bytes, memory.

    Only the headers of the files are read, and nothing is written.

    \b
    Example:
      flsep-precompute plan musdb18/
    """
    found, config, plan = make_plan(corpus, options)
    describe_plan(found, config, plan)
    if plan.rejected:
        raise click.exceptions.Exit(1)


@click.command("run")
@click.argument("corpus", type=FOLDER)
@click.argument("shards", type=FOLDER)
@click.option(
    "--teacher",
    default="vggish",
    show_default=True,
    metavar="HANDLE",
    help="vggish (from TF-Hub), the address of a SavedModel, or a folder that holds one.",
)
@click.option(
    "--part",
    type=Pair("/"),
    metavar="I/N",
    help="Make only the shards of part I of N; index all parts later with --finalise.",
)
@click.option("--finalise", is_flag=True, help="Write the index of the shards that parts made.")
@click.option("--repair", is_flag=True, help="Try tracks again that failed before.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Show the plan, and the script of the jobs that would be submitted.",
)
@worker_options
@corpus_options
def run_command(
    corpus: Path,
    shards: Path,
    teacher: str,
    part: tuple[int, int] | None,
    finalise: bool,
    repair: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Compute everything for CORPUS and write it to the folder SHARDS.

    The kind of CORPUS is recognised: MUSDB18 (train/ and test/ with *.stem.mp4), MUSDB18-HQ (a
    folder a track), or any folder of tracks with one audio file a source.

    If a run is stopped, the same command resumes it: finished shards are checked and kept, damaged
    ones made again. A track that cannot be used is named, the others are stored, and the exit
    status is 1. Such a track is skipped while its files stay the same, except with --repair.

    \b
    Examples:
      flsep-precompute run musdb18/ shards/
      flsep-precompute run songs/ shards/ --sources bass,drums,piano --teacher teachers/musicnn
      flsep-precompute run musdb18/ shards/ --cluster slurm --workers 32 --cluster-option queue=cpu
    """
    from flsep.pipeline.execution.parts import tasks_of_part
    from flsep.pipeline.shards.run import finalise as finalise_shards
    from flsep.pipeline.shards.run import find_unplanned, shards_stage
    from flsep.pipeline.shards.settings import ShardSettings
    from flsep.pipeline.teachers.loading import load_teacher
    from flsep.pipeline.teachers.model_folder import resolve

    if finalise and (part or repair):
        raise SettingsError("--finalise: makes no shards; leave out --part and --repair")
    found, config, plan = make_plan(corpus, options)
    describe_plan(found, config, plan)
    tasks = tasks_of_part(plan.tasks, *part) if part else plan.tasks
    describe_part(part, len(tasks), "shards")
    workers = choose_workers(shards.absolute(), options)
    if dry_run:
        describe_workers(workers)
        return
    folder = resolve(teacher).absolute()
    handle = str(folder) if Path(teacher).is_dir() else teacher
    settings = ShardSettings(
        folder=shards.absolute(),
        config=config,
        sources=found.sources,
        teacher=load_teacher(handle).info,
        teacher_folder=folder,
        num_threads=1 if workers else None,
    )
    if finalise:
        summary = finalise_shards(plan, settings)
    else:
        progress = show_progress(
            tasks,
            "tracks",
            count=lambda task: len(task.tracks),
            audio_seconds=lambda task: task.audio_seconds(config.sample_rate_hz),
        )
        stage = shards_stage(plan, settings, repair=repair)
        summary = run_with_workers(stage, tasks, workers, progress, is_part=bool(part))
    speed = summary.audio_seconds / summary.wall_seconds
    describe_summary(
        summary,
        shards,
        verb="stored",
        noun="tracks",
        failing="tracks",
        speed=f"{speed:.1f} audio seconds a second",
    )
    if part:
        click.echo(
            "when all parts have finished, run the same command with --finalise in place of --part"
        )
    for name in find_unplanned(shards, plan):
        click.echo(f"note: {shards / name} belongs to no track of this corpus; delete it", err=True)
    if summary.failed:
        raise click.exceptions.Exit(1)
