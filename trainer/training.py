"""A model in training: its data, its loss, its optimizer, and how far they have come."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from flsep.cache import Shards
from flsep.trainer.approaches import check_combination
from flsep.trainer.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_weights,
    pack_optimizer,
    require_same_data,
    unpack_optimizer,
)
from flsep.trainer.config import TrainConfig
from flsep.trainer.data import Batch, Reader, assemble, load_batches
from flsep.trainer.excerpts import ConsecutiveExcerpts, DataError, Grid, RandomExcerpts
from flsep.trainer.losses import SeparationLoss
from flsep.trainer.model import build_model
from flsep.trainer.runs import list_packages
from flsep.trainer.separator import time_signals


class NonFiniteLossError(ValueError):
    """A loss that is NaN or infinite; the step was not taken."""


@dataclass(slots=True)
class Position:
    """How far a training has come; with the seed it decides all that follows.

    Attributes
    ----------
    epoch, batch : int
        Next batch to train on.
    num_excerpts : int
        Seen in this epoch.
    sums : dict
        Of each term of the loss over these.
    best_loss : float or None
        Lowest validation loss.
    best_epoch : int
        When that was.
    seconds, waited_seconds : float
        Spent on this epoch's training so far, and how much of it waiting for data.
    """

    epoch: int = 0
    batch: int = 0
    num_excerpts: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    best_loss: float | None = None
    best_epoch: int = -1
    seconds: float = 0.0
    waited_seconds: float = 0.0


class Training:
    """A model, its data and its optimizer, and how far they have come.

    Parameters
    ----------
    config : TrainConfig
        What to train, and how.
    shards : Shards
        With the splits ``train`` and ``valid``.
    device : torch.device
        Where to compute.
    num_workers : int
        Threads that read.

    Raises
    ------
    ValueError
        If configuration and data do not suit each other.
    CacheError
        If shards are missing or truncated.
    """

    def __init__(
        self, config: TrainConfig, shards: Shards, *, device: torch.device, num_workers: int
    ) -> None:
        approach, data, optim = config.approach, config.data, config.optim
        check_combination(approach.name, data.mixing, approach.teacher_signal)
        self.config, self.device, self.num_workers = config, device, num_workers
        self.layout, self.fingerprint = shards.layout, shards.index.fingerprint
        shards.check_files("train", "valid")
        grid = self.grid = Grid(shards.layout, data.excerpt_seconds)
        self._check_window()
        self.train_tracks, train_short = grid.split_by_length(shards, "train")
        self.valid_tracks, valid_short = grid.split_by_length(shards, "valid")
        self.reader = Reader(
            shards, grid, None if approach.name == "none" else approach.teacher_signal
        )
        self.short_tracks = train_short + valid_short
        self.train_excerpts = RandomExcerpts(grid, self.train_tracks, data, config.fit.seed)
        self.valid_excerpts = ConsecutiveExcerpts(grid, self.valid_tracks)
        self.model = build_model(config, shards.layout, shards.index.statistics).to(device)
        self.separation_loss = SeparationLoss(
            combine=config.loss.combine, time_weight=config.loss.time_weight
        )
        self.optimizer = torch.optim.Adam(
            self.model.parameters(), lr=optim.learning_rate, weight_decay=optim.weight_decay
        )
        self.schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.optimizer,
            factor=optim.plateau_factor,
            patience=optim.plateau_patience,
            cooldown=optim.plateau_cooldown,
        )
        self.position = Position()
        self.metrics: dict[str, Any] = {}

    def _check_window(self) -> None:
        regularized = self.config.approach.name in ("contrastive", "distance")
        if regularized and not self.grid.num_whole_windows:
            raise DataError(
                f"an excerpt of {self.config.data.excerpt_seconds:g} s holds no whole teacher "
                f"window of {self.layout.window_seconds:g} s, which {self.config.approach.name} "
                "compares: use --set data.excerpt_seconds=..."
            )

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.train_excerpts) // self.config.data.batch_size)

    def batches(self, split: str, first: int = 0) -> Iterator[Batch]:
        """Read the batches of this epoch of a split, ``train`` or ``valid``."""
        return load_batches(
            self.reader,
            self.train_excerpts if split == "train" else self.valid_excerpts,
            epoch=self.position.epoch,
            batch_size=self.config.data.batch_size,
            num_workers=self.num_workers,
            first=first,
            pin=self.device.type == "cuda",
        )

    def compute_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Separate a batch and return every term of the loss as a scalar.

        ``magnitude`` and ``time`` are the unweighted terms of ``separation``; ``regularizer`` is
        unweighted too; ``total`` = ``separation`` + weight * ``regularizer`` is what is minimised.
        """
        example = assemble(batch, self.device, self.layout.hop_samples)
        separation = self.model(example.mixture_NBCF.abs(), example.windows)
        terms = self.separation_loss(
            estimates_SNBCF=separation.estimates_SNBCF,
            references_SNBCF=example.references_SNBCF,
            estimates_SBCT=time_signals(
                separation.estimates_SNBCF, example.mixture_NBCF, self.layout.hop_samples
            ),
            references_SBCT=example.references_SBCT,
            mixture_BCT=example.mixture_BCT,
        )
        total = terms["separation"] = terms.pop("total")
        if example.windows is not None:
            terms |= self.model.approach.regularizer(separation, example.windows)
        if "regularizer" in terms:
            total = total + self.model.approach.weight * terms["regularizer"]
        return {**terms, "total": total}

    def step(self, batch: Batch) -> dict[str, float]:
        """Take one optimizer step; raises NonFiniteLossError before it would spoil the weights."""
        self.model.train()
        terms = self.compute_loss(batch)
        values = _to_floats(terms)
        if not all(map(math.isfinite, values.values())):
            raise NonFiniteLossError(self._explain_non_finite(values, batch))
        self.optimizer.zero_grad()
        terms["total"].backward()
        self.optimizer.step()
        return values

    def _explain_non_finite(self, values: dict[str, float], batch: Batch) -> str:
        finite = torch.isfinite(batch.stft).all(dim=-1).transpose(0, 2).flatten(1).all(dim=1)
        bad = [name for name, good in zip(batch.names, finite.tolist(), strict=True) if not good]
        what = "the data of these excerpts hold NaN or infinity" if bad else "the excerpts were"
        terms = ", ".join(f"{name} {value:g}" for name, value in values.items())
        return (
            f"epoch {self.position.epoch}, batch {self.position.batch}: the loss is not finite "
            f"({terms}); no step was taken; {what}: {'; '.join(bad or batch.names)}; "
            + ("precompute them again" if bad else "try a lower optim.learning_rate")
        )

    def train_epoch(
        self, stopping: Callable[[], bool], advance: Callable[[int, float], None]
    ) -> bool:
        """Train on the rest of the epoch; False when it was asked to stop."""
        position = self.position
        batches = self.batches("train", position.batch)
        began = time.perf_counter()
        while (batch := next(batches, None)) is not None:
            position.waited_seconds += time.perf_counter() - began
            values = self.step(batch)
            position.batch += 1
            _add(position.sums, values, len(batch))
            position.num_excerpts += len(batch)
            position.seconds += time.perf_counter() - began
            began = time.perf_counter()
            advance(len(batch), values["total"])
            if stopping():
                return False
        return True

    @torch.no_grad()
    def validate(self, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Return the mean of every term over the validation split; None when asked to stop."""
        self.model.eval()
        sums: dict[str, float] = {}
        for batch in self.batches("valid"):
            terms = self.compute_loss(batch)
            values = _to_floats(terms)
            if not math.isfinite(values["total"]):
                raise NonFiniteLossError(self._explain_non_finite(values, batch))
            _add(sums, values, len(batch))
            if stopping():
                return None
        return {name: value / len(self.valid_excerpts) for name, value in sums.items()}

    def finish_epoch(self, valid: dict[str, float]) -> bool:
        """Take stock of an epoch, move on to the next; return whether this one was the best.

        The schedule, the early stop and the choice of the best follow the separation loss, without
        the regularizer, so that the approaches are judged alike.
        """
        position = self.position
        loss = valid["separation"]
        best = position.best_loss is None or loss < position.best_loss
        self.metrics = {
            "epoch": position.epoch,
            "train": {name: v / position.num_excerpts for name, v in position.sums.items()},
            "valid": valid,
            "best": best,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "seconds": round(position.seconds, 3),
            "excerpts_per_second": round(position.num_excerpts / position.seconds, 3),
            "data_wait_share": round(position.waited_seconds / position.seconds, 4),
        }
        self.schedule.step(loss)
        self.position = Position(
            epoch=position.epoch + 1,
            best_loss=loss if best else position.best_loss,
            best_epoch=position.epoch if best else position.best_epoch,
        )
        return best

    @property
    def finished(self) -> str | None:
        """Why there is nothing left to do, or None."""
        position, limits = self.position, self.config.fit
        if position.epoch >= limits.epochs:
            return f"all {limits.epochs} epochs are done"
        since = position.epoch - 1 - position.best_epoch
        if position.best_loss is not None and since >= limits.patience:
            return f"no better validation loss for {since} epochs"
        return None

    def checkpoint(self, *, resumable: bool) -> Checkpoint:
        """Return the present state, with or without what resuming needs."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        training = None
        if resumable:
            groups, state = pack_optimizer(self.optimizer)
            tensors |= state | {"random.cpu": torch.get_rng_state()}
            if self.device.type == "cuda":
                tensors["random.cuda"] = torch.cuda.get_rng_state(self.device)
            training = {
                "optimizer": groups,
                "schedule": self.schedule.state_dict(),
                "position": asdict(self.position),
            }
        return Checkpoint(
            config=self.config,
            layout=self.layout,
            standard=self.reader.standard,
            fingerprint=self.fingerprint,
            epoch=self.position.epoch,
            metrics=self.metrics,
            packages=list_packages(),
            training=training,
            tensors=tensors,
        )

    def restore(self, checkpoint: Checkpoint, where: str) -> None:
        """Go on from a checkpoint.

        Raises
        ------
        CheckpointError
            If it belongs to other data, or cannot be resumed from.
        """
        require_same_data(checkpoint, self.layout, where)
        if checkpoint.fingerprint != self.fingerprint:
            raise CheckpointError(
                f"{where}: trained on shards made with another configuration; resume with those"
            )
        if checkpoint.training is None:
            raise CheckpointError(f"{where}: holds weights only; resume from last.safetensors")
        load_weights(self.model, checkpoint, where)
        training, tensors = checkpoint.training, checkpoint.tensors
        unpack_optimizer(self.optimizer, training["optimizer"], tensors)
        self.schedule.load_state_dict(training["schedule"])
        self.position = Position(**training["position"])
        self.metrics = checkpoint.metrics
        torch.set_rng_state(tensors["random.cpu"])
        if self.device.type == "cuda" and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], self.device)


def _add(sums: dict[str, float], values: dict[str, float], weight: int) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value * weight


def _to_floats(terms: dict[str, Tensor]) -> dict[str, float]:
    """Bring all terms to the CPU at once: each transfer waits for the device."""
    values = torch.stack([term.detach().float() for term in terms.values()]).tolist()
    return dict(zip(terms, values, strict=True))
