"""A model in training: its data, its loss, its optimizer, and how far they have come."""

import math
from collections.abc import Callable, Generator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flsep.cache import Mixes, Shards
from flsep.cache.format import fingerprint
from flsep.trainer.approaches.informed import build_model
from flsep.trainer.approaches.registry import check_combination
from flsep.trainer.config import TrainConfig
from flsep.trainer.data.batch import Batch
from flsep.trainer.data.splits import Splits
from flsep.trainer.errors import CheckpointError, NonFiniteLossError
from flsep.trainer.parallel import Part, gather_objects, sum_over_ranks
from flsep.trainer.runs.checkpoint import Checkpoint, load_weights, require_same_data, take
from flsep.trainer.runs.folder import list_packages
from flsep.trainer.training.clock import WaitClock
from flsep.trainer.training.objective import Objective, explain_non_finite, find_bad_data
from flsep.trainer.training.optimizer import Updates


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
    gradient_norms : float
        Sum over the steps of this epoch.
    num_steps : int
        How many that were.
    seconds, waited_seconds : float
        Spent on this epoch's training so far, and how much of it the device waited for data.
    """

    epoch: int = 0
    batch: int = 0
    num_excerpts: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    best_loss: float | None = None
    best_epoch: int = -1
    gradient_norms: float = 0.0
    num_steps: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """What a batch has brought.

    Attributes
    ----------
    num_excerpts : int
        In all processes.
    loss : float
        The total.
    is_step : bool
        Whether the weights were updated: between two updates nothing can be saved.
    """

    num_excerpts: int
    loss: float
    is_step: bool


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
    part : Part
        Which process this is, of those that train together (`flsep.trainer.parallel.join`).
    resident : {'device', 'host'} or None
        Load all data into the memory of the device or the host first.
    report : callable, optional
        Called with the bytes loaded so far, and all there are.
    mixes : Mixes, optional
        For rendered mixing.

    Raises
    ------
    ValueError
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
        part: Part = Part(),  # noqa: B008 - immutable
        resident: str | None = None,
        report: Callable[[int, int], None] | None = None,
        mixes: Mixes | None = None,
    ) -> None:
        approach = config.approach
        check_combination(approach.name, config.data.mixing, approach.teacher_signal)
        self.config, self.device, self.part = config, device, part
        self.layout, self.fingerprint = shards.layout, shards.index.fingerprint
        self.objective = Objective(config, device, shards.layout.hop_samples)
        self.splits = Splits(
            config,
            shards,
            device=device,
            num_workers=num_workers,
            part=part,
            resident=resident,
            report=report,
            mixes=mixes,
        )
        self.mixes = mixes
        self.model = build_model(config, shards.layout, shards.index.statistics).to(device)
        self.updates = Updates(self.model, config.optim)
        if config.compute.compile:
            self.model.separator.compile_layers()
        self._parallel: nn.Module = self.model
        if part.num_ranks > 1:
            self._seed_rank(0)
            self._parallel = DistributedDataParallel(
                self.model,
                device_ids=[device] if device.type == "cuda" else None,
                broadcast_buffers=False,  # statistics are those of all processes already
                gradient_as_bucket_view=True,
            )
        self.position = Position()
        self.metrics: dict[str, Any] = {}
        self._earlier_names: list[str] = []

    def _seed_rank(self, epoch: int) -> None:
        """Let the dropout of the processes differ."""
        entropy = (self.config.fit.seed, epoch, self.part.rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))

    def _batches_of_step(self, batch: int) -> range:
        """Return the numbers of the batches that make one step with a batch."""
        size = self.config.optim.accumulate
        return range(
            batch - batch % size, min(batch - batch % size + size, self.splits.num_batches)
        )

    def train_batch(self, batch: Batch) -> dict[str, float]:
        """Train on the next batch; the last one of a step updates the weights.

        Returns
        -------
        dict of str to float
            Every term of the loss, over all processes, and the ``gradient_norm`` of a step.

        Raises
        ------
        NonFiniteLossError
            Before a loss or a gradient that is not finite would spoil the weights.
        """
        self.model.train()
        of_step = self._batches_of_step(self.position.batch)
        is_first, is_last = (self.position.batch == of_step[k] for k in (0, -1))
        if is_first:
            self.updates.start()
            self._earlier_names = []
        size, end = self.config.data.batch_size, of_step[-1] + 1
        in_step = min(end * size, len(self.splits.train_excerpts)) - of_step[0] * size
        whole, parts = batch.num_in_all / in_step, len(batch) / batch.num_in_all
        parallel = self._parallel
        with (
            nullcontext()
            if is_last or not isinstance(parallel, DistributedDataParallel)
            else parallel.no_sync()
        ):
            terms = self.objective(parallel, batch)
            # Gradients are averaged over the processes. Windows are compared in all of them, the
            # excerpts are not: each process has its share.
            share = parts * self.part.num_ranks
            rest = terms["total"] - terms["separation"]
            (whole * (share * terms["separation"] + rest)).backward()
        values = torch.stack([term.detach().float() for term in terms.values()])
        values = sum_over_ranks(values * parts)
        if is_last:
            terms["gradient_norm"] = norm = self.updates.gradient_norm()
            values = torch.cat([values, norm[None]])
        found = dict(zip(terms, values.tolist(), strict=True))  # waits for the device, once
        if not all(map(math.isfinite, found.values())):
            self._refuse_non_finite(found, batch)
        if is_last:
            self.updates.apply(norm)
        self._earlier_names += batch.names
        return found

    def _refuse_non_finite(self, values: dict[str, float], batch: Batch) -> NoReturn:
        parts = gather_objects(([*self._earlier_names, *batch.names], find_bad_data(batch)))
        names, bad = ([name for part in parts for name in part[k]] for k in (0, 1))
        terms = {name: value for name, value in values.items() if name != "gradient_norm"}
        raise NonFiniteLossError(
            f"epoch {self.position.epoch}, batch {self.position.batch}: "
            + explain_non_finite(terms, names, bad)
        )

    def train_epoch(self) -> Generator[Progress, None, None]:
        """Train on the rest of the epoch, and say after each batch how it went."""
        clock, start = WaitClock(self.device), self.position
        with closing(self.splits.train_batches(start.epoch, start.batch)) as batches:
            while True:
                with clock.waiting():
                    batch = next(batches, None)
                if batch is None:
                    return
                values = self.train_batch(batch)
                position = self.position
                is_step = position.batch == self._batches_of_step(position.batch)[-1]
                if is_step:
                    position.gradient_norms += values.pop("gradient_norm")
                    position.num_steps += 1
                position.batch += 1
                position.num_excerpts += batch.num_in_all
                _add(position.sums, values, batch.num_in_all)
                spent, waited = clock.lap()
                position.seconds += spent
                position.waited_seconds += waited
                yield Progress(batch.num_in_all, values["total"], is_step)
                clock.start()

    @torch.no_grad()
    def validate(self, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Return the mean of every term over the validation split; None when asked to stop.

        Each process validates on whole batches, so that their number changes nothing.
        """
        model = self.updates.best_model.eval()
        sums: dict[str, float] = {}
        with closing(self.splits.valid_batches()) as batches:
            for _ in range(self.splits.num_valid_rounds):
                batch = next(batches, None)
                if batch is not None:
                    _add(sums, self._validate_batch(model, batch), len(batch))
                if self.any_rank(stopping()):
                    return None
        totals: dict[str, float] = {}
        for part in gather_objects(sums):
            _add(totals, part, 1)
        return {name: value / len(self.splits.valid_excerpts) for name, value in totals.items()}

    def _validate_batch(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        terms = self.objective(model, batch)
        values = torch.stack([term.float() for term in terms.values()]).tolist()
        found = dict(zip(terms, values, strict=True))
        if not math.isfinite(found["total"]):
            raise NonFiniteLossError(
                f"epoch {self.position.epoch}, validation: "
                + explain_non_finite(found, list(batch.names), find_bad_data(batch))
            )
        return found

    def any_rank(self, flag: bool) -> bool:
        """Whether any process says so; all of them have to ask."""
        if self.part.num_ranks == 1:
            return flag
        return bool(sum_over_ranks(torch.tensor(float(flag), device=self.device)).item())

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
            "learning_rate": self.updates.learning_rate,
            "gradient_norm": position.gradient_norms / max(1, position.num_steps),
            "seconds": round(position.seconds, 3),
            "excerpts_per_second": round(position.num_excerpts / position.seconds, 3),
            "data_wait_share": round(position.waited_seconds / position.seconds, 4),
        }
        self.updates.schedule.step(loss)
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
        """Return the present state, with or without what resuming needs.

        All processes have to ask for what resuming needs; it is the same in all.
        """
        weights = self.model if resumable else self.updates.best_model
        tensors = {f"model.{name}": value for name, value in weights.state_dict().items()}
        training = None
        if resumable:
            training, state = self.updates.pack()
            training["position"] = asdict(self.position)
            training["mixes"] = self._describe_mixes()
            tensors |= state
            states = {"cpu": torch.get_rng_state()}
            if self.device.type == "cuda":
                states["cuda"] = torch.cuda.get_rng_state(self.device)
            for rank, of_rank in enumerate(gather_objects(states)):
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
        self._require_same_mixes(checkpoint.training, where)
        training, tensors = checkpoint.training, checkpoint.tensors
        load_weights(self.model, take(tensors, "model."), where)
        self.updates.unpack(training, tensors, where)
        self.position = Position(**training["position"])
        self.metrics = checkpoint.metrics
        rank = self.part.rank
        if f"random.cpu.{rank}" in tensors:
            torch.set_rng_state(tensors[f"random.cpu.{rank}"])
        else:  # there were fewer processes
            self._seed_rank(1 + self.position.epoch)
        if self.device.type == "cuda" and f"random.cuda.{rank}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{rank}"], self.device)

    def _describe_mixes(self) -> dict[str, Any] | None:
        if self.mixes is None:
            return None
        config = self.mixes.config.to_json()
        return {"fingerprint": fingerprint(config), "num_epochs": self.mixes.num_epochs}

    def _require_same_mixes(self, training: dict[str, Any], where: str) -> None:
        """Refuse mixes that are not those of the epochs so far; more of them may have come."""
        stored, found = training.get("mixes"), self._describe_mixes()
        if stored == found:
            return
        if stored is None or found is None or stored["fingerprint"] != found["fingerprint"]:
            raise CheckpointError(f"{where}: trained with other mixes; resume with the same")
        fewest = min(stored["num_epochs"], found["num_epochs"])
        position = training["position"]
        if position["epoch"] + (position["batch"] > 0) > fewest:
            raise CheckpointError(
                f"{where}: trained in epoch {position['epoch'] + 1} with {stored['num_epochs']} "
                f"epochs of mixes, {self.mixes and self.mixes.folder} has {found['num_epochs']}: "
                "resume with as many"
            )


def _add(sums: dict[str, float], values: dict[str, float], weight: int) -> None:
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value * weight
