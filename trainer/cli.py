"""The program ``flsep-train``.

Heavy packages are imported inside the commands, so that ``--help`` answers at once.
"""

import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from flsep.cache.commands import CommandGroup
from flsep.cache.errors import FlsepError
from flsep.trainer.errors import EvaluationError, InferenceError
from flsep.trainer.registry import APPROACHES, ENGINES

_FOLDER = click.Path(file_okay=False, path_type=Path)
_ANY = click.Path(path_type=Path)

CONFIG_OPTIONS = {
    "approach": "approach.name",
    "mixing": "data.mixing",
    "teacher_signal": "approach.teacher_signal",
    "weight": "approach.weight",
    "temperature": "approach.temperature",
    "seed": "fit.seed",
    "precision": "compute.precision",
}
"""Options of `fit` that stand for fields of the configuration."""


class _Registered(click.Choice[str]):
    """A choice among the names that a registry has when the command runs."""

    def __init__(self, registry: Mapping[str, str]) -> None:
        self._registry = registry
        # click assigns `choices`, so that the property below needs a setter.
        super().__init__(tuple(registry))

    @property
    def choices(self) -> tuple[str, ...]:
        """The names."""
        return tuple(self._registry)

    @choices.setter
    def choices(self, names: Sequence[str]) -> None:
        pass  # set by click from the same registry


class _Commands(CommandGroup):
    """The commands of flsep-train."""

    extras = "trainer,evaluate"

    def explain(self, error: Exception) -> str | None:
        """Return one line for an expected failure, None for a bug."""
        line = super().explain(error)
        if type(error).__name__ == "OutOfMemoryError":  # torch's own; torch may not be loaded
            line = "out of GPU memory; use --set data.batch_size=... or a smaller model"
        # Under torchrun each process reports; prefix all but the first with their rank.
        rank = os.environ.get("RANK", "0")
        return line if line is None or rank == "0" else f"process {rank}: {line}"


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Details of a command: flsep-train COMMAND --help",
)
@click.version_option(package_name="flsep", prog_name="flsep-train")
def main() -> None:
    """Train separators on precomputed shards, informed by a teacher; separate; score.

    \b
    flsep-train fit SHARDS --run runs/none
    flsep-train fit SHARDS --run runs/contrastive --approach contrastive
    flsep-train separate runs/none song.mp3 separated
    flsep-train evaluate runs/none runs/contrastive SHARDS --floor runs/floor
    flsep-train compare runs/none runs/contrastive --floor runs/floor

    SHARDS is a folder that flsep-precompute run has written.
    """


# Options that several commands share.
def _device_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--device",
        default="auto",
        show_default=True,
        help="cpu, cuda, cuda:1, ...; auto takes CUDA where there is one.",
    )(command)


def _verify_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--verify/--no-verify",
        default=True,
        show_default=True,
        help="Compare each signal with its digest when it is first read.",
    )(command)


