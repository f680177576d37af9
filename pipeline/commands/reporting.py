"""Print plans, progress and summaries."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from flsep.pipeline.config import WORKER_BYTES, FeatureConfig

if TYPE_CHECKING:
    from flsep.pipeline.corpus.tracks import Corpus
    from flsep.pipeline.execution.stage import Summary, TaskReport
    from flsep.pipeline.shards.plan import Plan
    from flsep.pipeline.teachers.interface import TeacherInfo

Task = TypeVar("Task")


def describe_plan(corpus: "Corpus", config: FeatureConfig, plan: "Plan") -> None:
    """Print the plan; rejected tracks go to stderr."""
    hours = sum(task.audio_seconds(config.sample_rate_hz) for task in plan.tasks) / 3600
    # Splits without tracks are left out of the counts.
    splits = [planned.track.split for planned in plan.tracks]
    counts = ", ".join(f"{splits.count(s)} {s}" for s in ("train", "valid", "test") if s in splits)
    click.echo(f"corpus   {corpus.root} ({corpus.kind}), sources {', '.join(corpus.sources)}")
    click.echo(f"tracks   {len(splits)} ({counts}), {show_hours(hours)} of mixtures")
    click.echo(f"shards   {len(plan.tasks)}, {show_bytes(plan.num_bytes)} in all")
    click.echo(f"memory   {show_bytes(WORKER_BYTES)} a worker, with a teacher of VGGish's size")
    # Stdout keeps the plan alone, so that it can be piped into a file.
    for name, reason in plan.rejected:
        click.echo(f"rejected {name}: {reason}", err=True)


def describe_part(part: tuple[int, int] | None, num_tasks: int, noun: str) -> None:
    """Print which part of an array job this is."""
    if part:
        click.echo(f"part     {part[0]} of {part[1]}: {num_tasks} {noun}")


@contextmanager
def show_progress(
    tasks: Sequence[Task],
    noun: str,
    *,
    count: Callable[[Task], int],
    audio_seconds: Callable[[Task], float],
) -> Iterator[Callable[[Task, "TaskReport | None"], None]]:
    """Show a bar of hours of audio, with items, hours a minute and the time left.

    Parameters
    ----------
    tasks : sequence
        All tasks.
    noun : str
        Plural of the items, such as "tracks".
    count, audio_seconds : callable
        Return how many items a task has, and their length.

    Yields
    ------
    callable
        To be called with each task that has ended and its report.
    """
    from tqdm import tqdm

    # Hours of audio, not tasks, measure the work: tasks differ widely in length.
    start = time.monotonic()
    num_all = sum(map(count, tasks))
    num_done, seconds_done = 0, 0.0
    with tqdm(
        total=sum(map(audio_seconds, tasks)) / 3600,
        unit="h",
        desc=noun,
        bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} h "
        "[{elapsed}<{remaining}{postfix}]",
        dynamic_ncols=True,
        mininterval=0.5,
    ) as bar:

        def report(task: Task, result: "TaskReport | None") -> None:
            # A task that failed has no report, and counts as done all the same.
            nonlocal num_done, seconds_done
            num_done += count(task)
            seconds_done += audio_seconds(task)
            rate = seconds_done / 60 / (time.monotonic() - start)
            bar.set_postfix_str(
                f"{num_done}/{num_all} {noun}, {rate:.2g} audio h/min", refresh=False
            )
            # Rounding must not carry the bar beyond its total.
            bar.update(min(audio_seconds(task) / 3600, bar.total - bar.n))
            # `bar.write` prints above the bar; a plain print would break it.
            for name, reason in result.rejected if result else ():
                bar.write(f"rejected {name}: {reason}", file=sys.stderr)

        yield report


def describe_summary(
    summary: "Summary", folder: Path, *, verb: str, noun: str, failing: str, speed: str
) -> None:
    """Print what was done, how fast, and what failed.

    Parameters
    ----------
    summary : Summary
        Result of the run.
    folder : Path
        Output folder.
    verb, noun, failing : str
        What happened to which items, and what is listed in `Summary.failed`.
    speed : str
        How fast, in a unit that suits the items.
    """
    click.echo(
        f"{verb:8} {summary.num_made + summary.num_kept} {noun} in {folder} ({summary.num_kept} "
        f"were there already) in {summary.wall_seconds:.1f} s: {speed}"
    )
    describe_time(summary.seconds)
    # Problems go to stderr, even those that this run has repaired.
    for problem in summary.renewed:
        click.echo(f"renewed  {problem}", err=True)
    if summary.failed:
        click.echo(f"failed   {len(summary.failed)} {failing}:", err=True)
        for name, reason in summary.failed:
            click.echo(f"  {name}: {reason}", err=True)


def describe_time(seconds: dict[str, float]) -> None:
    """Print the share of each phase in the workers' time, without loading the teacher."""
    # Each worker loads the teacher once, which would hide the other phases in short runs.
    phases = {phase: spent for phase, spent in sorted(seconds.items()) if phase != "load"}
    if total := sum(phases.values()):
        shares = (f"{phase} {100 * spent / total:.0f} %" for phase, spent in phases.items())
        click.echo(f"time     {', '.join(shares)}")


def describe_teacher(info: "TeacherInfo", out: Path) -> None:
    """Print what an exported teacher is and how to use it."""
    window, hop = (n / info.sample_rate_hz for n in (info.window_samples, info.hop_samples))
    click.echo(
        f"{out}: {info.dim} dimensions, a window of {window:g} s every {hop:g} s, "
        f"sha256 {info.digest[:12]}; use it with --teacher {out}"
    )


def show_bytes(num_bytes: float) -> str:
    """Format a number of bytes with its unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.3g} TiB"


def show_hours(hours: float) -> str:
    """Format hours, or minutes below one hour."""
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
