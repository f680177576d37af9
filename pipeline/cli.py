"""The command ``flsep-precompute``."""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from flsep.cache import CacheError, ShardFile, read_index, verify_shards
from flsep.pipeline.config import FeatureConfig

if TYPE_CHECKING:
    from flsep.pipeline.plan import Plan, ShardTask
    from flsep.pipeline.run import RunSummary
    from flsep.pipeline.tracks import Corpus

Command = TypeVar("Command", bound=Callable[..., Any])
DEFAULTS = FeatureConfig()
_FOLDER = click.Path(path_type=Path, file_okay=True)
_SIZES = {"K": 10, "M": 20, "G": 30, "T": 40}


class _Size(click.ParamType):
    """A number of bytes such as 1G or 500M."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        text = str(value).upper().removesuffix("B").removesuffix("I")
        factor = 1 << _SIZES[text[-1]] if text and text[-1] in _SIZES else 1
        try:
            return int(float(text.rstrip("KMGT")) * factor)
        except ValueError:
            self.fail(f"{value!r} is no size; write 500M or 1G", param, ctx)


class _Names(click.ParamType):
    """Names separated by commas."""

    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(name.strip() for name in value.split(",") if name.strip())


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
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


def _corpus_options(command: Command) -> Command:
    """Add the options that decide what the shards hold."""
    options = [
        click.option(
            "--sources",
            type=_Names(),
            metavar="A,B,...",
            help="Names of the sources, as the files are named. [default: drums,bass,other,vocals]",
        ),
        click.option(
            "--valid-fraction",
            type=float,
            help="Share of the training tracks to hold out for validation. [default: MUSDB's own "
            "14 tracks, a folder valid/, or else 0.1]",
        ),
        click.option(
            "--test-fraction",
            type=float,
            default=DEFAULTS.test_fraction,
            show_default=True,
            help="Share to hold out for testing, for a corpus without a folder test/.",
        ),
        click.option(
            "--seed",
            type=int,
            default=DEFAULTS.seed,
            show_default=True,
            help="Draws the tracks that are held out.",
        ),
        click.option(
            "--sample-rate",
            type=int,
            default=DEFAULTS.sample_rate_hz,
            show_default=True,
            help="Hz; audio of another rate is resampled.",
        ),
        click.option(
            "--channels",
            type=int,
            default=DEFAULTS.num_channels,
            show_default=True,
            help="Mono is copied to this many channels.",
        ),
        click.option(
            "--n-fft",
            type=int,
            default=DEFAULTS.n_fft,
            show_default=True,
            help="Window of the STFT, samples.",
        ),
        click.option(
            "--hop",
            type=int,
            default=DEFAULTS.hop_samples,
            show_default=True,
            help="Hop of the STFT, samples.",
        ),
        click.option(
            "--stft-dtype",
            type=click.Choice(["float16", "float32"]),
            default=DEFAULTS.stft_dtype,
            show_default=True,
            help="float16 halves the size and keeps about 80 dB.",
        ),
        click.option(
            "--audio-splits",
            type=_Names(),
            default=",".join(DEFAULTS.audio_splits),
            show_default=True,
            help="Splits to store the audio of, which flsep-train evaluate needs.",
        ),
        click.option(
            "--shard-size",
            type=_Size(),
            default="1G",
            show_default=True,
            help="Gather short tracks of a split into shards of about this size.",
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _make_plan(corpus: Path, options: dict[str, Any]) -> tuple["Corpus", FeatureConfig, "Plan"]:
    from flsep.pipeline.plan import plan_shards
    from flsep.pipeline.tracks import find_corpus

    config = FeatureConfig(
        sample_rate_hz=options["sample_rate"],
        num_channels=options["channels"],
        n_fft=options["n_fft"],
        hop_samples=options["hop"],
        stft_dtype=options["stft_dtype"],
        audio_splits=options["audio_splits"],
        valid_fraction=options["valid_fraction"],
        test_fraction=options["test_fraction"],
        seed=options["seed"],
    )
    found = find_corpus(
        corpus.absolute(),  # workers elsewhere have other working directories
        sources=options["sources"],
        valid_fraction=config.valid_fraction,
        test_fraction=config.test_fraction,
        seed=config.seed,
        num_channels=config.num_channels,
    )
    return found, config, plan_shards(found, config, shard_bytes=options["shard_size"])


def _describe_plan(corpus: "Corpus", config: FeatureConfig, plan: "Plan") -> None:
    hours = sum(task.audio_seconds(config.sample_rate_hz) for task in plan.tasks) / 3600
    splits = [planned.track.split for planned in plan.tracks]
    counts = ", ".join(f"{splits.count(s)} {s}" for s in ("train", "valid", "test") if s in splits)
    click.echo(f"corpus   {corpus.root} ({corpus.kind}), sources {', '.join(corpus.sources)}")
    click.echo(f"tracks   {len(splits)} ({counts}), {_show_hours(hours)} of mixtures")
    click.echo(f"shards   {len(plan.tasks)}, {_show_bytes(plan.num_bytes)} in all")
    click.echo(
        f"memory   {_show_bytes(plan.worker_bytes)} a worker, beyond TensorFlow and the teacher"
    )
    for name, reason in plan.rejected:
        click.echo(f"rejected {name}: {reason}", err=True)


@cli.command("plan")
@click.argument("corpus", type=_FOLDER)
@_corpus_options
def plan_command(corpus: Path, **options: Any) -> None:
    """Say what `run` would do with CORPUS: tracks, hours, shards, bytes, memory.

    Only the files' headers are read, and nothing is written.

    \b
    Example:
      flsep-precompute plan musdb18/
    """
    found, config, plan = _make_plan(corpus, options)
    _describe_plan(found, config, plan)
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
    "--workers",
    type=click.IntRange(min=0),
    default=lambda: len(os.sched_getaffinity(0)),
    show_default="number of cores",
    help="Worker processes on this machine; 0 does the work in this process, without Dask.",
)
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Use the workers of a Dask scheduler that is running, such as tcp://node1:8786. They "
    "must see CORPUS, SHARDS and the teacher under the same paths.",
)
@_corpus_options
def run_command(
    corpus: Path, shards: Path, teacher: str, workers: int, scheduler: str | None, **options: Any
) -> None:
    """Compute everything for CORPUS and write it to the folder SHARDS.

    CORPUS is recognised by looking: MUSDB18 (train/ and test/ with *.stem.mp4), MUSDB18-HQ (a
    folder a track), or any folder of tracks with one audio file a source.

    Stopped at any point, the same command goes on where it was: finished shards are checked and
    kept. A track that cannot be used is named, the others go on, and the exit status is 1.

    \b
    Examples:
      flsep-precompute run musdb18/ shards/
      flsep-precompute run songs/ shards/ --sources bass,drums,piano --teacher teachers/musicnn
    """
    from flsep.pipeline.build import ShardSettings
    from flsep.pipeline.execute import local_client, remote_client, run_inline, run_on
    from flsep.pipeline.run import find_strangers, run_plan
    from flsep.pipeline.teacher import Teacher, resolve

    found, config, plan = _make_plan(corpus, options)
    _describe_plan(found, config, plan)
    if not scheduler:
        _require_memory(plan, workers)
    folder = resolve(teacher).absolute()
    handle = str(folder) if Path(teacher).is_dir() else teacher
    cores = len(os.sched_getaffinity(0))
    settings = ShardSettings(
        folder=shards.absolute(),
        config=config,
        sources=found.sources,
        teacher=Teacher.load(handle, num_threads=cores).info,
        teacher_folder=folder,
        num_threads=max(1, cores // max(workers, 1)),
    )
    with contextlib.ExitStack() as stack:
        run: Any = run_inline
        if scheduler or workers:
            connect = remote_client(scheduler) if scheduler else local_client(workers)
            client = stack.enter_context(connect)
            click.echo(f"workers  {_describe_client(client)}")
            run = partial(run_on, client)
        report = stack.enter_context(_progress(plan, config))
        summary = run_plan(plan, settings, runner=run, report=report)
    _describe_summary(summary, shards)
    for name in find_strangers(shards, plan):
        click.echo(f"note: {shards / name} belongs to no track of this corpus; delete it", err=True)
    if summary.failed:
        raise click.exceptions.Exit(1)


def _describe_client(client: Any) -> str:
    information = client.scheduler_info(n_workers=-1)
    place = f"{len(information['workers'])} at {client.scheduler.address}"
    has_dashboard = "dashboard" in information["services"]
    return f"{place}, dashboard {client.dashboard_link}" if has_dashboard else place


def _require_memory(plan: "Plan", workers: int) -> None:
    """Refuse a plan that does not fit into this machine's free memory before it starts."""
    # A worker's own use: TensorFlow with VGGish and its activations for 128 windows, measured.
    needed = max(workers, 1) * (plan.worker_bytes + (2 << 30))
    with open("/proc/meminfo", encoding="ascii") as file:
        fields = dict(line.split(":") for line in file)
    available = int(fields["MemAvailable"].split()[0]) << 10
    if needed > available:
        raise ValueError(
            f"{max(workers, 1)} worker(s) need about {_show_bytes(needed)} of memory, "
            f"{_show_bytes(available)} are free; use fewer --workers, or split the longest tracks"
        )


