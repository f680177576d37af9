"""Three ways to inform the latent of X-UMX with a teacher's embeddings, and plain X-UMX.

Hung and Lerch, "Feature-informed latent space regularization for music source separation", 2021
(arXiv 2203.09132), bring pretrained features into the latent space in three ways. The ideas are
theirs; where this module fixes a detail (projection, temperature, masking, what counts as a
negative) the choice is ours.

`none`
    Plain X-UMX.
`concat`
    The mixture's embedding, projected, is concatenated to the shared latent before the decoders.
`contrastive`
    InfoNCE (van den Oord et al., 2018, eq. 4): the projected latent of a window must pick its own
    window's embedding among those of all windows in the batch.
`distance`
    The cosine distances between the latents of all windows in the batch are pulled to those
    between their embeddings.

With the stems as the teacher's signal, each source's latent before bridge 2 is compared with the
embeddings of that source's stem, and the windows of all sources form one pool. The other sources
at the same moment are then negatives, which is what a separator's latent must tell apart; sources
in pools of their own would only be asked to tell moments apart, and a source that is silent but
for one window would have no negative at all.

Shape suffixes: S sources, B batch, C channels, T samples, N frames, F bins, W windows, D latent,
E embedding dimensions; M windows that are compared, P features of the projected embedding.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flsep.trainer.parallel import gather_rows
from flsep.trainer.separator import Separation

APPROACHES = ("none", "concat", "contrastive", "distance")
TEACHER_SIGNALS = ("mixture", "stems")
MIXINGS = ("original", "random", "rendered")

# Windows whose embeddings are this similar (0.8 degrees apart) sound the same to the teacher: a
# loop, or one passage drawn twice. Calling one the other's negative would set the loss against
# itself, so each is left out of the other's candidates.
DUPLICATE_COSINE = 0.9999

# Keeps the gradient of a cosine finite at the zero vector.
_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherWindows:
    """What the teacher says about a batch of excerpts.

    Attributes
    ----------
    embeddings : Tensor
        Standardised embeddings, float32: of the mixture [batch, window, dim], or of the stems
        [source, batch, window, dim] in the separator's order of sources.
    activity_db : Tensor
        RMS of each window of that signal, dBFS, float32: the shape of `embeddings` without dim.
    bounds : Tensor
        First and one-past-last latent frame of each window, relative to the excerpt, int64
        [batch, window, 2]; may lie outside the excerpt. With stems it may have a leading source
        axis.
    inside : Tensor
        Whether the window lies fully inside the excerpt, bool, the shape of `bounds` without 2.
    held : Tensor
        Index of the window that is held at each latent frame, int64 [batch, frame].
    """

    embeddings: Tensor
    activity_db: Tensor
    bounds: Tensor
    inside: Tensor
    held: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> TeacherWindows:
        """Copy all tensors to a device."""
        return TeacherWindows(
            **{
                field.name: getattr(self, field.name).to(device, non_blocking=non_blocking)
                for field in dataclasses.fields(self)
            }
        )


class Approach(nn.Module):
    """Plain X-UMX, and the interface of the ways to inform it.

    Attributes
    ----------
    condition_size : int
        Number of features that `condition` gives for each frame; the separator's.
    weight : float
        Factor of the regularizer: total loss = separation loss + weight * regularizer.
    """

    condition_size: int = 0
    weight: float = 0.0

    def condition(self, windows: TeacherWindows, num_frames: int) -> Tensor | None:
        """Return features to concatenate to the shared latent.

        Parameters
        ----------
        windows : TeacherWindows
            The teacher's windows.
        num_frames : int
            Number of latent frames of the excerpt.

        Returns
        -------
        Tensor or None
            float [frame, batch, condition_size], or None.

        Raises
        ------
        ValueError
            If the windows do not fit.
        """
        return None

    def regularizer(self, separation: Separation, windows: TeacherWindows) -> dict[str, Tensor]:
        """Compare latents and embeddings.

        Parameters
        ----------
        separation : Separation
            The separator's latents.
        windows : TeacherWindows
            The teacher's windows.

        Returns
        -------
        dict of str to Tensor
            Empty, or float32 scalars: `regularizer`, the unweighted loss; and diagnostics without
            gradient: `num_windows` that were compared, and `retrieval_accuracy` (`contrastive`).

        Raises
        ------
        ValueError
            If the windows do not fit.
        """
        return {}


class _Concatenation(Approach):
    """Condition the decoders on the mixture's embedding, held over its window's frames."""

    def __init__(self, embedding_size: int, projection_size: int) -> None:
        super().__init__()
        self.condition_size = projection_size
        # Tanh: the range of the latent it is concatenated to.
        self.project = nn.Sequential(nn.Linear(embedding_size, projection_size), nn.Tanh())

    def condition(self, windows: TeacherWindows, num_frames: int) -> Tensor:
        _check_embeddings(windows, None)
        if windows.held.shape != (len(windows.embeddings), num_frames):
            raise ValueError(
                f"windows are held over {tuple(windows.held.shape)} (batch, frames): "
                f"the separator expects {(len(windows.embeddings), num_frames)}"
            )
        projected_BWP = self.project(windows.embeddings)
        index_BNP = windows.held[..., None].expand(-1, -1, projected_BWP.shape[-1])
        held_BNP: Tensor = projected_BWP.gather(1, index_BNP)
        return held_BNP.transpose(0, 1)


class _Regularizer(Approach):
    """Compare the latents of audible windows inside their excerpts with their embeddings.

    In training, the windows of all processes are compared with each other: those of a batch.
    """

    def __init__(
        self,
        criterion: nn.Module,
        *,
        sources: tuple[str, ...] | None,
        weight: float,
        silence_db: float,
    ) -> None:
        super().__init__()
        self.criterion = criterion
        self.sources = sources
        self.weight = weight
        self.silence_db = silence_db

    def regularizer(self, separation: Separation, windows: TeacherWindows) -> dict[str, Tensor]:
        _check_embeddings(windows, self.sources)
        latent = separation.source_latents_SNBD if self.sources else separation.shared_latent_NBD
        with torch.autocast(latent.device.type, enabled=False):
            pooled = pool_windows(latent.float(), windows.bounds)
            compared = windows.inside & (windows.activity_db >= self.silence_db)
            latents_MD, embeddings_ME = pooled[compared], windows.embeddings[compared].float()
            if self.training:
                latents_MD, embeddings_ME = gather_rows(latents_MD), gather_rows(embeddings_ME)
            num_windows = torch.tensor(float(len(latents_MD)), device=latent.device)
            return {**self.criterion(latents_MD, embeddings_ME), "num_windows": num_windows}


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


class _Distance(nn.Module):
    def forward(self, latents_MD: Tensor, embeddings_ME: Tensor) -> dict[str, Tensor]:
        return {"regularizer": distance_loss(latents_MD, embeddings_ME)}


def pool_windows(latent_NBD: Tensor, bounds: Tensor) -> Tensor:
    """Average a latent over each window.

    Parameters
    ----------
    latent_NBD : Tensor
        float [..., frame, batch, latent].
    bounds : Tensor
        First and one-past-last frame of each window, int64 [..., batch, window, 2]. Frames
        outside the latent do not count.

    Returns
    -------
    Tensor
        float [..., batch, window, latent]; zero for a window that holds no frame of the latent.
    """
    frames_N = torch.arange(latent_NBD.shape[-3], device=latent_NBD.device)
    held_BWN = (frames_N >= bounds[..., :1]) & (frames_N < bounds[..., 1:])
    shares_BWN = held_BWN / held_BWN.sum(-1, keepdim=True).clamp_min(1)
    return torch.einsum("...nbd,...bwn->...bwd", latent_NBD, shares_BWN.to(latent_NBD.dtype))


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


def check_combination(approach: str, mixing: str, teacher_signal: str) -> None:
    """Refuse combinations that make no sense.

    Parameters
    ----------
    approach : {'none', 'concat', 'contrastive', 'distance'}
        The way to inform the latent.
    mixing : {'original', 'random', 'rendered'}
        Excerpts of the tracks as they are; each source from a random track; or such mixes that
        the teacher has heard.
    teacher_signal : {'mixture', 'stems'}
        The signal whose embeddings are used; without meaning for 'none'.

    Raises
    ------
    ValueError
        With the reason and the remedy.
    """
    _check_choice("approach", approach, APPROACHES)
    _check_choice("mixing", mixing, MIXINGS)
    _check_choice("teacher signal", teacher_signal, TEACHER_SIGNALS)
    if approach == "none":
        return
    if approach == "concat" and teacher_signal == "stems":
        raise ValueError(
            "concat needs the mixture's embedding, for it separates where no stems are known: "
            "use --teacher-signal mixture with --mixing original or rendered"
        )
    if mixing == "random" and teacher_signal == "mixture":
        others = "" if approach == "concat" else ", or --teacher-signal stems"
        raise ValueError(
            f"{approach} with the mixture's embedding: a random mixture has no precomputed "
            f"embedding; use --mixing original, --mixing rendered with mixes that "
            f"flsep-precompute mixes made{others}"
        )


def build_approach(
    name: str,
    *,
    embedding_size: int,
    latent_size: int,
    sources: tuple[str, ...],
    teacher_signal: str,
    weight: float,
    temperature: float,
    projection_size: int,
    silence_db: float = -60.0,
) -> Approach:
    """Build an approach by its name.

    Parameters
    ----------
    name : {'none', 'concat', 'contrastive', 'distance'}
        The approach.
    embedding_size : int
        Dimensions of the teacher's embeddings.
    latent_size : int
        Features of the separator's latents (`XUMX.latent_size`).
    sources : tuple of str
        The separator's sources, in its order.
    teacher_signal : {'mixture', 'stems'}
        The signal whose embeddings are used.
    weight : float
        Factor of the regularizer, > 0 (contrastive, distance).
    temperature : float
        Divisor of the cosines, > 0 (contrastive).
    projection_size : int
        Features of the projected embedding (concat), hidden units of the projection of the
        latent (contrastive).
    silence_db : float
        Windows quieter than this, in dBFS, are not compared.

    Returns
    -------
    Approach
        The approach, with the parameters it trains.

    Raises
    ------
    ValueError
        If the name is unknown, the combination impossible or a number out of its range.
    """
    check_combination(name, "original", teacher_signal)
    if name == "none":
        return Approach()
    if projection_size < 1:
        raise ValueError(f"projection_size is {projection_size}: expected 1 or more")
    if name == "concat":
        return _Concatenation(embedding_size, projection_size)
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(
            f"weight is {weight}: {name} expects a finite number > 0; to train without a "
            "regularizer use --approach none"
        )
    criterion: nn.Module
    if name == "distance":
        criterion = _Distance()
    elif math.isfinite(temperature) and temperature > 0:
        criterion = _Contrastive(latent_size, embedding_size, projection_size, temperature)
    else:
        raise ValueError(f"temperature is {temperature}: contrastive expects a finite number > 0")
    return _Regularizer(
        criterion,
        sources=sources if teacher_signal == "stems" else None,
        weight=weight,
        silence_db=silence_db,
    )


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}: expected one of {', '.join(choices)}")


def _check_embeddings(windows: TeacherWindows, sources: tuple[str, ...] | None) -> None:
    shape = tuple(windows.embeddings.shape)
    if sources is None and len(shape) != 3:
        raise ValueError(
            f"embeddings of shape {shape}: expected the mixture's (batch, window, dim)"
        )
    if sources is not None and (len(shape) != 4 or shape[0] != len(sources)):
        raise ValueError(
            f"embeddings of shape {shape}: expected those of the {len(sources)} stems "
            f"{', '.join(sources)} as (source, batch, window, dim)"
        )
