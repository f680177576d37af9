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

import math

from torch import nn

from flsep.trainer.approaches.concat import _Concatenation
from flsep.trainer.approaches.contrastive import _Contrastive
from flsep.trainer.approaches.distance import _Distance
from flsep.trainer.approaches.interface import Approach
from flsep.trainer.approaches.regularizer import _Regularizer
from flsep.trainer.errors import ConfigError

APPROACHES = ("none", "concat", "contrastive", "distance")
TEACHER_SIGNALS = ("mixture", "stems")
MIXINGS = ("original", "random", "rendered")


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
        raise ConfigError(
            "concat needs the mixture's embedding, for it separates where no stems are known: "
            "use --teacher-signal mixture with --mixing original or rendered"
        )
    if mixing == "random" and teacher_signal == "mixture":
        others = "" if approach == "concat" else ", or --teacher-signal stems"
        raise ConfigError(
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
        raise ConfigError(f"projection_size is {projection_size}: expected 1 or more")
    if name == "concat":
        return _Concatenation(embedding_size, projection_size)
    if not (math.isfinite(weight) and weight > 0):
        raise ConfigError(
            f"weight is {weight}: {name} expects a finite number > 0; to train without a "
            "regularizer use --approach none"
        )
    criterion: nn.Module
    if name == "distance":
        criterion = _Distance()
    elif math.isfinite(temperature) and temperature > 0:
        criterion = _Contrastive(latent_size, embedding_size, projection_size, temperature)
    else:
        raise ConfigError(f"temperature is {temperature}: contrastive expects a finite number > 0")
    return _Regularizer(
        criterion,
        sources=sources if teacher_signal == "stems" else None,
        weight=weight,
        silence_db=silence_db,
    )


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"unknown {what} {value!r}: expected one of {', '.join(choices)}")
