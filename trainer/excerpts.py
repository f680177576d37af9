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
        frames_a_window = layout.window_hop_seconds * layout.sample_rate_hz / layout.hop_samples
        self.num_windows = int(self.num_frames / frames_a_window) + 1

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

    def starts(self, track: TrackRecord) -> list[int]:
        """Return the windows at which a whole excerpt of a track can start, in order."""
        last_frame = track.num_frames - self.num_frames
        windows = range(track.num_windows)
        return [k for k in windows if self.first_frame(k) <= last_frame]

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
        long_enough = [track for track in tracks if self.starts(track)]
        if not long_enough:
            longest = max(tracks, key=lambda track: track.num_samples)
            raise DataError(
                f"{shards.folder}: no track of the split {split!r} can hold an excerpt of "
                f"{self.excerpt_seconds:g} s; the longest, {longest.name!r}, has "
                f"{longest.num_samples / self.layout.sample_rate_hz:.2f} s: "
                "use --set data.excerpt_seconds=..."
            )
        return long_enough, [track for track in tracks if track not in long_enough]


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
        self._places: list[tuple[TrackRecord, int]] = []
        for track in tracks:
            starts = grid.starts(track)
            frames = [grid.first_frame(k) for k in starts]
            position = 0
            while True:
                self._places.append((track, starts[position]))
                if position == len(starts) - 1:
                    break
                end = frames[position] + grid.num_frames
                following = int(np.searchsorted(frames, end, "right")) - 1
                position = max(position + 1, following)

    def __len__(self) -> int:
        return len(self._places)

    def draw(self, epoch: int, index: int) -> Draw:
        """Return one excerpt."""
        return Draw((self._places[index],), (False,), None)
