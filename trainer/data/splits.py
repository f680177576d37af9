"""The training and the validation split of a folder of shards, as batches of one process."""

from collections.abc import Callable, Generator

import torch

from flsep.cache import Grid, Mixes, Shards
from flsep.trainer.config import TrainConfig
from flsep.trainer.data.batch import Batch
from flsep.trainer.data.excerpts import (
    BatchesOfRank,
    ConsecutiveExcerpts,
    Excerpts,
    draw_excerpts,
    smallest_batch,
)
from flsep.trainer.data.loader import load_batches
from flsep.trainer.data.preloaded import PreloadedShards, wanted_signals
from flsep.trainer.data.reader import Reader
from flsep.trainer.errors import DataError
from flsep.trainer.parallel import Rank, count_local_ranks


class Splits:
    """The excerpts that a training and its validation read.

    `compares_windows` says that an excerpt is of no use unless it holds a whole teacher window.
    `short_tracks` are too short for an excerpt. `device`, `num_workers`, `rank`, `resident`,
    `report` and `mixes` are those of `flsep.trainer.training.state.Training`.

    Raises
    ------
    DataError
        If configuration, data and device do not suit each other.
    CacheError
        If shards are missing or truncated.
    """

    def __init__(
        self,
        config: TrainConfig,
        shards: Shards,
        *,
        teacher_signal: str | None,
        compares_windows: bool,
        device: torch.device,
        num_workers: int,
        rank: Rank,
        resident: str | None,
        report: Callable[[int, int], None] | None,
        mixes: Mixes | None,
    ) -> None:
        data = config.data
        self._batch_size = data.batch_size
        self._device, self._num_workers, self._rank = device, num_workers, rank
        shards.check_files("train", "valid")
        grid = self.grid = Grid(shards.layout, data.excerpt_seconds)
        if compares_windows and not grid.num_whole_windows:
            raise DataError(
                f"an excerpt of {data.excerpt_seconds:g} s holds no whole teacher window of "
                f"{shards.layout.window_seconds:g} s, which {config.approach.name} compares; use "
                "--set data.excerpt_seconds=..."
            )
        self.train_tracks, train_short = grid.split_by_length(shards, "train")
        self.valid_tracks, valid_short = grid.split_by_length(shards, "valid")
        self.short_tracks = train_short + valid_short
        self.train_excerpts = draw_excerpts(
            grid,
            self.train_tracks,
            data,
            config.fit.seed,
            mixes.of(shards) if mixes else None,
        )
        self.valid_excerpts = ConsecutiveExcerpts(grid, self.valid_tracks)
        # This fails within moments; loading the shards below can take minutes.
        self._check_parts()
        source: Shards | PreloadedShards = shards
        if resident is not None:
            if resident == "device" and device.type == "cpu":
                raise DataError("--resident device needs a GPU; on the CPU use --resident host")
            source = PreloadedShards(
                shards,
                wanted_signals(shards.layout, data.mixing, self.train_tracks, self.valid_tracks),
                device if resident == "device" else torch.device("cpu"),
                teacher_signal=teacher_signal,
                num_threads=max(1, num_workers),
                report=report,
                num_processes=count_local_ranks(),
            )
        self.reader = Reader(source, grid, teacher_signal)

    def _check_parts(self) -> None:
        # Each process needs an excerpt of every batch: a training step waits for all processes.
        smallest = smallest_batch(len(self.train_excerpts), self._batch_size)
        if smallest < self._rank.world_size:
            raise DataError(
                f"the last batch of an epoch has {smallest} of its {len(self.train_excerpts)} "
                f"excerpts, too few for {self._rank.world_size} processes: use --set "
                "data.batch_size=... or --set data.excerpts_per_track=..., or fewer processes"
            )

    @property
    def num_batches(self) -> int:
        """Batches in a training epoch."""
        return -(-len(self.train_excerpts) // self._batch_size)

    @property
    def num_valid_rounds(self) -> int:
        """Batches of the process that validates on most."""
        return -(-len(self.valid_excerpts) // (self._batch_size * self._rank.world_size))

    def train_batches(self, epoch: int, first: int = 0) -> Generator[Batch, None, None]:
        """Read this process's part of the batches of an epoch, from the `first` one on."""
        return self._load(self.train_excerpts, epoch, first, self._rank)

    def valid_batches(self) -> Generator[Batch, None, None]:
        """Read the validation batches of this process."""
        # Ranks validate on whole batches, so that none waits for another within a step.
        # What `own` holds belongs to this rank alone: the loader must not share it out again.
        own = BatchesOfRank(self.valid_excerpts, self._batch_size, self._rank)
        return self._load(own, 0, 0, Rank())

    def _load(
        self, excerpts: Excerpts, epoch: int, first: int, rank: Rank
    ) -> Generator[Batch, None, None]:
        return load_batches(
            self.reader,
            excerpts,
            epoch=epoch,
            batch_size=self._batch_size,
            num_workers=self._num_workers,
            first=first,
            rank=rank,
            device=self._device,
        )