@contextmanager
def _progress(plan: "Plan", config: FeatureConfig) -> Iterator[Callable[["ShardTask", Any], None]]:
    """Show tracks, hours of audio a minute, and the time left."""
    from tqdm import tqdm

    start = time.monotonic()
    done_seconds = 0.0
    total = sum(task.audio_seconds(config.sample_rate_hz) for task in plan.tasks)
    with tqdm(
        total=total / 3600,
        unit="h",
        desc="precompute",
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} h "
        "[{elapsed}<{remaining}{postfix}]",
        dynamic_ncols=True,
        mininterval=0.5,
    ) as bar:
        num_tracks = 0

        def report(task: "ShardTask", shard: Any) -> None:
            nonlocal done_seconds, num_tracks
            seconds = task.audio_seconds(config.sample_rate_hz)
            num_tracks += len(task.tracks)
            done_seconds += seconds
            rate = done_seconds / 60 / (time.monotonic() - start)
            bar.set_postfix_str(
                f"{num_tracks}/{len(plan.tracks)} tracks, {rate:.2g} audio h/min", refresh=False
            )
            bar.update(min(seconds / 3600, bar.total - bar.n))
            for name, reason in shard.rejected if shard else ():
                bar.write(f"rejected {name}: {reason}", file=sys.stderr)

        yield report


