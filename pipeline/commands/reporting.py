"""What the commands say: plans, progress, summaries."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flsep.pipeline.config import WORKER_BYTES, FeatureConfig

if TYPE_CHECKING:
    from flsep.pipeline.corpus.tracks import Corpus
    from flsep.pipeline.shards.plan import Plan, ShardTask
    from flsep.pipeline.shards.run import RunSummary


def describe_plan(corpus: "Corpus", config: FeatureConfig, plan: "Plan") -> None:
    """Say what would be done; rejected tracks go to stderr."""
    hours = sum(task.audio_seconds(config.sample_rate_hz) for task in plan.tasks) / 3600
    splits = [planned.track.split for planned in plan.tracks]
    counts = ", ".join(f"{splits.count(s)} {s}" for s in ("train", "valid", "test") if s in splits)
    click.echo(f"corpus   {corpus.root} ({corpus.kind}), sources {', '.join(corpus.sources)}")
    click.echo(f"tracks   {len(splits)} ({counts}), {show_hours(hours)} of mixtures")
    click.echo(f"shards   {len(plan.tasks)}, {show_bytes(plan.num_bytes)} in all")
    click.echo(f"memory   {show_bytes(WORKER_BYTES)} a worker, with a teacher of VGGish's size")
    for name, reason in plan.rejected:
        click.echo(f"rejected {name}: {reason}", err=True)


@contextmanager
def progress(
    tasks: Sequence["ShardTask"], config: FeatureConfig
) -> Iterator[Callable[["ShardTask", Any], None]]:
    """Show tracks, hours of audio a minute, and the time left."""
    from tqdm import tqdm

    start = time.monotonic()
    done_seconds = 0.0
    total = sum(task.audio_seconds(config.sample_rate_hz) for task in tasks)
    num_all = sum(len(task.tracks) for task in tasks)
    with tqdm(
        total=total / 3600,
        unit="h",
        desc="tracks",
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
                f"{num_tracks}/{num_all} tracks, {rate:.2g} audio h/min", refresh=False
            )
            bar.update(min(seconds / 3600, bar.total - bar.n))
            for name, reason in shard.rejected if shard else ():
                bar.write(f"rejected {name}: {reason}", file=sys.stderr)

        yield report


def describe_summary(summary: "RunSummary", shards: Path) -> None:
    """Say what was done, how fast, and what failed."""
    num_stored = summary.num_made + summary.num_kept
    speed = summary.audio_seconds / summary.wall_seconds
    click.echo(
        f"stored   {num_stored} tracks in {shards} ({summary.num_kept} were there already) in "
        f"{summary.wall_seconds:.1f} s: {speed:.1f} audio seconds a second"
    )
    describe_time(summary.seconds)
    for problem in summary.renewed:
        click.echo(f"renewed  {problem}", err=True)
    if summary.failed:
        click.echo(f"failed   {len(summary.failed)} tracks:", err=True)
        for name, reason in summary.failed:
            click.echo(f"  {name}: {reason}", err=True)


def describe_time(seconds: dict[str, float]) -> None:
    """Say what share of the workers' time each part took; loading the teacher does not count."""
    parts = {part: spent for part, spent in sorted(seconds.items()) if part != "load"}
    if total := sum(parts.values()):
        shares = (f"{part} {100 * spent / total:.0f} %" for part, spent in parts.items())
        click.echo(f"time     {', '.join(shares)}")


def describe_teacher(info: Any, out: Path) -> None:
    """Say what an exported teacher is and how to use it."""
    window, hop = (n / info.sample_rate_hz for n in (info.window_samples, info.hop_samples))
    click.echo(
        f"{out}: {info.dim} dimensions, a window of {window:g} s every {hop:g} s, "
        f"sha256 {info.digest[:12]}; use it with --teacher {out}"
    )


def show_bytes(num_bytes: float) -> str:
    """Write a number of bytes with its unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"


def show_hours(hours: float) -> str:
    """Write hours, or minutes where they are few."""
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
