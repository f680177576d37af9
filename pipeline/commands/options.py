"""Options that decide what the shards hold, and the plan that they lead to."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from flsep.pipeline.commands.parameter_types import Names, Size
from flsep.pipeline.config import FeatureConfig

if TYPE_CHECKING:
    from flsep.pipeline.corpus.tracks import Corpus
    from flsep.pipeline.shards.plan import Plan

Command = TypeVar("Command", bound=Callable[..., Any])
DEFAULTS = FeatureConfig()  # the configuration alone says what the defaults are


def corpus_options(command: Command) -> Command:
    """Add the options that decide what the shards hold."""
    # In the order in which --help lists them.
    options = [
        click.option(
            "--sources",
            type=Names(),
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
            type=Names(),
            default=",".join(DEFAULTS.audio_splits),
            show_default=True,
            help="Splits to store the audio of, which flsep-train evaluate needs.",
        ),
        click.option(
            "--shard-size",
            type=Size(),
            default="1G",
            show_default=True,
            help="Collect short tracks of a split in shards of about this size.",
        ),
    ]
    # Decorators apply from the bottom up, so the last option comes first.
    for option in reversed(options):
        command = option(command)
    return command


def make_plan(corpus: Path, options: dict[str, Any]) -> tuple["Corpus", FeatureConfig, "Plan"]:
    """Find the corpus and plan its shards according to `corpus_options`."""
    # The import loads the decoders, for which --help should not wait.
    from flsep.pipeline.corpus.tracks import find_corpus
    from flsep.pipeline.shards.plan import plan_shards

    # The configuration checks its values, so wrong options fail before any file is opened.
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
        corpus.absolute(),  # workers on other machines have other working directories
        sources=options["sources"],
        valid_fraction=config.valid_fraction,
        test_fraction=config.test_fraction,
        seed=config.seed,
        num_channels=config.num_channels,
    )
    return found, config, plan_shards(found, config, shard_bytes=options["shard_size"])
