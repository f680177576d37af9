"""Adam with clipping, its plateau schedule, and the moving average of the weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flsep.trainer.approaches.informed import InformedSeparator
from flsep.trainer.config import OptimConfig
from flsep.trainer.runs.checkpoint import load_weights, pack_optimizer, take, unpack_optimizer


class Optimizer:
    """Update the weights of a model, and keep their moving average if there is one.

    `best_model` is the model to validate and to keep: the moving average, or the model itself.
    """

    def __init__(self, model: InformedSeparator, config: OptimConfig) -> None:
        self._model, self._clip_norm = model, config.clip_norm
        self.adam = torch.optim.Adam(
            model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.adam,
            factor=config.plateau_factor,
            patience=config.plateau_patience,
            cooldown=config.plateau_cooldown,
        )
        self._average: AveragedModel | None = None
        self.best_model = model
        if config.ema_decay > 0:
            # The buffers are averaged, too: the statistics of batch norm belong to the weights.
            self._average = AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True
            )
            average = self._average.module
            assert isinstance(average, InformedSeparator)
            for module in average.modules():
                if isinstance(module, nn.RNNBase):
                    module.flatten_parameters()  # copying has scattered them in memory
            self.best_model = average

    @property
    def learning_rate(self) -> float:
        """The present learning rate."""
        rate: float = self.adam.param_groups[0]["lr"]
        return rate

    def zero_grad(self) -> None:
        """Discard the gradients of the last step."""
        self.adam.zero_grad()

    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients, a scalar; not finite if any of them is not."""
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        norm: Tensor = get_total_norm(gradients)
        return norm

    def step(self, gradient_norm: Tensor) -> None:
        """Clip the gradients if that is configured, and update the weights."""
        if self._clip_norm > 0:
            # The norm has been computed to check it; clipping need not compute it again.
            clip_grads_with_norm_(self._model.parameters(), self._clip_norm, gradient_norm)
        self.adam.step()
        if self._average is not None:
            self._average.update_parameters(self._model)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the state as JSON values and tensors."""
        groups, tensors = pack_optimizer(self.adam)
        if self._average is not None:
            tensors["average.count"] = self._average.n_averaged
            weights = self.best_model.state_dict()
            tensors |= {f"average.model.{name}": value for name, value in weights.items()}
        return {"optimizer": groups, "schedule": self.schedule.state_dict()}, tensors

    def load_state(
        self, values: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
    ) -> None:
        """Restore the state that `state` returned."""
        unpack_optimizer(self.adam, values["optimizer"], tensors)
        self.schedule.load_state_dict(values["schedule"])
        if self._average is not None:
            # With a count of 0 the next update would copy the weights instead of averaging them.
            self._average.n_averaged.copy_(tensors["average.count"])
            # `best_model` is the module of the average, so that this restores the average itself.
            load_weights(self.best_model, take(tensors, "average.model."), where)
