"""Complete configurations by name.

A recipe is a function of the approach's name, since a recipe may choose other settings for an
approach than its defaults.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from flsep.trainer.config import (
    ApproachConfig,
    DataConfig,
    FitConfig,
    OptimConfig,
    TrainConfig,
    configure_approach,
    configure_separator,
)
from flsep.trainer.settings import apply_settings, split_setting


def xumx(approach: str = "none") -> TrainConfig:
    """Return the public recipe of X-UMX for MUSDB18, which equals the defaults.

    Its mixing is the original one, so that all approaches can be compared. The public recipe mixes
    at random; use ``--mixing rendered`` with the mixes of ``flsep-precompute mixes`` for that, as a
    mixture of ``--mixing random`` has no embedding.
    """
    return TrainConfig(approach=configure_approach(approach))


def demo(approach: str = "none") -> TrainConfig:
    """Return a training of about a minute on two CPU cores, for a corpus of a few short tracks."""
    return replace(
        xumx(),
        separator=configure_separator("xumx", hidden_size=64, num_layers=2, dropout=0.1),
        approach=_with_small_projection(approach),
        # Two windows of the demo's teacher, musicnn, fit into 6.1 s, but not into 6 s.
        data=DataConfig(excerpt_seconds=6.1, excerpts_per_track=2, batch_size=3),
        optim=OptimConfig(learning_rate=3e-3, plateau_patience=3, plateau_cooldown=1),
        fit=FitConfig(epochs=7, patience=7),
    )


def _with_small_projection(name: str) -> ApproachConfig:
    """Return an approach that projects, if it does, to an eighth of the latent, as in `xumx`."""
    approach = configure_approach(name)
    if not hasattr(approach, "projection_size"):
        return approach
    return configure_approach(name, projection_size=16)


RECIPES: dict[str, Callable[[str], TrainConfig]] = {"xumx": xumx, "demo": demo}


def resolve_config(recipe: str, settings: Sequence[str]) -> TrainConfig:
    """Return the configuration of a recipe, changed by settings ``section.field=value``."""
    # The recipe has to know the approach before the other settings apply; the last name wins.
    names = ["none"]
    for section, field, text in map(split_setting, settings):
        if (section, field) == ("approach", "name"):
            names.append(text)
    return apply_settings(RECIPES[recipe](names[-1]), settings)
