"""What the regularizers have in common: latents and embeddings are compared window by window.

Shape suffixes: S sources, B batch, N frames, W windows, D latent, E embedding; M compared windows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flsep.trainer.approaches.interface import (
    Approach,
    Needs,
    Sizes,
    TeacherSignal,
    require_embeddings,
)
from flsep.trainer.config import ApproachConfig
from flsep.trainer.parallel import gather_rows
from flsep.trainer.teacher import TeacherWindows

COSINE_EPSILON = 1e-6
"""Keeps the gradient of a cosine finite at the zero vector."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegularizerConfig(ApproachConfig):
    """Base class of the regularizers' sections.

    Attributes
    ----------
    teacher_signal : {'mixture', 'stems'}
        Signal whose embeddings are used.
    weight : float
        Factor of the regularizer, > 0.
    silence_db : float
        Windows quieter than this, in dBFS, are not compared.
    """

    teacher_signal: TeacherSignal = "mixture"
    weight: float = 1.0
    silence_db: float = -60.0

    def __post_init__(self) -> None:
        self.check_types()
        self.require("weight", self.weight > 0, "> 0; for no regularizer use --approach none")


class Regularizer(Approach, ABC):
    """Compare latents with embeddings, over the audible windows that lie inside their excerpts."""

    Config = RegularizerConfig

    def __init__(self, config: ApproachConfig, sizes: Sizes) -> None:
        assert isinstance(config, RegularizerConfig)
        super().__init__(config, sizes)
        self.config = config
        self.weight = config.weight
        self.num_stems = len(sizes.sources) if config.teacher_signal == "stems" else None

    @classmethod
    def needs(cls, config: ApproachConfig) -> Needs:
        """Return the signal whose embeddings are compared, and the latent that is compared."""
        assert isinstance(config, RegularizerConfig)
        latent = "sources" if config.teacher_signal == "stems" else "shared"
        return Needs(teacher_signal=config.teacher_signal, latent=latent)

    @abstractmethod
    def compare(self, latents_MD: Tensor, embeddings_ME: Tensor) -> dict[str, Tensor]:
        """Return the loss as ``regularizer``, and diagnostics, of windows row by row."""

    def regularizer(
        self, latents: Mapping[str, Tensor], windows: TeacherWindows | None
    ) -> dict[str, Tensor]:
        """Compare the latents of the windows that count with their embeddings."""
        windows = require_embeddings(windows, self.num_stems)
        name = self.needs(self.config).latent
        assert name is not None
        latent = latents[name]
        # Similarities of bfloat16 vectors would be too coarse to compare.
        with torch.autocast(latent.device.type, enabled=False):
            pooled = pool_windows(latent.float(), windows.bounds)
            compared = windows.inside & (windows.activity_db >= self.config.silence_db)
            # With stems, this selection puts the windows of all sources into one pool. The other
            # sources at the same moment are then negatives, which is what a separator's latent has
            # to tell apart. In pools of their own, sources would only have to tell moments apart,
            # and a source that is silent except in one window would have no negative at all.
            latents_MD, embeddings_ME = pooled[compared], windows.embeddings[compared].float()
            if self.training:  # in validation each process has batches of its own
                latents_MD, embeddings_ME = gather_rows(latents_MD), gather_rows(embeddings_ME)
            num_windows = torch.tensor(float(len(latents_MD)), device=latent.device)
            return {**self.compare(latents_MD, embeddings_ME), "num_windows": num_windows}

    def describe(self) -> str:
        """Name the approach, its signal and its weight."""
        signal = self.config.teacher_signal
        return f"{self.config.name} with the {signal}'s embeddings, weight {self.weight:g}"


def pool_windows(latent_NBD: Tensor, bounds: Tensor) -> Tensor:
    """Average a latent, float [..., frame, batch, latent], over each window.

    The bounds, int64 [..., batch, window, 2], are a window's first and one-past-last frame; frames
    outside the latent do not count. The result is float [..., batch, window, latent]; it is zero
    for a window that holds no frame of the latent.
    """
    frames_N = torch.arange(latent_NBD.shape[-3], device=latent_NBD.device)
    # Each window's frames as a row of weights that add up to 1.
    held_BWN = (frames_N >= bounds[..., :1]) & (frames_N < bounds[..., 1:])
    # clamp_min: the row of a window without frames stays zero instead of 0 / 0.
    shares_BWN = held_BWN / held_BWN.sum(-1, keepdim=True).clamp_min(1)
    return torch.einsum("...nbd,...bwn->...bwd", latent_NBD, shares_BWN.to(latent_NBD.dtype))
