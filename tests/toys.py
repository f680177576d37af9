"""A separator, an approach and a scoring engine that flsep knows nothing of: `test_extension.py`.

Shape suffixes: S sources, N frames, B batch, C channels, F bins, E embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flsep.cache import Layout, Statistics
from flsep.trainer.approaches.interface import Approach, Needs, Sizes
from flsep.trainer.config import ApproachConfig, SeparatorConfig
from flsep.trainer.scoring.engine import Engine
from flsep.trainer.separators.interface import Separation, SeparationLoss, Separator
from flsep.trainer.teacher import TeacherWindows


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyConfig(SeparatorConfig):
    """A mask for each source and bin, the same in all frames."""

    name: Literal["toy"] = field(default="toy", init=False)
    sharpness: float = 1.0

    def __post_init__(self) -> None:
        self.check_types()
        self.require("sharpness", self.sharpness > 0, "> 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToyLoss(SeparationLoss):
    """Root mean square error of the complex spectra."""

    floor: float = 1e-6

    def __call__(
        self, separation: Separation, *, references_SNBCF: Tensor, **others: Any
    ) -> dict[str, Tensor]:
        errors = (separation.estimates_SNBCF - references_SNBCF).abs().square()
        return {"total": (errors.mean() + self.floor).sqrt()}


class ToySeparator(Separator):
    """A softmax over the sources for each bin, shifted by the condition."""

    Config = ToyConfig
    Loss = ToyLoss

    def __init__(
        self,
        config: SeparatorConfig,
        layout: Layout,
        *,
        statistics: Statistics | None = None,
        condition_size: int = 0,
    ) -> None:
        super().__init__(config, layout, statistics=statistics, condition_size=condition_size)
        assert isinstance(config, ToyConfig)
        self.sharpness = config.sharpness
        self.logits_SF = nn.Parameter(0.1 * torch.randn(len(layout.sources), layout.num_bins))
        self.shift = nn.Linear(condition_size, len(layout.sources)) if condition_size else None

    @classmethod
    def latent_sizes(cls, config: SeparatorConfig) -> dict[str, int]:
        return {"shared": 1}

    def describe(self) -> str:
        return "toy masks"

    def forward(self, mixture_NBCF: Tensor, condition_NBE: Tensor | None = None) -> Separation:
        logits_SNBF = self.logits_SF[:, None, None].expand(-1, *mixture_NBCF.shape[:2], -1)
        if self.shift is not None:
            assert condition_NBE is not None
            logits_SNBF = logits_SNBF + self.shift(condition_NBE).movedim(-1, 0)[..., None]
        masks_SNBF = torch.softmax(self.sharpness * logits_SNBF, 0)
        estimates_SNBCF = masks_SNBF[..., None, :] * mixture_NBCF
        latent_NBD = estimates_SNBCF[0].abs().mean((-2, -1))[..., None]
        return Separation(estimates_SNBCF=estimates_SNBCF, latents={"shared": latent_NBD})


@dataclass(frozen=True, kw_only=True, slots=True)
class LoudnessConfig(ApproachConfig):
    """Condition on the mean of some dimensions of the embedding, and pull the latent to it."""

    name: Literal["loudness"] = field(default="loudness", init=False)
    weight: float = 0.5
    dimensions: tuple[int, ...] = (0,)


class Loudness(Approach):
    """An approach that gives both a condition and a regularizer."""

    Config = LoudnessConfig
    condition_size = 1

    def __init__(self, config: ApproachConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        assert isinstance(config, LoudnessConfig)
        self.weight = config.weight
        self.dimensions = config.dimensions

    @classmethod
    def needs(cls, config: ApproachConfig) -> Needs:
        return Needs(teacher_signal="mixture", teacher_to_separate=True, latent="shared")

    def condition(self, windows: TeacherWindows | None, num_frames: int) -> Tensor:
        assert windows is not None
        means = windows.embeddings[..., list(self.dimensions)].mean(-1)
        return means.gather(1, windows.held).T[..., None]

    def regularizer(
        self, latents: Mapping[str, Tensor], windows: TeacherWindows | None
    ) -> dict[str, Tensor]:
        loudness_NB = self.condition(windows, 0)[..., 0]
        return {"regularizer": (latents["shared"][..., 0] - loudness_NB).square().mean()}

    def describe(self) -> str:
        return "loudness of the mixture"


class PlainSDR(Engine):
    """SDR of the whole track as the only frame, for all four metrics."""

    name = "plain"

    def prepare(self) -> None:
        pass

    def predict_peak_bytes(self, num_sources: int, num_channels: int, num_samples: int) -> int:
        return 8 * num_sources * num_channels * num_samples

    def score(
        self,
        references: NDArray[np.float32],
        estimates: NDArray[np.float32],
        *,
        sources: Sequence[str],
        sample_rate_hz: int,
        name: str,
    ) -> dict[str, Any]:
        errors = np.square(references - estimates).sum((1, 2)) + 1e-9
        sdr_db = 10 * np.log10((np.square(references).sum((1, 2)) + 1e-9) / errors)
        targets = [
            {
                "name": source,
                "frames": [
                    {
                        "time": 0.0,
                        "duration": references.shape[1] / sample_rate_hz,
                        "metrics": dict.fromkeys(("SDR", "SIR", "ISR", "SAR"), float(value)),
                    }
                ],
            }
            for source, value in zip(sources, sdr_db, strict=True)
        ]
        return {"targets": targets, "track": name, "sample_rate_hz": sample_rate_hz}
