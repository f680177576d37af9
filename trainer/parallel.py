"""Training in several processes: each has its part of every batch, and all have the same weights.

`torchrun` starts the processes. What depends on the whole batch is computed over all parts: the
statistics of batch norm (`BatchNorm`), the windows that a regularizer compares (`gather_rows`) and
the losses (`sum_over_ranks`). With one process these functions do nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from flsep.trainer.errors import LostProcessError

# A rank may wait for another that verifies a shard for the first time.
_TIMEOUT = timedelta(minutes=30)


# The group's destructor holds Python's lock while it waits for Gloo's threads, which may need the
# lock to release the last collective. Keeping the group until the interpreter ends avoids this.
_groups: list[Any] = []


@dataclass(frozen=True, slots=True)
class Rank:
    """Number of a process, from 0, among the `world_size` processes that train together."""

    number: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.world_size:
            raise ValueError(f"rank is {self.number}; expected one in [0, {self.world_size})")

    def share(self, indices: range) -> range:
        """Return this rank's consecutive share of indices; the first ranks may have one more."""
        size, num_larger = divmod(len(indices), self.world_size)
        start = self.number * size + min(self.number, num_larger)
        return indices[start : start + size + (self.number < num_larger)]


@contextmanager
def joined(device: torch.device) -> Iterator[Rank]:
    """Join the processes that `torchrun` has started, if it has, and yield this one's rank.

    NCCL connects GPUs, Gloo connects processors. LostProcessError says that another process ended.
    """
    if not (dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1):
        yield Rank()
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_TIMEOUT)
    _groups.append(dist.group.WORLD)
    try:
        yield Rank(dist.get_rank(), dist.get_world_size())
    except (dist.DistError, RuntimeError) as error:
        # NCCL's failure has a type of its own; Gloo raises a RuntimeError.
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not lost:
            raise
        raise LostProcessError(
            "another process of this training has ended; see its message, continue with --resume"
        ) from error
    finally:
        dist.destroy_process_group()


def local_rank() -> int:
    """Return the number of this process on its machine, 0 without `torchrun`."""
    return int(os.environ["LOCAL_RANK"]) if dist.is_torchelastic_launched() else 0


def count_local_ranks() -> int:
    """Return the number of processes that train together on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def count_ranks() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Wait until all processes have called this."""
    if count_ranks() > 1:
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up a tensor over the processes, without gradient."""
    if count_ranks() > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether the flag is set in any process; all of them have to call this."""
    if count_ranks() == 1:
        return flag
    return bool(sum_over_ranks(torch.tensor(float(flag), device=device)).item())


def gather_objects(value: Any) -> list[Any]:
    """Return the picklable values of all processes, in the order of the ranks."""
    if count_ranks() == 1:
        return [value]
    values = [None] * count_ranks()
    dist.all_gather_object(values, value)
    return values


def gather_rows(rows_MX: Tensor) -> Tensor:
    """Concatenate the rows of all processes, float [row, feature], in the order of the ranks.

    The number of rows may differ. In the backward pass each process receives the sum of the
    gradients that all processes have for its rows.
    """
    if count_ranks() == 1:
        return rows_MX
    # Each process fills in its own entry; the sum is the table of all.
    counts = torch.zeros(count_ranks(), dtype=torch.int64, device=rows_MX.device)
    counts[dist.get_rank()] = len(rows_MX)
    sizes = sum_over_ranks(counts).tolist()
    before = sum(sizes[: dist.get_rank()])
    after = sum(sizes) - before - len(rows_MX)
    # Zeros stand for the rows of the others, so that the sum is the concatenation.
    gathered: Tensor = _Sum.apply(F.pad(rows_MX, (0, 0, before, after)))
    return gathered


class _Sum(torch.autograd.Function):
    """Add up a tensor over the processes, and in the backward pass their gradients of the sum."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return sum_over_ranks(values.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return sum_over_ranks(grads[0].clone(memory_format=torch.contiguous_format))


class BatchNorm(nn.BatchNorm1d):
    """Batch norm over the last axis, float [..., feature], with the statistics of all processes.

    `torch.nn.SyncBatchNorm` works on GPUs only, so no test on a CPU could cover it.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def forward(
        self, input: Tensor, gain_X: Tensor | None = None, shift_X: Tensor | None = None
    ) -> Tensor:
        """Normalise, multiply by a gain and add a shift; by default the weight and the bias."""
        gain_X = self.weight if gain_X is None else gain_X
        shift_X = self.bias if shift_X is None else shift_X
        rows_MX = input.flatten(0, -2)
        # `F.batch_norm` leaves counting to its caller.
        if self.training:
            self.num_batches_tracked += 1
        if self.training and count_ranks() > 1:
            output_MX = self._normalise_together(rows_MX, gain_X, shift_X)
        else:
            output_MX = F.batch_norm(
                rows_MX,
                self.running_mean,
                self.running_var,
                gain_X,
                shift_X,
                self.training,
                self.momentum,
                self.eps,
            )
        output: Tensor = output_MX.unflatten(0, input.shape[:-1])
        return output

    def _normalise_together(self, rows_MX: Tensor, gain_X: Tensor, shift_X: Tensor) -> Tensor:
        # The statistics are float32, whatever the precision of the network.
        with torch.autocast(rows_MX.device.type, enabled=False):
            rows = rows_MX.float()
            count = sum_over_ranks(torch.tensor(float(len(rows)), device=rows.device))
            # Centre before squaring: E[x^2] - E[x]^2 would cancel where the mean is large.
            mean_X = _Sum.apply(rows.sum(0)) / count
            centred_MX = rows - mean_X
            variance_X = _Sum.apply(centred_MX.square().sum(0)) / count
            with torch.no_grad():
                self.running_mean.lerp_(mean_X, self.momentum)
                # As in torch, the running variance is the unbiased one.
                self.running_var.lerp_(variance_X * (count / (count - 1)), self.momentum)
            scale_X = (variance_X + self.eps).rsqrt() * gain_X
            output_MX: Tensor = centred_MX * scale_X + shift_X
            return output_MX.to(rows_MX.dtype)
