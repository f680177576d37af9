"""The interface of a separator and of its loss.

Shape suffixes: S sources, B batch, C channels, T samples, N frames, F bins, D latent, E condition.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from flsep.cache import Layout, Statistics
from flsep.trainer.config import LossConfig, SeparatorConfig


@dataclass(frozen=True, kw_only=True)
class Separation:
    """The output of a separator; a subclass adds what the separator's own loss needs.

    Attributes
    ----------
    estimates_SNBCF : Tensor
        Spectra of the sources, complex64 [source, frame, batch, channel, bin].
    latents : mapping of str to Tensor
        ``shared``, float [frame, batch, latent], and ``sources``, float [source, frame, batch,
        latent], if the separator has a latent for each source.
    """

    estimates_SNBCF: Tensor
    latents: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class SeparationLoss(LossConfig, ABC):
    """Base class of separation losses: a section of the configuration that can be called."""

    @abstractmethod
    def __call__(
        self,
        separation: Separation,
        *,
        references_SNBCF: Tensor,
        references_SBCT: Tensor,
        mixture_BCT: Tensor,
        hop_samples: int,
    ) -> dict[str, Tensor]:
        """Compare estimates with references.

        Parameters
        ----------
        separation : Separation
            The output of the separator that declares this loss.
        references_SNBCF : Tensor
            Spectra of the sources, complex64 [source, frame, batch, channel, bin].
        references_SBCT, mixture_BCT : Tensor
            Waveforms of the sources and of the mixture, float32.

        Returns
        -------
        dict of str to Tensor
            float32 scalars: each term of the loss, and the ``total`` that is minimised.
        """


class Separator(nn.Module, ABC):
    """Base class of separators; only a subclass knows what its network is made of.

    Parameters
    ----------
    statistics : Statistics or None
        Statistics that the input is standardised with; None if weights will be loaded.
    condition_size : int
        Number of features for each frame that `forward` takes as a condition.

    Attributes
    ----------
    Config, Loss : type
        Sections ``separator`` and ``loss`` of the configuration.
    """

    Config: ClassVar[type[SeparatorConfig]]
    Loss: ClassVar[type[SeparationLoss]]

    def __init__(
        self,
        config: SeparatorConfig,
        layout: Layout,
        *,
        statistics: Statistics | None = None,
        condition_size: int = 0,
    ) -> None:
        super().__init__()

    @classmethod
    @abstractmethod
    def latent_sizes(cls, config: SeparatorConfig) -> dict[str, int]:
        """Return the number of features of each latent by its name."""

    @abstractmethod
    def forward(self, mixture_NBCF: Tensor, condition_NBE: Tensor | None = None) -> Separation:
        """Separate a mixture, complex64 [frame, batch, channel, bin].

        The condition is float [frame, batch, condition_size]; None if the condition size is 0.
        """

    def describe(self) -> str:
        """Describe the network in a few words, without its size."""
        return type(self).__name__

    def compile_layers(self) -> None:
        """Compile the layers that gain from `torch.compile`; by default none."""
