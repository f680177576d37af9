"""The state of a training: model, data, loss, optimizer, and how far they have come."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flsep.cache import Mixes, Shards
from flsep.cache.format import fingerprint
from flsep.trainer.approaches.informed import build_model
from flsep.trainer.approaches.interface import require_possible
from flsep.trainer.config import TrainConfig
from flsep.trainer.data.splits import Splits
from flsep.trainer.errors import CheckpointError
from flsep.trainer.parallel import Rank, gather_objects
from flsep.trainer.runs.checkpoint import Checkpoint, load_weights, require_same_data, take
from flsep.trainer.runs.folder import list_packages
from flsep.trainer.training.objective import Objective
from flsep.trainer.training.optimizer import Optimizer


@dataclass(slots=True)
class Position:
    """How far a training has come; together with the seed it decides everything that follows."""

    # The next batch to train on.
    epoch: int = 0
    batch: int = 0
    # The excerpts of this epoch so far, and the sum of each term of the loss over them.
    num_excerpts: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    best_loss: float | None = None
    best_epoch: int = -1
    # The sum of gradient norms and the steps in this epoch, its time, and how much of that time the
    # device waited for data.
    gradient_norms: float = 0.0
    num_steps: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0


class Training:
    """A model, its data and its optimizer, and how far they have come.

    Parameters
    ----------
    shards : Shards
        Shards with the splits ``train`` and ``valid``.
    resident : {'device', 'host'} or None
        Memory to load all data into first; `report` is called with the bytes loaded so far, and all
        there are.
    mixes : Mixes, optional
        Mixes for rendered mixing.

    Raises
    ------
    ConfigError, DataError
        If configuration, data and device do not suit each other.
    CacheError
        If shards are missing or truncated.
    """

    def __init__(
        self,
        config: TrainConfig,
        shards: Shards,
        *,
        device: torch.device,
        num_workers: int,
        rank: Rank = Rank(),  # noqa: B008 - immutable
        resident: str | None = None,
        report: Callable[[int, int], None] | None = None,
        mixes: Mixes | None = None,
    ) -> None:
        self.needs = require_possible(config)
        self.config, self.device, self.rank = config, device, rank
        self.layout, self.fingerprint = shards.layout, shards.index.fingerprint
        self.mixes = mixes
        self.objective = Objective(config, device, shards.layout.hop_samples)
        self.splits = Splits(
            config,
            shards,
            teacher_signal=self.needs.teacher_signal,
            compares_windows=self.needs.latent is not None,
            device=device,
            num_workers=num_workers,
            rank=rank,
            resident=resident,
            report=report,
            mixes=mixes,
        )
        # After the data, whose loading may fail: building the model seeds torch.
        self.model = build_model(config, shards.layout, shards.index.statistics).to(device)
        self.optimizer = Optimizer(self.model, config.optim)
        if config.compute.compile:
            self.model.separator.compile_layers()
        self.parallel_model: nn.Module = self.model
        if rank.world_size > 1:
            # All processes have drawn the same weights; from here on each draws its own dropout.
            self._seed_rank(0)
            self.parallel_model = DistributedDataParallel(
                self.model,
                device_ids=[device] if device.type == "cuda" else None,
                forward_sync_buffers=False,  # `BatchNorm` computes them over all processes already
                gradient_as_bucket_view=True,
            )
        self.position = Position()
        self.metrics: dict[str, Any] = {}

    def _seed_rank(self, epoch: int) -> None:
        """Seed torch so that the dropout of the processes differs."""
        entropy = (self.config.fit.seed, epoch, self.rank.number)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))

    @property
    def finished(self) -> str | None:
        """Why there is nothing left to do, or None."""
        position, limits = self.position, self.config.fit
        if position.epoch >= limits.epochs:
            return f"all {limits.epochs} epochs are done"
        # `epoch` is the next one; the last finished one is the epoch before.
        since = position.epoch - 1 - position.best_epoch
        if position.best_loss is not None and since >= limits.patience:
            return f"no better validation loss for {since} epochs"
        return None

    def checkpoint(self, *, resumable: bool) -> Checkpoint:
        """Return the present state, with or without what resuming needs.

        With `resumable` all processes have to call it; the checkpoint is the same in all.
        """
        # A resumable checkpoint has the average of the weights in the optimizer's state.
        weights = self.model if resumable else self.optimizer.best_model
        tensors = {f"model.{name}": value for name, value in weights.state_dict().items()}
        training = None
        if resumable:
            training, state = self.optimizer.state()
            training["position"] = asdict(self.position)
            training["mixes"] = self._describe_mixes()
            tensors |= state
            generators = {"cpu": torch.get_rng_state()}
            if self.device.type == "cuda":
                generators["cuda"] = torch.cuda.get_rng_state(self.device)
            for rank, of_rank in enumerate(gather_objects(generators)):
                tensors |= {f"random.{kind}.{rank}": value for kind, value in of_rank.items()}
        return Checkpoint(
            config=self.config,
            layout=self.layout,
            standard=self.splits.reader.standard,
            fingerprint=self.fingerprint,
            epoch=self.position.epoch,
            metrics=self.metrics,
            packages=list_packages(),
            training=training,
            tensors=tensors,
        )

    def restore(self, checkpoint: Checkpoint, where: str) -> None:
        """Continue from a checkpoint; `where` names its file when CheckpointError refuses it."""
        require_same_data(checkpoint, self.layout, where)
        if checkpoint.fingerprint != self.fingerprint:
            raise CheckpointError(
                f"{where}: trained on shards made with another configuration; resume with those"
            )
        if checkpoint.training is None:
            raise CheckpointError(f"{where}: holds weights only; resume from last.safetensors")
        self._require_same_mixes(checkpoint.training, where)
        training, tensors = checkpoint.training, checkpoint.tensors
        load_weights(self.model, take(tensors, "model."), where)
        self.optimizer.load_state(training, tensors, where)
        self.position = Position(**training["position"])
        self.metrics = checkpoint.metrics
        rank = self.rank.number
        if f"random.cpu.{rank}" in tensors:
            torch.set_rng_state(tensors[f"random.cpu.{rank}"])
        else:  # the checkpoint was written by fewer processes
            self._seed_rank(1 + self.position.epoch)
        if self.device.type == "cuda" and f"random.cuda.{rank}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{rank}"], self.device)

    def _describe_mixes(self) -> dict[str, Any] | None:
        if self.mixes is None:
            return None
        config = self.mixes.config.to_json()
        return {"fingerprint": fingerprint(config), "num_epochs": self.mixes.num_epochs}

    def _require_same_mixes(self, training: dict[str, Any], where: str) -> None:
        """Refuse other mixes than those of the epochs so far; epochs may have been added."""
        stored, found = training.get("mixes"), self._describe_mixes()
        if stored == found:
            return
        if stored is None or found is None or stored["fingerprint"] != found["fingerprint"]:
            raise CheckpointError(f"{where}: trained with other mixes; resume with the same")
        # Epochs beyond the last of the mixes begin again with the first: their number counts then.
        fewest = min(stored["num_epochs"], found["num_epochs"])
        position = training["position"]
        if position["epoch"] + (position["batch"] > 0) > fewest:
            raise CheckpointError(
                f"{where}: trained in epoch {position['epoch'] + 1} with {stored['num_epochs']} "
                f"epochs of mixes, {self.mixes and self.mixes.folder} has {found['num_epochs']}; "
                "resume with as many"
            )
