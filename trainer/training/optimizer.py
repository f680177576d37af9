"""How weights are updated: Adam, clipping, the plateau schedule, the moving average."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flsep.trainer.approaches.informed import InformedSeparator
from flsep.trainer.config import OptimConfig
from flsep.trainer.runs.checkpoint import load_weights, pack_optimizer, take, unpack_optimizer


class Updates:
    """The optimizer of a model, its schedule, and the moving average of its weights.

    Parameters
    ----------
    model : InformedSeparator
        On its device.
    config : OptimConfig
        The settings.

    Attributes
    ----------
    best_model : InformedSeparator
        The one to validate and to keep: the moving average, or the model itself.
    """

    def __init__(self, model: InformedSeparator, config: OptimConfig) -> None:
        self._model, self._clip_norm = model, config.clip_norm
        self.optimizer = torch.optim.Adam(
            model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer,
            factor=config.plateau_factor,
            patience=config.plateau_patience,
            cooldown=config.plateau_cooldown,
        )
        self._average: AveragedModel | None = None
        self.best_model = model
        if config.ema_decay > 0:
            self._average = AveragedModel(
                model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True
            )
            average = self._average.module
            assert isinstance(average, InformedSeparator)
            for lstm in average.separator.lstms:
                assert isinstance(lstm, nn.LSTM)
                lstm.flatten_parameters()  # copying has torn them apart
            self.best_model = average

    @property
    def learning_rate(self) -> float:
        """What the schedule has made of it."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate

    def start(self) -> None:
        """Forget the gradients of the step before."""
        self.optimizer.zero_grad()

    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients, a scalar; not finite if any of them is not."""
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        norm: Tensor = get_total_norm(gradients)
        return norm

    def apply(self, gradient_norm: Tensor) -> None:
        """Take a step along the gradients, clipped if that is asked for."""
        if self._clip_norm > 0:
            clip_grads_with_norm_(self._model.parameters(), self._clip_norm, gradient_norm)
        self.optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self._model)

    def pack(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the state as JSON values and tensors."""
        groups, tensors = pack_optimizer(self.optimizer)
        if self._average is not None:
            tensors["average.count"] = self._average.n_averaged
            weights = self.best_model.state_dict()
            tensors |= {f"average.model.{name}": value for name, value in weights.items()}
        return {"optimizer": groups, "schedule": self.schedule.state_dict()}, tensors

    def unpack(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str) -> None:
        """Go on from the state that `pack` returned."""
        unpack_optimizer(self.optimizer, values["optimizer"], tensors)
        self.schedule.load_state_dict(values["schedule"])
        if self._average is not None:
            self._average.n_averaged.copy_(tensors["average.count"])
            load_weights(self.best_model, take(tensors, "average.model."), where)
