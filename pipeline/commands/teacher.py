"""The commands ``flsep-precompute teacher ...``."""

from pathlib import Path

import click

from flsep.pipeline.commands.parameter_types import FOLDER
from flsep.pipeline.commands.reporting import describe_teacher


@click.group("teacher")
def teacher_group() -> None:
    """Get a teacher: the model whose embeddings inform the separator."""


@teacher_group.command("fetch")
@click.argument("handle")
@click.argument("out", type=FOLDER)
def fetch_command(handle: str, out: Path) -> None:
    """Download the SavedModel HANDLE (vggish, or an address) into the folder OUT.

    Do this where there is internet access, then give OUT as --teacher on machines without it.
    """
    from flsep.pipeline.teachers.model_folder import fetch

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
@click.argument("out", type=FOLDER)
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
@click.argument("out", type=FOLDER)
def export_musicnn_command(out: Path, wheel: Path | None) -> None:
    """Build a teacher in OUT from the checkpoint MTT_vgg of the package musicnn 0.1.0 (ISC).

    It is a pretrained music tagger that every machine with access to PyPI can get.
    """
    from flsep.pipeline.teachers.export import export_musicnn

    describe_teacher(export_musicnn(out, wheel=wheel), out)
