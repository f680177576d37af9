"""The objective of a training: the separation loss of a batch, and the approach's regularizer."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flsep.trainer.approaches.informed import InformedSeparator
from flsep.trainer.config import TrainConfig
from flsep.trainer.data.batch import Batch, assemble
from flsep.trainer.errors import ConfigError
from flsep.trainer.separators.interface import SeparationLoss


class Objective:
    """Compute every term of the loss of a batch.

    The network computes in the precision of ``compute.precision``, everything around it (STFT, Gram
    matrices, the regularizers' similarities, the statistics of batch norm) in float32 or better.
    Creating an objective sets the precision of float32 products for the whole process.
    """

    def __init__(self, config: TrainConfig, device: torch.device, hop_samples: int) -> None:
        assert isinstance(config.loss, SeparationLoss)
        self._device, self._hop_samples = device, hop_samples
        self._autocast = config.compute.precision == "bfloat16"
        self._separation_loss = config.loss
        set_precision(config.compute.precision, device)

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Separate a batch and return every term of the loss as a scalar.

        These are the unweighted terms of the ``separation`` loss; the terms of the approach, its
        ``regularizer`` unweighted; and ``total`` = ``separation`` + weight * ``regularizer``, which
        is minimised. `model` is an `InformedSeparator`, or one in `DistributedDataParallel`.
        """
        informed = model if isinstance(model, InformedSeparator) else model.module
        assert isinstance(informed, InformedSeparator)
        example = assemble(batch, self._device, self._hop_samples)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            # Call the wrapper, not what it holds: it prepares the exchange of gradients.
            separation = model(example.mixture_NBCF, example.windows)
        terms = self._separation_loss(
            separation,
            references_SNBCF=example.references_SNBCF,
            references_SBCT=example.references_SBCT,
            mixture_BCT=example.mixture_BCT,
            hop_samples=self._hop_samples,
        )
        total = terms["separation"] = terms.pop("total")
        terms |= informed.approach.regularizer(separation.latents, example.windows)
        if "regularizer" in terms:
            total = total + informed.approach.weight * terms["regularizer"]
        return {**terms, "total": total}


def set_precision(precision: str, device: torch.device) -> None:
    """Set the precision of float32 products on GPUs; ConfigError if the device does not have it."""
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(
            f"compute.precision is 'tf32': {device} has no TF32; use float32, or a GPU"
        )
    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            "compute.precision is 'bfloat16': this GPU has no bfloat16; use float32 or tf32"
        )
    if device.type == "cuda":
        # By default torch lets cuDNN use TF32 in BLSTMs. The newer setting fp32_precision cannot be
        # mixed with these two, which torch.compile still reads (2.13).
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"


def explain_non_finite(values: Mapping[str, float], names: list[str], bad: list[str]) -> str:
    """Explain a non-finite loss or gradient; `bad` names excerpts whose data are not finite."""
    terms = ", ".join(f"{name} {value:g}" for name, value in values.items())
    wrong = "gradient" if all(map(math.isfinite, values.values())) else "loss"
    what = "the data of these excerpts hold NaN or infinity" if bad else "the excerpts were"
    remedy = "precompute them again" if bad else "try a lower optim.learning_rate"
    return (
        f"the {wrong} is not finite ({terms}); no step was taken; {what}: "
        f"{'; '.join(bad or names)}; {remedy}"
    )


def find_bad_data(batch: Batch) -> list[str]:
    """Return the names of the excerpts whose data hold NaN or infinity."""
    finite = torch.isfinite(batch.stft).all(dim=-1).transpose(0, 2).flatten(1).all(dim=1)
    return [name for name, good in zip(batch.names, finite.tolist(), strict=True) if not good]
