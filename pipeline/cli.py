"""The command ``flsep-precompute``."""

import click

from flsep.cache.commands import CommandGroup
from flsep.pipeline.commands.demo import demo_corpus_command
from flsep.pipeline.commands.mixes import mixes_command
from flsep.pipeline.commands.shards import plan_command, run_command
from flsep.pipeline.commands.teacher import teacher_group
from flsep.pipeline.commands.verify import inspect_command, verify_command


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

    This stage computes once what training needs again and again: decoded stems, their spectra
    (STFT), the embeddings of a teacher, and the statistics of the corpus.

    \b
    MUSDB18, on a machine with internet access:
      flsep-precompute run musdb18/ shards/
    Without internet access, export a teacher first, then name it:
      flsep-precompute teacher export musicnn teachers/musicnn
      flsep-precompute run musdb18/ shards/ --teacher teachers/musicnn
    """


for command in (
    plan_command,
    run_command,
    mixes_command,
    verify_command,
    inspect_command,
    teacher_group,
    demo_corpus_command,
):
    cli.add_command(command)


def main() -> None:
    """Run the command."""
    cli.main()