def _describe_summary(summary: "RunSummary", shards: Path) -> None:
    num_stored = summary.num_made + summary.num_kept
    speed = summary.audio_seconds / summary.wall_seconds
    click.echo(
        f"stored   {num_stored} tracks in {shards} ({summary.num_kept} were there already) in "
        f"{summary.wall_seconds:.1f} s: {speed:.1f} audio seconds a second"
    )
    parts = {part: seconds for part, seconds in summary.seconds.items() if part != "load"}
    if total := sum(parts.values()):
        split = ", ".join(f"{part} {100 * s / total:.0f} %" for part, s in sorted(parts.items()))
        click.echo(f"time     {split}")
    if summary.failed:
        click.echo(f"failed   {len(summary.failed)} tracks:", err=True)
        for name, reason in summary.failed:
            click.echo(f"  {name}: {reason}", err=True)


@cli.command("verify")
@click.argument("shards", type=_FOLDER)
def verify_command(shards: Path) -> None:
    """Read every byte of SHARDS again and compare it with the digests.

    Use it after copying shards to another machine. The exit status is 1 if anything is wrong.
    """
    from tqdm import tqdm

    index = read_index(shards)
    problems = []
    total = sum(index.shard_bytes.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", dynamic_ncols=True) as bar:
        for verdict in verify_shards(shards):
            bar.update(verdict.num_bytes)
            if verdict.problem:
                problems.append(verdict.problem)
    for problem in problems:
        click.echo(problem, err=True)
    click.echo(
        f"{len(index.shard_bytes)} shards, {len(index.tracks)} tracks, {_show_bytes(total)}: "
        + (f"{len(problems)} damaged" if problems else "all intact")
    )
    if problems:
        raise click.exceptions.Exit(1)


@cli.command("inspect")
@click.argument("shard", type=_FOLDER)
def inspect_command(shard: Path) -> None:
    """Show what a SHARD, or a whole folder of them, holds.

    \b
    Examples:
      flsep-precompute inspect shards/
      flsep-precompute inspect shards/train-0123456789abcdef.h5
    """
    if shard.is_dir():
        index = read_index(shard)
        layout, packages, stamp = index.layout, index.packages, index.fingerprint
        rows = [(t.name, t.split, t.num_samples, t.num_windows, t.shard) for t in index.tracks]
        size = sum(index.shard_bytes.values())
        click.echo(f"{shard}: {len(index.shard_bytes)} shards, {_show_bytes(size)}")
    else:
        file = ShardFile(shard)
        layout, packages, stamp = file.layout, file.packages, file.fingerprint
        rows = [
            (t.name, t.split, t.num_samples, t.num_windows, ", ".join(t.datasets))
            for t in file.tracks
        ]
        click.echo(f"{shard}: {_show_bytes(file.num_bytes)}")
    seconds = sum(row[2] for row in rows) / layout.sample_rate_hz
    click.echo(f"tracks   {len(rows)}, {_show_hours(seconds / 3600)}")
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
    from flsep.pipeline.teacher import fetch

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
    from flsep.pipeline.export import check_vggish, export_vggish

    _describe_teacher(export_vggish(checkpoint, out), out)
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
    from flsep.pipeline.export import export_musicnn

    _describe_teacher(export_musicnn(out, wheel=wheel), out)


def _describe_teacher(info: Any, out: Path) -> None:
    window, hop = (n / info.sample_rate_hz for n in (info.window_samples, info.hop_samples))
    click.echo(
        f"{out}: {info.dim} dimensions, a window of {window:g} s every {hop:g} s, "
        f"sha256 {info.digest[:12]}; use it with --teacher {out}"
    )


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
    from flsep.pipeline.demo_corpus import render_corpus

    render_corpus(
        out, num_tracks=tracks, seconds=seconds, seed=seed, example=example, progress=click.echo
    )


def _show_bytes(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"


def _show_hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"


def main() -> None:
    """Run the command; an expected failure is one line and exit status 1."""
    try:
        sys.exit(cli.main(standalone_mode=False))
    except (click.exceptions.Abort, KeyboardInterrupt):
        click.echo("\nstopped; run the same command again to go on", err=True)
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except OSError as error:
        click.echo(f"Error: {_explain(error)}", err=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        extras = "pipeline,demo" if "demo-corpus" in sys.argv else "pipeline"
        click.echo(f"Error: {error.name} is missing; run `pip install 'flsep[{extras}]'`", err=True)
        sys.exit(1)
    except (CacheError, ValueError) as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(1)


def _explain(error: OSError) -> str:
    """Say in one line what the system refused."""
    text = " ".join(str(error).split())
    if error.errno == errno.ENOSPC or "No space left on device" in text:
        return (
            f"the disk is full ({error.filename or 'while writing a shard'}); "
            "free some space and run again, finished shards are kept"
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return f"{error.filename}: not writable; choose another folder"
    return text
