"""X-UMX together with the approach that informs it: what is trained and what is saved.

Shape suffixes: N frames, B batch, C channels, F bins.
"""

import torch
from torch import Tensor, nn

from flsep.cache import Layout, Statistics
from flsep.trainer.approaches.interface import Approach
from flsep.trainer.approaches.registry import build_approach
from flsep.trainer.config import TrainConfig
from flsep.trainer.separators.interface import Separation
from flsep.trainer.separators.xumx import XUMX, count_bins, standardize_input
from flsep.trainer.teacher import TeacherWindows


class InformedSeparator(nn.Module):
    """A separator and its approach; the names of its state start with these two words."""

    def __init__(self, separator: XUMX, approach: Approach) -> None:
        super().__init__()
        self.separator = separator
        self.approach = approach

    def forward(self, magnitude_NBCF: Tensor, windows: TeacherWindows | None) -> Separation:
        """Separate a mixture's magnitude, float32 [frame, batch, channel, bin].

        `windows` may be None unless the approach conditions on them.
        """
        condition_NBP = None
        if windows is not None:
            condition_NBP = self.approach.condition(windows, len(magnitude_NBCF))
        separation: Separation = self.separator(magnitude_NBCF, condition_NBP)
        return separation


def build_model(
    config: TrainConfig, layout: Layout, statistics: Statistics | None = None
) -> InformedSeparator:
    """Build a model with random weights from the seed of `config`, which torch is left with.

    Separators of one shape start with the same weights, whatever the approach.

    Parameters
    ----------
    config : TrainConfig
        Its sections `separator` and `approach`.
    layout : Layout
        Of the data.
    statistics : Statistics, optional
        Standardise the input; not needed when weights are loaded.

    Raises
    ------
    ValueError
        If the data do not suit a separator, such as one of fewer than two sources.
    """
    settings, chosen = config.separator, config.approach
    max_bin = count_bins(layout.n_fft, layout.sample_rate_hz, settings.bandwidth_hz)
    input_mean = input_scale = None
    if statistics is not None:
        input_mean, input_scale = standardize_input(
            statistics.magnitude_mean, statistics.magnitude_std, max_bin
        )
    torch.manual_seed(config.fit.seed)
    approach = build_approach(
        chosen.name,
        embedding_size=layout.embedding_size,
        latent_size=2 * settings.hidden_size,
        sources=layout.sources,
        teacher_signal=chosen.teacher_signal,
        weight=chosen.weight,
        temperature=chosen.temperature,
        projection_size=chosen.projection_size,
        silence_db=chosen.silence_db,
    )
    torch.manual_seed(config.fit.seed)
    separator = XUMX(
        sources=layout.sources,
        num_channels=layout.num_channels,
        n_fft=layout.n_fft,
        max_bin=max_bin,
        hidden_size=settings.hidden_size,
        num_layers=settings.num_layers,
        dropout=settings.dropout,
        input_mean=input_mean,
        input_scale=input_scale,
        condition_size=approach.condition_size,
    )
    return InformedSeparator(separator, approach)
