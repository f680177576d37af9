"""What a training minimises: the separation loss of a batch, and what the approach adds."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flsep.trainer.approaches.informed import InformedSeparator
from flsep.trainer.config import TrainConfig
from flsep.trainer.data.batch import Batch, assemble
from flsep.trainer.errors import ConfigError
from flsep.trainer.separators.losses import SeparationLoss
from flsep.trainer.stft import time_signals


class Objective:
    """Computes every term of the loss of a batch.

    The network computes in the precision of ``compute.precision``, everything around it (STFT,
    Gram matrices, the regularizers' similarities, the statistics of batch norm) in float32 or
    better. Making one sets the precision of float32 products for the whole process.

    Parameters
    ----------
    config : TrainConfig
        Its sections `loss` and `compute`.
    device : torch.device
        Where to compute.
    hop_samples : int
        Of the STFT.

    Raises
    ------
    ConfigError
        If the device does not have the precision.
    """

    def __init__(self, config: TrainConfig, device: torch.device, hop_samples: int) -> None:
        self._device, self._hop_samples = device, hop_samples
        self._autocast = config.compute.precision == "bfloat16"
        self._separation_loss = SeparationLoss(
            combine=config.loss.combine, time_weight=config.loss.time_weight
        )
        set_precision(config.compute.precision, device)

    def __call__(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Separate a batch and return every term of the loss as a scalar.

        Parameters
        ----------
        model : Module
            An `InformedSeparator`, or one in `DistributedDataParallel`.
        batch : Batch
            From `load_batches`.

        Returns
        -------
        dict of str to Tensor
            ``magnitude`` and ``time``, the unweighted terms of ``separation``; what the approach
            gives, its ``regularizer`` unweighted; ``total`` = ``separation`` + weight *
            ``regularizer``, which is minimised.
        """
        inner = model if isinstance(model, InformedSeparator) else model.module
        assert isinstance(inner, InformedSeparator)
        example = assemble(batch, self._device, self._hop_samples)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            separation = model(example.mixture_NBCF.abs(), example.windows)
        terms = self._separation_loss(
            estimates_SNBCF=separation.estimates_SNBCF,
            references_SNBCF=example.references_SNBCF.abs(),
            estimates_SBCT=time_signals(
                separation.estimates_SNBCF, example.mixture_NBCF, self._hop_samples
            ),
            references_SBCT=example.references_SBCT,
            mixture_BCT=example.mixture_BCT,
        )
        total = terms["separation"] = terms.pop("total")
        if example.windows is not None:
            terms |= inner.approach.regularizer(separation, example.windows)
        if "regularizer" in terms:
            total = total + inner.approach.weight * terms["regularizer"]
        return {**terms, "total": total}


def set_precision(precision: str, device: torch.device) -> None:
    """Let float32 products on GPUs be computed as ``tf32`` or not, for the whole process.

    Raises
    ------
    ConfigError
        If the device cannot compute so.
    """
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(
            f"compute.precision is 'tf32': {device} has no TF32; use float32, or a GPU"
        )
    if precision == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise ConfigError(
            "compute.precision is 'bfloat16': this GPU has no bfloat16; use float32 or tf32"
        )
    if device.type == "cuda":
        # torch lets cuDNN use TF32 in BLSTMs unless it is told not to. Its newer fp32_precision
        # cannot be mixed with these, which torch.compile still reads (2.13).
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "tf32"


def explain_non_finite(values: Mapping[str, float], names: list[str], bad: list[str]) -> str:
    """Say which terms are not finite, and for which excerpts: their names, and the `bad` ones."""
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
