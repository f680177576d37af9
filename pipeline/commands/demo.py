"""The command ``flsep-precompute demo-corpus``."""

from pathlib import Path

import click

from flsep.pipeline.commands.parameter_types import FOLDER


@click.command("demo-corpus")
@click.argument("out", type=FOLDER)
@click.option("--tracks", type=int, default=14, show_default=True, help="Songs, at least 3.")
@click.option("--seconds", type=float, default=24.0, show_default=True, help="Length of each song.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="Another seed gives other songs."
)
@click.option(
    "--example/--no-example",
    default=True,
    show_default=True,
    help="Add the one real MUSDB18 track that the package stempeg carries to the test split.",
)
def demo_corpus_command(out: Path, tracks: int, seconds: float, seed: int, example: bool) -> None:
    """Render a small corpus with the layout of MUSDB18-HQ into OUT, to try flsep on.

    The songs are composed: drums, bass, other and a singing voice. The same options give the same
    files.
    """
    from flsep.pipeline.demo.corpus import render_corpus

    render_corpus(
        out, num_tracks=tracks, seconds=seconds, seed=seed, example=example, progress=click.echo
    )
