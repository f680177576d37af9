"""Where excerpts of tracks can start, and how random mixes of them are drawn.

The trainer mixes as it reads; the offline stage renders mixes ahead. Both draw here, so that one
seed gives one sequence of mixes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flsep.cache.errors import MissingDataError
from flsep.cache.format import Layout
from flsep.cache.index import TrackRecord
from flsep.cache.reader import Shards


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
        MissingDataError
            If there is no track, or none is long enough.
        """
        tracks = shards.tracks(split)
        if not tracks:
            raise MissingDataError(
                f"{shards.folder}: no track in the split {split!r}; precompute a corpus "
                "that has one (--valid-fraction makes a validation split)"
            )
        long_enough: list[TrackRecord] = []
        short: list[TrackRecord] = []
        for track in tracks:
            (long_enough if self.starts(track) else short).append(track)
        if not long_enough:
            longest = max(tracks, key=lambda track: track.num_samples)
            raise MissingDataError(
                f"{shards.folder}: no track of the split {split!r} can hold an excerpt of "
                f"{self.excerpt_seconds:g} s; the longest, {longest.name!r}, has "
                f"{longest.num_samples / self.layout.sample_rate_hz:.2f} s: use shorter ones "
                "(--seconds of flsep-precompute mixes, --set data.excerpt_seconds=... of "
                "flsep-train)"
            )
        return long_enough, short


@dataclass(frozen=True, slots=True)
class Heard:
    """What a teacher heard in an excerpt itself, in windows from its start on.

    Attributes
    ----------
    embedding : ndarray
        float32 [signal, window, dim]: of the mixture, then of the scaled sources, where the
        teacher heard them.
    activity_db : ndarray
        float32 [signal, window], dBFS.
    """

    embedding: npt.NDArray[np.float32]
    activity_db: npt.NDArray[np.float32]


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
    heard : Heard or None
        None where the teacher's windows are those of the tracks.
    """

    places: tuple[tuple[TrackRecord, int], ...]
    swaps: tuple[bool, ...]
    gains: tuple[float, ...] | None
    heard: Heard | None = None


class RandomMixes:
    """Mixes of random excerpts: each source from a random track, with its own gain and swap.

    Parameters
    ----------
    grid : Grid
        Says where excerpts can start.
    tracks : sequence of TrackRecord
        Tracks that can hold an excerpt; their order counts.
    mixes_per_track : int
        An epoch has this many mixes for each track.
    min_gain, max_gain : float
        Each source's gain is uniform between these.
    swap_probability : float
        Of reversing the order of a source's channels.
    seed : int
        With the epoch and the index it decides a mix.
    """

    def __init__(
        self,
        grid: Grid,
        tracks: Sequence[TrackRecord],
        *,
        mixes_per_track: int,
        min_gain: float,
        max_gain: float,
        swap_probability: float,
        seed: int,
    ) -> None:
        self._tracks = [(track, grid.starts(track)) for track in tracks]
        self._num_sources = len(grid.layout.sources)
        self._mixes_per_track = mixes_per_track
        self._gains = min_gain, max_gain
        self._swap_probability = swap_probability
        self._seed = seed

    def __len__(self) -> int:
        return len(self._tracks) * self._mixes_per_track

    def draw(self, epoch: int, index: int) -> Draw:
        """Draw one mix of an epoch."""
        # 1 + index: with index 0 the entropy would be that of the shuffle of original excerpts.
        rng = np.random.default_rng((self._seed, epoch, 1 + index))
        places = []
        for _ in range(self._num_sources):
            track, starts = self._tracks[rng.integers(len(self._tracks))]
            places.append((track, starts[rng.integers(len(starts))]))
        swaps = rng.random(self._num_sources) < self._swap_probability
        gains = rng.uniform(*self._gains, self._num_sources)
        return Draw(tuple(places), tuple(swaps.tolist()), tuple(gains.tolist()))
