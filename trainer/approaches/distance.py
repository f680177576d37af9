"""Distance-based regularization: match distances between latents to those between embeddings.

Shape suffixes: D latent, E embedding; M compared windows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from flsep.trainer.approaches.regularizer import COSINE_EPSILON, Regularizer, RegularizerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DistanceConfig(RegularizerConfig):
    """Distance-based regularization."""

    name: Literal["distance"] = field(default="distance", init=False)


class Distance(Regularizer):
    """Compare the distances between latents with those between embeddings."""

    Config = DistanceConfig

    def compare(self, latents_MD: Tensor, embeddings_ME: Tensor) -> dict[str, Tensor]:
        """Return the loss."""
        return {"regularizer": distance_loss(latents_MD, embeddings_ME)}


def distance_loss(latents_MD: Tensor, embeddings_ME: Tensor) -> Tensor:
    """Compare the cosine distances between latents with those between embeddings.

    Both are float32 [window, feature]; a row of both is one window. The loss, in [0, 4], is
    the mean squared difference over all pairs of windows; it is 0 with fewer than two windows.
    """
    num_windows = len(latents_MD)
    if num_windows < 2:  # nothing to compare; the zero keeps the graph connected
        return latents_MD.sum() * 0.0
    latents_MD = F.normalize(latents_MD, dim=-1, eps=COSINE_EPSILON)
    embeddings_ME = F.normalize(embeddings_ME, dim=-1, eps=COSINE_EPSILON)
    # (1 - cos) - (1 - cos'): the ones cancel.
    differences_MM = latents_MD @ latents_MD.T - embeddings_ME @ embeddings_ME.T
    # A window's distance to itself is 0 in both spaces; it would only dilute the mean.
    pairs_MM = ~torch.eye(num_windows, dtype=torch.bool, device=latents_MD.device)
    return differences_MM[pairs_MM].square().mean()