@main.command()
@click.argument("shards", type=_FOLDER)
@click.option("--run", required=True, type=_ANY, help="Run folder to make: weights, metrics, logs.")
@click.option(
    "--approach",
    type=_Registered(APPROACHES),
    help="none: the separator alone. concat: the mixture's embedding enters the latent; separating "
    "needs the teacher. contrastive, distance: regularizers; separating needs no teacher. "
    "[default: none]",
)
@click.option(
    "--recipe",
    type=click.Choice(["xumx", "demo"]),
    default="xumx",
    show_default=True,
    help="xumx: the public recipe, for a GPU. demo: about a minute on two CPU cores.",
)
@click.option(
    "--mixing",
    type=click.Choice(["original", "random", "rendered"]),
    help="original: excerpts of the tracks as they are. random: each source from a random track, "
    "with its own gain and channel swap; regularizers then need --teacher-signal stems, concat "
    "is impossible. rendered: such mixes from --mixes, for every approach. Compare approaches "
    "under the same mixing. [default: original]",
)
@click.option(
    "--mixes",
    type=_FOLDER,
    metavar="FOLDER",
    help="Mixes of flsep-precompute mixes, for --mixing rendered. Epochs beyond the last one begin "
    "again with the first.",
)
@click.option(
    "--teacher-signal",
    type=click.Choice(["mixture", "stems"]),
    help="Signal whose embeddings to learn from: the mixture, or each stem. [default: mixture]",
)
@click.option(
    "--weight", type=float, help="Factor of the regularizer (contrastive, distance). [default: 1.0]"
)
@click.option(
    "--temperature", type=float, help="Divisor of the similarities (contrastive). [default: 0.1]"
)
@click.option("--seed", type=int, help="Seed of weights, dropout and excerpts. [default: 0]")
@click.option(
    "--precision",
    type=click.Choice(["float32", "tf32", "bfloat16"]),
    help="float32: exact products. tf32 (GPU): factors rounded to 10 bits. bfloat16: the network "
    "in mixed precision; weights, STFT and losses stay float32. [default: float32]",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="SECTION.FIELD=VALUE",
    help="Change any field of the configuration; beats the options above. May be repeated. "
    "config.json in the run folder shows all fields.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the run in the folder exactly; start it if there is none. Options may only "
    "repeat what the run was started with, except fit.epochs and fit.patience.",
)
@click.option("--overwrite", is_flag=True, help="Replace the run in the folder.")
@click.option(
    "--save-every",
    "save_minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="MINUTES",
    help="Save within an epoch, too, so that a crash costs no more than this.",
)
@click.option(
    "--resident",
    type=click.Choice(["device", "host"]),
    help="Load all training data into the memory of the GPU or of the host first; refused if it "
    "does not fit. [default: read the shards as they are needed]",
)
@click.option(
    "--workers",
    type=click.IntRange(0, 256),
    help="Threads that read ahead; they do not change the batches. [default: cores, at most 8]",
)
@_device_option
@_verify_option
@click.pass_context
def fit(
    ctx: click.Context,
    recipe: str,
    save_minutes: float,
    workers: int | None,
    settings: tuple[str, ...],
    **options: Any,
) -> None:
    """Train a separator.

    \b
    flsep-train fit SHARDS --run runs/none
    flsep-train fit SHARDS --run runs/contrastive --approach contrastive --weight 0.5
    flsep-train fit SHARDS --run runs/small --set separator.hidden_size=128 --set fit.epochs=50
    torchrun --standalone --nproc-per-node 4 --no-python -- flsep-train fit SHARDS --run runs/none

    Under torchrun the processes share each batch, with one GPU each; the first process writes.

    Ctrl-C, SIGTERM and SIGUSR1 save after the step and end with status 130, 143 and 138. The same
    command with --resume then continues as if nothing had happened, whatever --workers is. The
    separation loss of the validation split, without the regularizer, decides the schedule, the
    early stop and which weights are the best.

    \b
    The run folder holds
      best.safetensors   weights with the lowest validation loss, and the configuration
      last.safetensors   the last weights, and everything that --resume needs
      metrics.jsonl      a line for each epoch with every term of the loss; events.* for TensorBoard
      config.json, environment.json
    """
    from flsep.trainer.training.launch import FitRequest, launch

    if options["resume"] and options["overwrite"]:
        raise click.UsageError("--resume and --overwrite exclude each other")
    if math.isnan(save_minutes):
        raise click.UsageError("--save-every nan: expected a number of minutes")
    named = {field: options.pop(option) for option, field in CONFIG_OPTIONS.items()}
    chosen = [f"{field}={value}" for field, value in named.items() if value is not None]
    recipe_given = ctx.get_parameter_source("recipe") != click.core.ParameterSource.DEFAULT
    request = FitRequest(
        recipe=recipe if recipe_given else None,
        settings=(*chosen, *settings),
        seconds_between_saves=60 * save_minutes,
        num_workers=_count_threads(workers),
        **options,
    )
    ctx.exit(launch(request))


def _count_threads(workers: int | None) -> int:
    # Count the cores that this process may run on, not those of the machine.
    return min(8, len(os.sched_getaffinity(0))) if workers is None else workers


