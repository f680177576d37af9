"""The command ``flsep-precompute``."""

import contextlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from flsep.cache import Mixes, ShardFile, read_index, verify_mixes, verify_shards
from flsep.cache.commands import CommandGroup
from flsep.cache.mixes_folder import holds_mixes
from flsep.pipeline.commands.mixes import describe_mixes, mixes_command
from flsep.pipeline.commands.options import corpus_options, make_plan
from flsep.pipeline.commands.reporting import (
    describe_plan,
    describe_summary,
    describe_teacher,
    progress,
    show_bytes,
    show_hours,
)
from flsep.pipeline.commands.workers import (
    Pair,
    are_workers_chosen,
    choose_workers,
    describe_workers,
    start_workers,
    worker_options,
)
from flsep.pipeline.errors import SettingsError

_FOLDER = click.Path(path_type=Path, file_okay=True)


class _Commands(CommandGroup):
    """The commands of flsep-precompute."""

    interrupted = "stopped; run the same command again to go on"
    extras = "pipeline,demo"


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="flsep", prog_name="flsep-precompute")
def cli() -> None:
    """Turn stems into shards that flsep-train reads.

    Everything that training needs and that can be computed once is computed here: decoded stems,
    their spectra (STFT), a teacher's embeddings, corpus statistics.

    \b
    MUSDB18, on a machine with internet access:
      flsep-precompute run musdb18/ shards/
    Without: export a teacher first, then name it:
      flsep-precompute teacher export musicnn teachers/musicnn
      flsep-precompute run musdb18/ shards/ --teacher teachers/musicnn
    """


@cli.command("plan")
@click.argument("corpus", type=_FOLDER)
@corpus_options
def plan_command(corpus: Path, **options: Any) -> None:
    """Say what `run` would do with CORPUS: tracks, hours, shards, bytes, memory.

    Only the files' headers are read, and nothing is written.

    \b
    Example:
      flsep-precompute plan musdb18/
    """
    found, config, plan = make_plan(corpus, options)
    describe_plan(found, config, plan)
    if plan.rejected:
        raise click.exceptions.Exit(1)


