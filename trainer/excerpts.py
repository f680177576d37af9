"""Which excerpts there are: each depends on (seed, epoch, index) alone.

Excerpts start on the teacher's grid: an excerpt that starts at window ``k`` starts at the first
frame of that window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flsep.cache import Layout, Shards, TrackRecord
from flsep.trainer.config import DataConfig


class DataError(ValueError):
    """Shards that cannot be trained on as configured."""


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of each batch a process reads, when several train together.

    Attributes
    ----------
    rank, num_ranks : int
        Which of the processes it is, and how many there are.
    """

    rank: int = 0
    num_ranks: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.num_ranks:
            raise ValueError(f"rank is {self.rank}; expected one in [0, {self.num_ranks})")

    def share(self, indices: range) -> range:
        """Return this part's indices: neighbours, as many as the others have, or one more."""
        size, num_larger = divmod(len(indices), self.num_ranks)
        start = self.rank * size + min(self.rank, num_larger)
        return indices[start : start + size + (self.rank < num_larger)]


def smallest_batch(num_excerpts: int, batch_size: int) -> int:
    """Return how many excerpts the last batch of an epoch has: the others have `batch_size`."""
    return num_excerpts - (num_excerpts - 1) // batch_size * batch_size


class Grid:
    """Excerpts of one length on the teacher's windows.

    Parameters
    ----------
    layout : Layout
        Of the data.
    excerpt_seconds : float
        Length of an excerpt; it has ``1 + round(excerpt_seconds * rate) // hop`` frames.

    Attributes
    ----------
    num_frames : int
        Of an excerpt.
    num_windows : int
        As many as can overlap an excerpt.
    """

    def __init__(self, layout: Layout, excerpt_seconds: float) -> None:
        self.layout, self.excerpt_seconds = layout, excerpt_seconds
        self.num_frames = layout.num_frames(round(excerpt_seconds * layout.sample_rate_hz))
        self._frames_a_window = (
            layout.window_hop_seconds * layout.sample_rate_hz / layout.hop_samples
        )
        self.num_windows = int(self.num_frames / self._frames_a_window) + 1

    def first_frame(self, window: int) -> int:
        """Return the frame at which an excerpt starts that starts with a window."""
        return self.layout.window_frames(window)[0]

    def bounds(self, window: int) -> npt.NDArray[np.int64]:
        """Return first and one-past-last frame of each window of an excerpt, int64 [window, 2].

        Relative to the excerpt that starts with `window`, so that the first is 0; the distances
        of the others differ by a frame between excerpts, as frames do not divide windows.
        """
        spans = [self.layout.window_frames(window + number) for number in range(self.num_windows)]
        return np.array(spans, np.int64) - np.int64(spans[0][0])

    @property
    def num_whole_windows(self) -> int:
        """Windows that lie wholly inside an excerpt that starts with the track."""
        return int((self.bounds(0)[:, 1] <= self.num_frames).sum())

    def starts(self, track: TrackRecord) -> range:
        """Return the windows at which a whole excerpt of a track can start."""
        last_frame = track.num_frames - self.num_frames
        if last_frame < 0:
            return range(0)
        return range(min(self.last_start(last_frame) + 1, track.num_windows))

    def last_start(self, frame: int) -> int:
        """Return the last window whose first frame is not after a frame, 0 or more."""
        # `first_frame` grows with the window: turn it round, and undo its rounding with itself.
        window = int(frame / self._frames_a_window) + 1
        while self.first_frame(window) > frame:
            window -= 1
        return window

    def split_by_length(
        self, shards: Shards, split: str
    ) -> tuple[list[TrackRecord], list[TrackRecord]]:
        """Return the tracks of a split that can hold an excerpt, and those that cannot.

        Raises
        ------
        DataError
            If there is no track, or none is long enough.
        """
        tracks = shards.tracks(split)
        if not tracks:
            raise DataError(
                f"{shards.folder}: no track in the split {split!r}; precompute a corpus "
                "that has one (--valid-fraction makes a validation split)"
            )
        long_enough: list[TrackRecord] = []
        short: list[TrackRecord] = []
        for track in tracks:
            (long_enough if self.starts(track) else short).append(track)
        if not long_enough:
            longest = max(tracks, key=lambda track: track.num_samples)
            raise DataError(
                f"{shards.folder}: no track of the split {split!r} can hold an excerpt of "
                f"{self.excerpt_seconds:g} s; the longest, {longest.name!r}, has "
                f"{longest.num_samples / self.layout.sample_rate_hz:.2f} s: "
                "use --set data.excerpt_seconds=..."
            )
        return long_enough, short


@dataclass(frozen=True, slots=True)
class Draw:
    """One excerpt, as drawn.

    Attributes
    ----------
    places : tuple of (TrackRecord, int)
        Track and start window: one, of all signals, or one for each source.
    swaps : tuple of bool
        Whether the channels are reversed, for each place.
    gains : tuple of float or None
        For each source; None leaves the track's own mixture.
    """

    places: tuple[tuple[TrackRecord, int], ...]
    swaps: tuple[bool, ...]
    gains: tuple[float, ...] | None


