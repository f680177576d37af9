"""The distance-based regularizer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flsep.trainer.approaches.regularizer import _EPSILON


class _Distance(nn.Module):
    def forward(self, latents_MD: Tensor, embeddings_ME: Tensor) -> dict[str, Tensor]:
        return {"regularizer": distance_loss(latents_MD, embeddings_ME)}


def distance_loss(latents_MD: Tensor, embeddings_ME: Tensor) -> Tensor:
    """Compare the cosine distances between latents with those between embeddings.

    Parameters
    ----------
    latents_MD, embeddings_ME : Tensor
        float32 [window, latent] and [window, dim], row by row the same window.

    Returns
    -------
    Tensor
        Mean squared difference over all pairs of different windows, scalar in [0, 4]; 0 with
        fewer than two windows.
    """
    num_windows = len(latents_MD)
    if num_windows < 2:
        return latents_MD.sum() * 0.0
    latents_MD = F.normalize(latents_MD, dim=-1, eps=_EPSILON)
    embeddings_ME = F.normalize(embeddings_ME, dim=-1, eps=_EPSILON)
    # (1 - cos) - (1 - cos'): the ones cancel.
    differences_MM = latents_MD @ latents_MD.T - embeddings_ME @ embeddings_ME.T
    pairs_MM = ~torch.eye(num_windows, dtype=torch.bool, device=latents_MD.device)
    return differences_MM[pairs_MM].square().mean()