@cli.command("run")
@click.argument("corpus", type=_FOLDER)
@click.argument("shards", type=_FOLDER)
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
    help="Make the shards of one of N parts alone; then index them all with --finalise.",
)
@click.option("--finalise", is_flag=True, help="Write the index of the shards that parts made.")
@click.option("--repair", is_flag=True, help="Try the tracks again that failed before.")
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

    CORPUS is recognised by looking: MUSDB18 (train/ and test/ with *.stem.mp4), MUSDB18-HQ (a
    folder a track), or any folder of tracks with one audio file a source.

    Stopped at any point, the same command goes on where it was: finished shards are checked and
    kept, damaged ones made again. A track that cannot be used is named, the others go on, and the
    exit status is 1. It is not tried again while its files stay the same, but with --repair.

    \b
    Examples:
      flsep-precompute run musdb18/ shards/
      flsep-precompute run songs/ shards/ --sources bass,drums,piano --teacher teachers/musicnn
      flsep-precompute run musdb18/ shards/ --cluster slurm --workers 32 --cluster-option queue=cpu
    """
    from flsep.pipeline.execution.parts import share_tasks
    from flsep.pipeline.shards.build import ShardSettings
    from flsep.pipeline.shards.run import finalise as finalise_run
    from flsep.pipeline.shards.run import find_strangers, run_plan
    from flsep.pipeline.teachers.teacher import Teacher, resolve

    if finalise and (part or repair):
        raise SettingsError("--finalise: makes no shards; leave out --part and --repair")
    found, config, plan = make_plan(corpus, options)
    describe_plan(found, config, plan)
    tasks = share_tasks(plan.tasks, *part) if part else plan.tasks
    if part:
        click.echo(f"part     {part[0]} of {part[1]}: {len(tasks)} shards")
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
        teacher=Teacher.load(handle).info,
        teacher_folder=folder,
        num_threads=1 if workers else None,
    )
    if finalise:
        summary = finalise_run(plan, settings)
    else:
        with contextlib.ExitStack() as stack:
            runner = stack.enter_context(start_workers(workers))
            report = stack.enter_context(progress(tasks, config))
            summary = run_plan(
                plan, settings, runner=runner, report=report, part=part, repair=repair
            )
    describe_summary(summary, shards)
    if part:
        click.echo("when all parts are done, run the same command with --finalise for --part")
    for name in find_strangers(shards, plan):
        click.echo(f"note: {shards / name} belongs to no track of this corpus; delete it", err=True)
    if summary.failed:
        raise click.exceptions.Exit(1)


cli.add_command(mixes_command)


@cli.command("verify")
@click.argument("shards", type=_FOLDER)
@click.option(
    "--against",
    type=_FOLDER,
    metavar="CORPUS",
    help="Compute everything again from CORPUS too, and compare.",
)
@click.option(
    "--teacher",
    metavar="HANDLE",
    help="For --against, where the teacher is now. [default: where it was]",
)
@worker_options
def verify_command(shards: Path, against: Path | None, teacher: str | None, **options: Any) -> None:
    """Read every byte of SHARDS, or of mixes, again and compare it with the digests.

    Use it after copying shards to another machine. The exit status is 1 if anything is wrong.

    With --against, the tracks are decoded, transformed and shown to the teacher again. On the same
    kind of machine and with the same versions the result is the same, bit for bit; otherwise it may
    differ by rounding, which is counted, up to 0.2 % of the largest value.
    """
    from tqdm import tqdm

    if not against and (teacher or are_workers_chosen(options)):
        raise SettingsError("--teacher and options of workers have no effect without --against")
    if holds_mixes(shards):
        if against:
            raise SettingsError(f"--against: {shards} holds mixes; render them again to compare")
        mixes = Mixes(shards)
        sizes, verdicts = mixes.num_bytes, verify_mixes(mixes)
        what = f"{len(sizes)} files, {mixes.num_epochs} epochs of mixes"
    else:
        index = read_index(shards)
        sizes, verdicts = index.shard_bytes, verify_shards(shards)
        what = f"{len(sizes)} shards, {len(index.tracks)} tracks"
    problems = []
    total = sum(sizes.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", dynamic_ncols=True) as bar:
        for verdict in verdicts:
            bar.update(verdict.num_bytes)
            if verdict.problem:
                problems.append(verdict.problem)
    result = f"{len(problems)} damaged" if problems else "all intact"
    click.echo(f"{what}, {show_bytes(total)}: {result}")
    if against and not problems:
        problems = _recheck(shards, against, teacher, options)
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        raise click.exceptions.Exit(1)


def _recheck(shards: Path, corpus: Path, teacher: str | None, options: dict[str, Any]) -> list[str]:
    """Compare shards with their corpus; return what is not equal."""
    from flsep.pipeline.shards.recheck import plan_recheck, recheck_shard

    plan, settings, problems = plan_recheck(shards, corpus, teacher)
    workers = choose_workers(shards.absolute(), options)
    settings = replace(settings, num_threads=1 if workers else None)
    num_entries = num_rounded = 0
    with start_workers(workers) as run, progress(plan.tasks, settings.config) as report:
        for outcome in run(partial(recheck_shard, settings=settings), plan.tasks):
            report(outcome.task, None)
            if isinstance(outcome.error, OSError):
                raise outcome.error
            if outcome.error:
                problems.append(f"{shards / outcome.task.name}: {outcome.error}")
                continue
            num_entries += outcome.result.num_entries
            num_rounded += outcome.result.num_rounded
            problems += outcome.result.problems
    found = f"{len(problems)} differ" if problems else "all equal"
    rounded = f", {num_rounded} of them but for rounding" if num_rounded else ""
    click.echo(f"{num_entries} signals compared with {corpus}: {found}{rounded}")
    return problems


@cli.command("inspect")
@click.argument("shard", type=_FOLDER)
def inspect_command(shard: Path) -> None:
    """Show what a SHARD, a whole folder of them, or a folder of mixes holds.

    \b
    Examples:
      flsep-precompute inspect shards/
      flsep-precompute inspect shards/train-0123456789abcdef.h5
    """
    if holds_mixes(shard):
        mixes = Mixes(shard)
        describe_mixes(mixes.config, mixes.num_epochs)
        click.echo(f"made by  {', '.join(f'{k} {v}' for k, v in mixes.packages.items())}")
        click.echo(f"shards   fingerprint {mixes.config.shards[:12]}")
        return
    if shard.is_dir():
        index = read_index(shard)
        layout, packages, stamp = index.layout, index.packages, index.fingerprint
        rows = [(t.name, t.split, t.num_samples, t.num_windows, t.shard) for t in index.tracks]
        size = sum(index.shard_bytes.values())
        click.echo(f"{shard}: {len(index.shard_bytes)} shards, {show_bytes(size)}")
    else:
        file = ShardFile(shard)
        layout, packages, stamp = file.layout, file.packages, file.fingerprint
        rows = [
            (t.name, t.split, t.num_samples, t.num_windows, ", ".join(t.datasets))
            for t in file.tracks
        ]
        click.echo(f"{shard}: {show_bytes(file.num_bytes)}")
    seconds = sum(row[2] for row in rows) / layout.sample_rate_hz
    click.echo(f"tracks   {len(rows)}, {show_hours(seconds / 3600)}")
    click.echo(f"sources  {', '.join(layout.sources)}")
    click.echo(
        f"audio    {layout.sample_rate_hz} Hz, {layout.num_channels} channels; "
        f"STFT {layout.n_fft}, hop {layout.hop_samples}, {layout.stft_dtype}"
    )
    click.echo(
        f"teacher  {layout.teacher} (sha256 {layout.teacher_digest[:12]}), {layout.embedding_size} "
        f"dimensions, a window of {layout.window_seconds:g} s every {layout.window_hop_seconds:g} s"
    )
    click.echo(f"made by  {', '.join(f'{name} {version}' for name, version in packages.items())}")
    click.echo(f"config   fingerprint {stamp[:12]}")
    for name, split, num_samples, num_windows, rest in rows:
        seconds = num_samples / layout.sample_rate_hz
        click.echo(f"  {split:5} {seconds:8.1f} s {num_windows:5} windows  {name}  [{rest}]")


@cli.group("teacher")
def teacher_group() -> None:
    """Get a teacher: the model whose embeddings inform the separator."""


@teacher_group.command("fetch")
@click.argument("handle")
@click.argument("out", type=_FOLDER)
def fetch_command(handle: str, out: Path) -> None:
    """Download the SavedModel HANDLE (vggish, or an address) into the folder OUT.

    Do it where there is internet access, then give OUT as --teacher to machines without.
    """
    from flsep.pipeline.teachers.teacher import fetch

    fetch(handle, out)
    click.echo(f"{out}: fetched from {handle}; use it with --teacher {out}")


@teacher_group.group("export")
def export_group() -> None:
    """Build a teacher from a checkpoint, where TF-Hub cannot be reached."""


@export_group.command("vggish")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    required=True,
    help="Google's released vggish_model.ckpt.",
)
@click.argument("out", type=_FOLDER)
def export_vggish_command(checkpoint: Path, out: Path) -> None:
    """Build the TF-Hub module google/vggish/1 in OUT from Google's checkpoint."""
    from flsep.pipeline.teachers.export import check_vggish, export_vggish

    describe_teacher(export_vggish(checkpoint, out), out)
    check = check_vggish(out)
    click.echo(
        f"a 3 s sine of 1 kHz gives embeddings of mean {check.mean:.4f}, standard deviation "
        f"{check.standard_deviation:.3f}"
    )
    if not check.is_released:
        click.echo("warning: these are not the weights that Google released", err=True)


