"""A separator together with the approach that informs it: what is trained and what is saved.

Shape suffixes: N frames, B batch, C channels, F bins, P condition.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flsep.cache import Layout, Statistics
from flsep.trainer.approaches.interface import Approach, Sizes
from flsep.trainer.config import TrainConfig
from flsep.trainer.registry import APPROACHES, SEPARATORS, load
from flsep.trainer.separators.interface import Separation, Separator
from flsep.trainer.teacher import TeacherWindows


class InformedSeparator(nn.Module):
    """A separator and its approach; checkpoints store their states under these two names."""

    def __init__(self, separator: Separator, approach: Approach) -> None:
        super().__init__()
        self.separator = separator
        self.approach = approach

    def forward(self, mixture_NBCF: Tensor, windows: TeacherWindows | None) -> Separation:
        """Separate a mixture; `windows` is None if the approach does without the teacher."""
        condition_NBP = self.approach.condition(windows, len(mixture_NBCF))
        separation: Separation = self.separator(mixture_NBCF, condition_NBP)
        return separation


def build_model(
    config: TrainConfig, layout: Layout, statistics: Statistics | None = None
) -> InformedSeparator:
    """Build a model with random weights; raise DataError if the data do not suit the separator.

    The weights of the separator depend on `config.fit.seed` alone, whatever the approach. The
    generator of torch is left in the state that this seed leads to. `statistics`, which standardise
    the input, are not needed when weights are loaded.
    """
    separator_class = load(SEPARATORS, config.separator.name, "separator")
    approach_class = load(APPROACHES, config.approach.name, "approach")
    # Seeding twice gives the separator the same weights, however many the approach draws.
    torch.manual_seed(config.fit.seed)
    # The approach comes first, because the separator is built for the size of its condition.
    approach: Approach = approach_class(
        config.approach,
        Sizes(
            embedding=layout.embedding_size,
            latents=separator_class.latent_sizes(config.separator),
            sources=layout.sources,
        ),
    )
    torch.manual_seed(config.fit.seed)
    separator: Separator = separator_class(
        config.separator,
        layout,
        statistics=statistics,
        condition_size=approach.condition_size,
    )
    return InformedSeparator(separator, approach)
