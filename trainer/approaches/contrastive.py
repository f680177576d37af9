"""The contrastive regularizer."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flsep.trainer.approaches.regularizer import _EPSILON

# Windows whose embeddings are this similar (0.8 degrees apart) sound the same to the teacher: a
# loop, or one passage drawn twice. Calling one the other's negative would set the loss against
# itself, so each is left out of the other's candidates.
DUPLICATE_COSINE = 0.9999


class _Contrastive(nn.Module):
    def __init__(
        self, latent_size: int, embedding_size: int, projection_size: int, temperature: float
    ) -> None:
        super().__init__()
        self.temperature = temperature
        # Only the latent is projected: the teacher's space stays as it is.
        self.project = nn.Sequential(
            nn.Linear(latent_size, projection_size),
            nn.ReLU(),
            nn.Linear(projection_size, embedding_size),
        )

    def forward(self, latents_MD: Tensor, embeddings_ME: Tensor) -> dict[str, Tensor]:
        projected_ME = self.project(latents_MD)
        loss, accuracy = contrastive_loss(projected_ME, embeddings_ME, self.temperature)
        return {"regularizer": loss, "retrieval_accuracy": accuracy}


def contrastive_loss(
    projected_ME: Tensor, embeddings_ME: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Compute InfoNCE of projected latents against embeddings.

    Each latent's logits are its cosine similarities to all embeddings over the temperature; its
    own window is the right answer; windows that the teacher hardly tells from it
    (`DUPLICATE_COSINE`) are no candidates.

    Parameters
    ----------
    projected_ME, embeddings_ME : Tensor
        float32 [window, dim], row by row the same window.
    temperature : float
        Divisor of the cosines, > 0.

    Returns
    -------
    loss : Tensor
        Mean cross-entropy in nats, scalar; 0 with fewer than two windows.
    accuracy : Tensor
        Share of latents whose own window scores highest, scalar without gradient; 0 with fewer
        than two windows.
    """
    if len(projected_ME) < 2:
        return projected_ME.sum() * 0.0, projected_ME.new_zeros(())
    teacher_ME = F.normalize(embeddings_ME, dim=-1, eps=_EPSILON)
    own_MM = torch.eye(len(teacher_ME), dtype=torch.bool, device=teacher_ME.device)
    duplicates_MM = (teacher_ME @ teacher_ME.T >= DUPLICATE_COSINE) & ~own_MM
    cosines_MM = F.normalize(projected_ME, dim=-1, eps=_EPSILON) @ teacher_ME.T
    logits_MM = (cosines_MM / temperature).masked_fill(duplicates_MM, -math.inf)
    answers_M = torch.arange(len(logits_MM), device=logits_MM.device)
    accuracy = (logits_MM.detach().argmax(-1) == answers_M).float().mean()
    return F.cross_entropy(logits_MM, answers_M), accuracy