@main.command()
@click.argument("run", type=_ANY)
@click.argument("audio", type=_ANY)
@click.argument("out", type=_FOLDER)
@click.option(
    "--targets",
    metavar="NAME,...",
    help="Sources to write, by name, e.g. vocals,drums. [default: all]",
)
@click.option("--wiener", is_flag=True, help="Refine by a Wiener filter (needs norbert).")
@click.option(
    "--chunk",
    "chunk_seconds",
    type=float,
    default=30.0,
    show_default=True,
    help="Seconds that are separated at a time; limits the memory.",
)
@click.option(
    "--teacher",
    type=str,
    help="Where the teacher is, for a model that needs it. [default: as precomputed]",
)
@_device_option
def separate(
    run: Path,
    audio: Path,
    out: Path,
    targets: str | None,
    wiener: bool,
    chunk_seconds: float,
    teacher: str | None,
    device: str,
) -> None:
    """Separate AUDIO, a file or a folder of files, into OUT/<name>/<source>.wav.

    \b
    flsep-train separate runs/none song.mp3 separated
    flsep-train separate runs/none/last.safetensors album/ separated --targets vocals

    RUN is a run folder, whose best.safetensors is used, or a checkpoint. AUDIO can be anything that
    FFmpeg reads; it is resampled to the model's rate, and mono is duplicated to its channels. The
    wav files hold 32-bit floats, so that nothing clips. If a file fails, it is named, the others
    are separated, and the exit status is 1.
    """
    from flsep.trainer.inference.embedder import load_embedder
    from flsep.trainer.inference.separate import (
        TrackSeparator,
        choose_targets,
        list_audio,
        separate_file,
    )
    from flsep.trainer.training.launch import choose_device

    files = list_audio(audio)
    separator = TrackSeparator(
        _find_checkpoint(run),
        device=choose_device(device),
        wiener=wiener,
        chunk_seconds=chunk_seconds,
    )
    chosen = choose_targets(separator.sources, targets)
    embed = load_embedder(separator, teacher)
    failed = 0
    for path in files:
        folder = out / path.stem
        try:
            embeddings = None if embed is None else embed(path)
            seconds = separate_file(separator, path, folder, targets=chosen, embeddings=embeddings)
        except FlsepError as error:
            if len(files) == 1:
                raise
            failed += 1
            click.echo(f"Error: {error}", err=True)
        else:
            rate = separator.layout.sample_rate_hz
            names = ", ".join(f"{name}.wav" for name in chosen)
            click.echo(f"{folder}: {names} ({seconds:.1f} s at {rate} Hz)")
    if failed:
        raise InferenceError(f"{failed} of {len(files)} files could not be separated, see above")


def _find_checkpoint(run: Path) -> Path:
    return run / "best.safetensors" if run.is_dir() else run


