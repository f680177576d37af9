"""Contrastive regularization: a window's latent must pick its own window's embedding.

InfoNCE (van den Oord et al., "Representation learning with contrastive predictive coding", 2018,
eq. 4) of the projected latents of all windows in a batch against their embeddings.

Shape suffixes: D latent, E embedding; M compared windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flsep.trainer.approaches.interface import Sizes
from flsep.trainer.approaches.regularizer import COSINE_EPSILON, Regularizer, RegularizerConfig
from flsep.trainer.config import ApproachConfig

# Windows whose embeddings are this similar (0.8 degrees apart) sound the same to the teacher: a
# loop, or one passage drawn twice. Calling one the other's negative would set the loss against
# itself, so each is left out of the other's candidates.
DUPLICATE_COSINE = 0.9999


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastiveConfig(RegularizerConfig):
    """Contrastive regularization.

    Attributes
    ----------
    temperature : float
        Divisor of the cosine similarities, > 0.
    projection_size : int
        Number of hidden units of the projection of the latent.
    """

    name: Literal["contrastive"] = field(default="contrastive", init=False)
    temperature: float = 0.1
    projection_size: int = 128

    def __post_init__(self) -> None:
        RegularizerConfig.__post_init__(self)
        self.require("temperature", self.temperature > 0, "> 0")
        self.require("projection_size", self.projection_size >= 1, "1 or more")


class Contrastive(Regularizer):
    """Project the latents of windows into the teacher's space and compare them there."""

    Config = ContrastiveConfig

    def __init__(self, config: ApproachConfig, sizes: Sizes) -> None:
        assert isinstance(config, ContrastiveConfig)
        super().__init__(config, sizes)
        self.temperature = config.temperature
        latent = self.needs(config).latent
        assert latent is not None
        # Only the latent is projected: the teacher's space stays as it is.
        self.project = nn.Sequential(
            nn.Linear(sizes.latents[latent], config.projection_size),
            nn.ReLU(),
            nn.Linear(config.projection_size, sizes.embedding),
        )

    def compare(self, latents_MD: Tensor, embeddings_ME: Tensor) -> dict[str, Tensor]:
        """Return the loss, and the share of windows that pick their own embedding."""
        projected_ME = self.project(latents_MD)
        loss, accuracy = contrastive_loss(projected_ME, embeddings_ME, self.temperature)
        return {"regularizer": loss, "retrieval_accuracy": accuracy}


def contrastive_loss(
    projected_ME: Tensor, embeddings_ME: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Compute InfoNCE, in nats, of projected latents against embeddings, and its accuracy.

    Both are float32 [window, dim]; a row of both is one window. The accuracy, without gradient, is
    the share of latents that are most similar to their own window's embedding. Loss and accuracy
    are 0 with fewer than two windows.
    """
    if len(projected_ME) < 2:  # nothing to compare; the zero keeps the graph connected
        return projected_ME.sum() * 0.0, projected_ME.new_zeros(())
    teacher_ME = F.normalize(embeddings_ME, dim=-1, eps=COSINE_EPSILON)
    own_MM = torch.eye(len(teacher_ME), dtype=torch.bool, device=teacher_ME.device)
    duplicates_MM = (teacher_ME @ teacher_ME.T >= DUPLICATE_COSINE) & ~own_MM
    cosines_MM = F.normalize(projected_ME, dim=-1, eps=COSINE_EPSILON) @ teacher_ME.T
    logits_MM = (cosines_MM / temperature).masked_fill(duplicates_MM, -math.inf)
    answers_M = torch.arange(len(logits_MM), device=logits_MM.device)
    accuracy = (logits_MM.detach().argmax(-1) == answers_M).float().mean()
    return F.cross_entropy(logits_MM, answers_M), accuracy
