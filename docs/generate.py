"""Write docs/reference/cli.md and docs/reference/config.md from the code."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click

from flsep.pipeline.cli import cli as precompute
from flsep.pipeline.config import FeatureConfig
from flsep.trainer.cli import main as train
from flsep.trainer.config import TrainConfig
from flsep.trainer.recipes import RECIPES
from flsep.trainer.registry import APPROACHES, SEPARATORS, load

FOLDER = Path(__file__).parent / "reference"
PROGRAMS: dict[str, click.Command] = {"flsep-precompute": precompute, "flsep-train": train}
OPTIONS = {
    "sample_rate_hz": "--sample-rate",
    "num_channels": "--channels",
    "n_fft": "--n-fft",
    "hop_samples": "--hop",
    "stft_dtype": "--stft-dtype",
    "audio_splits": "--audio-splits",
    "valid_fraction": "--valid-fraction",
    "test_fraction": "--test-fraction",
    "seed": "--seed",
}
_WIDTH = 100

_CLI_HEAD = """\
# Command line

This page is generated from `--help`. Do not edit it; `make docs` regenerates it.

All commands have this in common:

* Results and progress lines go to standard output. Errors, warnings and progress bars go to
  standard error.
* An expected failure is reported in one line.
* A bug in flsep is reported with a traceback, the versions of the packages, and exit status 70.
  Please report it in the project's issue tracker, with everything that the command printed.

| exit status | meaning |
|---|---|
| 0 | everything is done |
| 1 | an expected failure; or some tracks or files failed and are named, and the others are done |
| 2 | wrong usage: an unknown option, or a value that an option cannot have |
| 70 | a bug in flsep; please report it |
| 130 | stopped by Ctrl-C (SIGINT) |
| 138, 143 | `flsep-train fit` was stopped by SIGUSR1 or SIGTERM and has saved its state |
"""

_CONFIG_HEAD = """\
# Configuration

This page is generated from the code. Do not edit it; `make docs` regenerates it.

## Training

`flsep-train fit` starts from a recipe, applies its named options and then `--set
section.field=value`, which may be repeated and takes precedence over the options. Values are
checked against the types below. An unknown section or field is refused, and the message suggests
the nearest name. The resolved configuration is stored in `config.json` of the run folder and in
every checkpoint.

The sections `separator` and `loss` have the fields of the chosen separator (`separator.name`), and
the section `approach` has those of the chosen approach. Other fields are refused.

| option of `fit` | same as `--set` of |
|---|---|
| `--approach` | `approach.name` |
| `--mixing` | `data.mixing` |
| `--teacher-signal` | `approach.teacher_signal` |
| `--weight` | `approach.weight` |
| `--temperature` | `approach.temperature` |
| `--seed` | `fit.seed` |
| `--precision` | `compute.precision` |
"""

_FEATURES_HEAD = """\
## Precomputation

These are the settings of `flsep-precompute plan` and `run`. Together with the sources
(`--sources`) and the content of the teacher they determine the fingerprint of the shards. A folder
holds shards of one fingerprint only. All other options leave the content of the shards unchanged:
`--shard-size`, `--workers`, `--adapt`, `--cluster`, `--part`, `--scheduler`, and the place that
the teacher is loaded from."""


def walk(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """Yield a command and its subcommands with their full names."""
    yield name, command
    if isinstance(command, click.Group):
        for child in command.commands:
            yield from walk(f"{name} {child}", command.commands[child])


def render_cli() -> str:
    """Return cli.md: the help of every command."""
    parts = [_CLI_HEAD]
    for program, root in PROGRAMS.items():
        for name, command in walk(program, root):
            heading = "##" if command is root else "###"
            parts.append(f"{heading} {name}\n\n```text\n{_help(name, root, command)}\n```\n")
    return "\n".join(parts)


def _help(name: str, root: click.Command, command: click.Command) -> str:
    # The group's settings count for its commands too; the width must not depend on the terminal.
    context = click.Context(
        command,
        info_name=name,
        terminal_width=_WIDTH,
        help_option_names=root.context_settings["help_option_names"],
    )
    return "\n".join(line.rstrip() for line in command.get_help(context).splitlines())


def render_config() -> str:
    """Return config.md: every field of the configurations."""
    parts = [_CONFIG_HEAD]
    for name in SEPARATORS:
        recipes = {key: make("none") for key, make in RECIPES.items()}
        recipes = {key: made for key, made in recipes.items() if made.separator.name == name}
        kind = load(SEPARATORS, name, "separator")
        parts.append(_section(f"separator: {name}", "separator", kind.Config, recipes))
        parts.append(_section(f"loss: {name}", "loss", kind.Loss, recipes))
    for name in APPROACHES:
        recipes = {key: make(name) for key, make in RECIPES.items()}
        kind = load(APPROACHES, name, "approach").Config
        parts.append(_section(f"approach: {name}", "approach", kind, recipes))
    recipes = {key: make("none") for key, make in RECIPES.items()}
    for section in fields(TrainConfig):
        if section.name not in ("separator", "loss", "approach"):
            parts.append(_section(section.name, section.name, section.type, recipes))
    hints, meanings = get_type_hints(FeatureConfig), read_attributes(FeatureConfig)
    rows = [["field", "option", "type", "default", "meaning"]]
    for field in fields(FeatureConfig):
        kind, default = _describe(hints[field.name]), _show(field.default)
        name, option = f"`{field.name}`", f"`{OPTIONS[field.name]}`"
        rows.append([name, option, kind, default, meanings[field.name]])
    parts.append(f"{_FEATURES_HEAD}\n{_table(rows)}")
    return "\n".join(parts)


def _section(title: str, section: str, kind: Any, recipes: dict[str, TrainConfig]) -> str:
    """Return the table of one section, with its values in each recipe."""
    hints, meanings = get_type_hints(kind), read_attributes(kind)
    rows = [["field", "type", *recipes, "meaning"]]
    for field in fields(kind):
        values = [_show(getattr(getattr(r, section), field.name)) for r in recipes.values()]
        key = f"`{section}.{field.name}`"
        rows.append([key, _describe(hints[field.name]), *values, meanings[field.name]])
    return f"### {title}\n\n{_first_line(kind)}\n\n{_table(rows)}"


def read_attributes(kind: type) -> dict[str, str]:
    """Return the meaning of each attribute, from the docstrings of a class and its bases."""
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        meanings |= _read_listing(inspect.cleandoc(base.__doc__ or ""))
    return meanings


def _read_listing(text: str) -> dict[str, str]:
    _, _, listing = text.partition("Attributes\n----------\n")
    meanings: dict[str, str] = {}
    for names, body in re.findall(r"^(\w[\w, ]*) : .*\n((?:[ ]{4}.*\n?)+)", listing, re.MULTILINE):
        meaning = " ".join(body.split()).replace("``", "`")
        meanings |= {name.strip(): meaning for name in names.split(",")}
    return meanings


def _first_line(kind: type) -> str:
    return (inspect.getdoc(kind) or "").splitlines()[0]


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if get_origin(kind) is tuple:
        return "names, separated by commas"
    if type(None) in get_args(kind):
        return "{}, optional".format(*(part.__name__ for part in get_args(kind)))
    return str(kind.__name__)


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        value = ",".join(value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def render() -> dict[str, str]:
    """Return the generated pages by their file name."""
    return {"cli.md": render_cli(), "config.md": render_config()}


if __name__ == "__main__":
    for name, text in render().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)
