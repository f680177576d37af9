"""Concatenation: the decoders see the mixture's embedding beside the shared latent.

Shape suffixes: B batch, N frames, W windows, P features of the projected embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from flsep.trainer.approaches.interface import (
    Approach,
    Needs,
    Sizes,
    TeacherSignal,
    require_embeddings,
)
from flsep.trainer.config import ApproachConfig
from flsep.trainer.teacher import TeacherWindows


@dataclass(frozen=True, kw_only=True, slots=True)
class ConcatenationConfig(ApproachConfig):
    """Concatenate the mixture's embedding, projected, to the latent before the decoders.

    Attributes
    ----------
    teacher_signal : {'mixture'}
        Signal whose embeddings are used.
    projection_size : int
        Number of features of the projected embedding.
    """

    name: Literal["concat"] = field(default="concat", init=False)
    teacher_signal: TeacherSignal = "mixture"
    projection_size: int = 128

    def __post_init__(self) -> None:
        self.check_types()
        self.require(
            "teacher_signal",
            self.teacher_signal == "mixture",
            "'mixture': concat needs the embedding to separate, too, where no stems are known",
        )
        self.require("projection_size", self.projection_size >= 1, "1 or more")


class Concatenation(Approach):
    """Condition the separator on the embedding of the window that each frame lies in."""

    Config = ConcatenationConfig

    def __init__(self, config: ApproachConfig, sizes: Sizes) -> None:
        assert isinstance(config, ConcatenationConfig)
        super().__init__(config, sizes)
        self.condition_size = config.projection_size
        # Tanh gives the range of X-UMX's latent, which the projection is concatenated to.
        self.project = nn.Sequential(nn.Linear(sizes.embedding, config.projection_size), nn.Tanh())

    @classmethod
    def needs(cls, config: ApproachConfig) -> Needs:
        """Return that the mixture's embedding is needed in training and in separation."""
        return Needs(teacher_signal="mixture", teacher_to_separate=True)

    def condition(self, windows: TeacherWindows | None, num_frames: int) -> Tensor | None:
        """Return the projected embedding of the window held at each frame, [frame, batch, P]."""
        windows = require_embeddings(windows, None)
        if windows.held.shape != (len(windows.embeddings), num_frames):
            raise ValueError(
                f"windows are held over {tuple(windows.held.shape)} (batch, frames): "
                f"the separator expects {(len(windows.embeddings), num_frames)}"
            )
        # Project each window once, then repeat the result over the frames that it holds for.
        projected_BWP = self.project(windows.embeddings)
        index_BNP = windows.held[..., None].expand(-1, -1, projected_BWP.shape[-1])
        held_BNP: Tensor = projected_BWP.gather(1, index_BNP)
        return held_BNP.transpose(0, 1)

    def describe(self) -> str:
        """Name the approach and its signal."""
        return "concat with the mixture's embeddings"
