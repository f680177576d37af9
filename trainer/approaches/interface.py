"""The interface of an approach, and the check that a configuration makes sense.

Shape suffixes: S sources, B batch, N frames, W windows, D latent, E embedding, P condition.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from flsep.trainer.config import ApproachConfig, TrainConfig
from flsep.trainer.errors import ConfigError
from flsep.trainer.registry import APPROACHES, SEPARATORS, load
from flsep.trainer.teacher import TeacherWindows

TeacherSignal = Literal["mixture", "stems"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Needs:
    """What an approach needs of the data, of the separator and of the teacher.

    Attributes
    ----------
    teacher_signal : {'mixture', 'stems'} or None
        Signal whose embeddings it is trained with; None for no embeddings.
    teacher_to_separate : bool
        Whether it needs the mixture's embeddings to separate, too.
    latent : str or None
        Latent that it compares with the embeddings; excerpts then hold a whole teacher window.
    """

    teacher_signal: TeacherSignal | None = None
    teacher_to_separate: bool = False
    latent: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Feature counts of embedding and latents, and the sources in the separator's order."""

    embedding: int
    latents: Mapping[str, int]
    sources: tuple[str, ...]


class Approach(nn.Module):
    """Base class of approaches, which give a condition, a regularizer, both or neither.

    Attributes
    ----------
    Config : type
        Section ``approach`` of the configuration, of which `__init__` takes an instance.
    condition_size : int
        Number of features that `condition` returns for each frame; 0 for no condition.
    weight : float
        Factor of the regularizer: total loss = separation loss + weight * regularizer.
    """

    Config: ClassVar[type[ApproachConfig]]
    condition_size: int = 0
    weight: float = 0.0

    def __init__(self, config: ApproachConfig, sizes: Sizes) -> None:
        super().__init__()

    @classmethod
    def needs(cls, config: ApproachConfig) -> Needs:
        """Return what the approach needs with these settings."""
        return Needs()

    def condition(self, windows: TeacherWindows | None, num_frames: int) -> Tensor | None:
        """Return features for the separator, float [frame, batch, condition_size], or None.

        `windows` is None unless the approach needs the teacher, when it separates too.
        """
        return None

    def regularizer(
        self, latents: Mapping[str, Tensor], windows: TeacherWindows | None
    ) -> dict[str, Tensor]:
        """Compare the `latents` of a `Separation` with the embeddings of the excerpts' windows.

        Returns
        -------
        dict of str to Tensor
            Nothing; or float32 scalars: ``regularizer``, the unweighted loss, and diagnostics
            without gradient, such as ``num_windows``, the number of windows that were compared.
        """
        return {}

    def describe(self) -> str:
        """Describe the approach in a few words."""
        return type(self).__name__


def find_needs(config: ApproachConfig) -> Needs:
    """Return what the configured approach needs."""
    needs: Needs = load(APPROACHES, config.name, "approach").needs(config)
    return needs


def require_possible(config: TrainConfig) -> Needs:
    """Return what the approach needs; raise ConfigError if mixing or separator cannot give it."""
    name, needs = config.approach.name, find_needs(config.approach)
    # Random mixing draws its mixtures during training: the teacher has never heard them.
    if config.data.mixing == "random" and needs.teacher_signal == "mixture":
        # A stem keeps its embedding in any mixture, but separation starts from the mixture alone.
        others = "" if needs.teacher_to_separate else ", or --teacher-signal stems"
        raise ConfigError(
            f"{name} needs the mixture's embedding, and a random mixture has no precomputed "
            "embedding; use --mixing original, --mixing rendered with the mixes of "
            f"flsep-precompute mixes{others}"
        )
    separator = load(SEPARATORS, config.separator.name, "separator")
    latents = separator.latent_sizes(config.separator)
    if needs.latent is not None and needs.latent not in latents:
        raise ConfigError(
            f"{name} with the embeddings of the {needs.teacher_signal} compares the latent "
            f"{needs.latent!r}, and the separator {config.separator.name} has "
            f"{', '.join(map(repr, latents)) or 'none'}; use another --teacher-signal or separator"
        )
    return needs


def require_embeddings(windows: TeacherWindows | None, num_sources: int | None) -> TeacherWindows:
    """Return windows; raise ValueError unless they are those of the mixture, or of the stems."""
    if windows is None:
        raise ValueError("no embeddings; the approach needs those of the teacher's windows")
    shape = tuple(windows.embeddings.shape)
    if num_sources is None and len(shape) != 3:
        raise ValueError(
            f"embeddings of shape {shape}; expected the mixture's (batch, window, dim)"
        )
    if num_sources is not None and (len(shape) != 4 or shape[0] != num_sources):
        raise ValueError(
            f"embeddings of shape {shape}; expected those of {num_sources} stems as "
            "(source, batch, window, dim)"
        )
    return windows