@export_group.command("musicnn")
@click.option(
    "--wheel",
    type=click.Path(path_type=Path),
    help="The package file of musicnn 0.1.0, where pip cannot download it.",
)
@click.argument("out", type=_FOLDER)
def export_musicnn_command(out: Path, wheel: Path | None) -> None:
    """Build a teacher in OUT from the checkpoint MTT_vgg of the package musicnn 0.1.0 (ISC).

    A pretrained music tagger that any machine with access to PyPI can have.
    """
    from flsep.pipeline.teachers.export import export_musicnn

    describe_teacher(export_musicnn(out, wheel=wheel), out)


@cli.command("demo-corpus")
@click.argument("out", type=_FOLDER)
@click.option("--tracks", type=int, default=14, show_default=True, help="Songs, at least 3.")
@click.option("--seconds", type=float, default=24.0, show_default=True, help="Of each song.")
@click.option("--seed", type=int, default=0, show_default=True, help="Other seed, other songs.")
@click.option(
    "--example/--no-example",
    default=True,
    show_default=True,
    help="Add the one real MUSDB18 track that the package stempeg carries to the test split.",
)
def demo_corpus_command(out: Path, tracks: int, seconds: float, seed: int, example: bool) -> None:
    """Render a small corpus in MUSDB18-HQ's shape into OUT, to try flsep on.

    Composed songs with drums, bass, other and a singing voice; the same options give the same
    files.
    """
    from flsep.pipeline.demo.corpus import render_corpus

    render_corpus(
        out, num_tracks=tracks, seconds=seconds, seed=seed, example=example, progress=click.echo
    )


def main() -> None:
    """Run the command."""
    cli.main()