@main.command()
@click.argument("runs", nargs=-1, type=_FOLDER)
@click.argument("shards", type=_FOLDER)
@click.option(
    "--floor", type=_FOLDER, help="Score the mixture as every estimate, into this folder."
)
@click.option("--oracle", type=_FOLDER, help="Score the ideal ratio mask, into this folder.")
@click.option(
    "--split",
    type=click.Choice(["train", "valid", "test"]),
    default="test",
    show_default=True,
    help="Tracks to score; the shards must hold their audio (--audio-splits of flsep-precompute).",
)
@click.option(
    "--engine",
    type=_Registered(ENGINES),
    default="museval",
    show_default=True,
    help="Scoring engine.",
)
@click.option("--wiener", is_flag=True, help="Refine the runs' estimates (needs norbert).")
@click.option(
    "--workers",
    type=click.IntRange(0, 1024),
    help="Processes, each scoring a track on one core. [default: as cores and memory allow]",
)
@_verify_option
def evaluate(
    runs: tuple[Path, ...],
    shards: Path,
    floor: Path | None,
    oracle: Path | None,
    split: str,
    engine: str,
    wiener: bool,
    workers: int | None,
    verify: bool,
) -> None:
    """Score runs on the test split with museval (BSS Eval v4, frames of 1 s).

    \b
    flsep-train evaluate runs/none runs/concat SHARDS
    flsep-train evaluate SHARDS --floor runs/floor --oracle runs/oracle

    The best.safetensors of each run separates the audio of the tracks in the shards. Embeddings
    come from the shards, too, so that no teacher is needed. Scores go to RUN/evaluation, one JSON
    file for each track in museval's format; scores that are still valid are kept. museval takes
    about a second of one core for each second of four sources. If a track fails, it is named, the
    others are scored, and the exit status is 1. Show the scores with flsep-train compare.
    """
    from flsep.cache import Shards
    from flsep.trainer.runs.folder import Run
    from flsep.trainer.scoring.engine import FailedTrack
    from flsep.trainer.scoring.estimators import (
        Estimator,
        IdealRatioMask,
        MixtureEstimator,
        TrainedModel,
    )
    from flsep.trainer.scoring.evaluation import describe_run, evaluate

    if not (runs or floor or oracle):
        raise click.UsageError("nothing to score: give RUN... SHARDS, --floor or --oracle")
    opened = Shards(shards, verify=verify)
    tasks: list[tuple[str, Estimator, Path, dict[str, Any]]] = []
    for run in runs:
        best = Run(run).best
        description = describe_run(best, opened.layout)
        tasks.append((str(run), TrainedModel(best, wiener), Run(run).evaluation, description))
    if floor:
        tasks.append((str(floor), MixtureEstimator(), floor, {}))
    if oracle:
        tasks.append((str(oracle), IdealRatioMask(), oracle, {}))
    failures: list[FailedTrack] = []
    for label, estimator, folder, description in tasks:
        click.echo(f"scoring {label}")
        done, failed = evaluate(
            estimator,
            opened,
            folder,
            split=split,
            num_workers=workers,
            progress=sys.stderr.isatty(),
            description=description,
            engine=engine,
        )
        for failure in failed:
            click.echo(f"Error: {label}: {failure.track}: {failure.reason}", err=True)
        click.echo(f"  {len(done)} tracks in {folder / 'scores'}")
        failures += failed
    if bugs := [failure.traceback for failure in failures if failure.traceback]:
        click.echo(bugs[0], err=True)
        raise RuntimeError(f"{len(bugs)} tracks met a bug in flsep; the first one is shown above")
    if failures:
        raise EvaluationError(f"{len(failures)} tracks could not be scored, see above")


@main.command()
@click.argument("runs", nargs=-1, required=True, metavar="[NAME=]RUN...")
@click.option("--floor", required=True, type=_FOLDER, help="Folder of evaluate --floor.")
@click.option("--oracle", type=_FOLDER, help="Folder of evaluate --oracle.")
@click.option("--out", type=_FOLDER, help="Save comparison.{txt,md,csv,json} into this folder.")
def compare(runs: tuple[str, ...], floor: Path, oracle: Path | None, out: Path | None) -> None:
    """Print the scores of evaluated runs side by side: SDR, SIR, ISR, SAR in dB.

    \b
    flsep-train compare runs/none runs/concat --floor runs/floor --out comparison
    flsep-train compare runs/w1 'weight 0.1=runs/w01' --floor runs/floor --oracle runs/oracle

    Runs that differ only in their seed make one row, with the spread over the seeds. A row is named
    after its approach, or after the NAME before the =. Only frames that all rows scored count.
    """
    from flsep.trainer.scoring.evaluation import read_evaluation
    from flsep.trainer.study.rows import compare_evaluations
    from flsep.trainer.study.tables import format_text, save

    members = []
    for argument in runs:
        name, equals, folder = argument.rpartition("=")
        if not equals or Path(argument).exists():
            name, folder = "", argument
        members.append(read_evaluation(Path(folder), kind="run", name=name or None))
    comparison = compare_evaluations(
        members,
        floor=read_evaluation(floor, kind="floor"),
        oracle=read_evaluation(oracle, kind="oracle") if oracle else None,
    )
    click.echo(format_text(comparison), nl=False)
    if out is not None:
        save(comparison, out)
        click.echo(f"saved in {out}: comparison.txt, .md, .csv, .json")
