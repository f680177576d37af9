"""Named complete experiments."""

from collections.abc import Callable
from dataclasses import replace

from flsep.trainer.config import (
    ApproachConfig,
    DataConfig,
    FitConfig,
    OptimConfig,
    SeparatorConfig,
    TrainConfig,
)


def xumx() -> TrainConfig:
    """Return the public recipe of X-UMX for MUSDB18: what the defaults are.

    Its mixing is the original one, so that the four approaches can be compared as they come. The
    public recipe mixes at random: take ``--mixing rendered`` with what ``flsep-precompute mixes``
    made, for a mixture of ``--mixing random`` has no embedding.
    """
    return TrainConfig()


def demo() -> TrainConfig:
    """Return a training of about a minute on two CPU cores, for a corpus of a few short tracks."""
    return replace(
        xumx(),
        separator=SeparatorConfig(hidden_size=64, num_layers=2, dropout=0.1),
        approach=ApproachConfig(projection_size=16),  # an eighth of the latent, as in xumx
        # Two windows of the demo's teacher, musicnn, lie in 6.1 s, but not in 6.
        data=DataConfig(excerpt_seconds=6.1, excerpts_per_track=2, batch_size=3),
        optim=OptimConfig(learning_rate=3e-3, plateau_patience=3, plateau_cooldown=1),
        fit=FitConfig(epochs=7, patience=7),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {"xumx": xumx, "demo": demo}