def held_windows(
    layout: Layout, frames: npt.NDArray[np.int64], num_windows: int
) -> npt.NDArray[np.int64]:
    """Return the window that each frame of a track belongs to: the last that started by then."""
    seconds = frames * (layout.hop_samples / layout.sample_rate_hz)
    window = np.floor(seconds / layout.window_hop_seconds + 1e-6).astype(np.int64)
    clipped: npt.NDArray[np.int64] = np.clip(window, 0, num_windows - 1)
    return clipped


class Excerpts(Protocol):
    """Which excerpts an epoch has."""

    def __len__(self) -> int: ...

    def draw(self, epoch: int, index: int) -> Draw:
        """Return one excerpt of an epoch; it depends on nothing but the arguments and the seed."""


class RandomExcerpts:
    """The training excerpts: as many of each track in every epoch, in random order.

    Parameters
    ----------
    grid : Grid
        Says where excerpts can start.
    tracks : sequence of TrackRecord
        Tracks that can hold an excerpt.
    config : DataConfig
        Mixing, gain, swap.
    seed : int
        With the epoch and the index it decides an excerpt.
    """

    def __init__(
        self, grid: Grid, tracks: Sequence[TrackRecord], config: DataConfig, seed: int
    ) -> None:
        self._tracks = [(track, grid.starts(track)) for track in tracks]
        self._num_sources = len(grid.layout.sources)
        self._config = config
        self._seed = seed
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self._tracks) * self._config.excerpts_per_track

    def draw(self, epoch: int, index: int) -> Draw:
        """Draw one excerpt."""
        # 1 + index: with index 0 the entropy would be that of the epoch's shuffle.
        config, rng = self._config, np.random.default_rng((self._seed, epoch, 1 + index))
        if config.mixing == "original":
            track, starts = self._tracks[self._shuffle(epoch)[index] // config.excerpts_per_track]
            place = (track, starts[rng.integers(len(starts))])
            return Draw((place,), (bool(rng.random() < config.swap_probability),), None)
        places = []
        for _ in range(self._num_sources):
            track, starts = self._tracks[rng.integers(len(self._tracks))]
            places.append((track, starts[rng.integers(len(starts))]))
        swaps = rng.random(self._num_sources) < config.swap_probability
        gains = rng.uniform(config.min_gain, config.max_gain, self._num_sources)
        return Draw(tuple(places), tuple(swaps.tolist()), tuple(gains.tolist()))

    def _shuffle(self, epoch: int) -> npt.NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self))
            self._order = epoch, order
        return self._order[1]


class ConsecutiveExcerpts:
    """The validation excerpts: whole tracks, as they are, the same in every epoch.

    Each excerpt starts at the last window that leaves no gap to the one before, and the last one
    of a track as late as it can; all are equally long and count the same.
    """

    def __init__(self, grid: Grid, tracks: Sequence[TrackRecord]) -> None:
        self._tracks = tracks
        self._last = np.array([len(grid.starts(track)) - 1 for track in tracks], np.int64)
        # Tracks differ only in where they end: all start at the windows of one path.
        longest = int(self._last.max(initial=0))
        path = [0]
        while path[-1] < longest:
            end = grid.first_frame(path[-1]) + grid.num_frames
            following = grid.last_start(end)
            path.append(min(max(path[-1] + 1, following), longest))
        self._path = np.array(path, np.int64)
        self._ends = np.cumsum(np.searchsorted(self._path, self._last) + 1)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def draw(self, epoch: int, index: int) -> Draw:
        """Return one excerpt."""
        if not 0 <= index < len(self):
            raise IndexError(f"excerpt {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, "right"))
        position = index - (int(self._ends[number - 1]) if number else 0)
        window = min(int(self._path[position]), int(self._last[number]))
        return Draw(((self._tracks[number], window),), (False,), None)


class BatchesOfRank:
    """Whole batches for each process in turn, where no step makes the processes wait.

    Parameters
    ----------
    excerpts : Excerpts
        Of all processes.
    batch_size : int
        Excerpts in a batch.
    part : Part
        Which process this is.
    """

    def __init__(self, excerpts: Excerpts, batch_size: int, part: Part) -> None:
        self._excerpts, self._batch_size, self._part = excerpts, batch_size, part

    def __len__(self) -> int:
        num_batches, rest = divmod(len(self._excerpts), self._batch_size)
        own = len(range(self._part.rank, num_batches, self._part.num_ranks)) * self._batch_size
        has_rest = num_batches % self._part.num_ranks == self._part.rank
        return own + rest * has_rest

    def draw(self, epoch: int, index: int) -> Draw:
        """Return one excerpt of this process's batches."""
        batch, place = divmod(index, self._batch_size)
        batch = batch * self._part.num_ranks + self._part.rank
        return self._excerpts.draw(epoch, batch * self._batch_size + place)
