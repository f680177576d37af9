"""Where excerpts of tracks can start, and how random mixes of them are drawn.

The trainer draws mixes while it reads, the pipeline draws them ahead of training. Both use this
module, so that a seed gives the same mixes in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flsep.cache.errors import FieldError, MissingDataError
from flsep.cache.format import Layout
from flsep.cache.shards.index import TrackRecord
from flsep.cache.shards.reader import Shards

_MAX_EXCERPT_SECONDS = 86400


class Grid:
    """Excerpts of one length that start where a teacher window starts.

    An excerpt has `num_frames` = ``1 + round(excerpt_seconds * rate) // hop`` STFT frames and
    overlaps at most `num_windows` teacher windows.
    """

    def __init__(self, layout: Layout, excerpt_seconds: float) -> None:
        if not 0 < excerpt_seconds <= _MAX_EXCERPT_SECONDS:
            raise FieldError(
                f"excerpt_seconds is {excerpt_seconds:g}; expected more than 0 and at most "
                f"{_MAX_EXCERPT_SECONDS}"
            )
        self.layout, self.excerpt_seconds = layout, excerpt_seconds
        self.num_frames = layout.num_frames(round(excerpt_seconds * layout.sample_rate_hz))
        self._frames_per_hop = (
            layout.window_hop_seconds * layout.sample_rate_hz / layout.hop_samples
        )
        self.num_windows = int(self.num_frames / self._frames_per_hop) + 1

    def first_frame(self, window: int) -> int:
        """Return the first frame of the excerpt that starts with a window."""
        return self.layout.window_frames(window)[0]

    def bounds(self, window: int) -> npt.NDArray[np.int64]:
        """Return the first and one-past-last frame of each window of an excerpt, int64 [window, 2].

        Frames count from the start of the excerpt, which starts with `window`.
        """
        # The result depends on `window` by a frame, since the hop between windows is not a whole
        # number of frames.
        spans = [self.layout.window_frames(window + number) for number in range(self.num_windows)]
        return np.array(spans, np.int64) - np.int64(spans[0][0])

    @property
    def num_whole_windows(self) -> int:
        """Number of windows that lie wholly inside the excerpt at the start of a track."""
        return int((self.bounds(0)[:, 1] <= self.num_frames).sum())

    def starts(self, track: TrackRecord) -> range:
        """Return the windows at which an excerpt can start and end before the track does."""
        last_frame = track.num_frames - self.num_frames  # the latest start that still fits
        if last_frame < 0:
            return range(0)
        # Late excerpts may fit although no teacher window starts there any more.
        return range(min(self.last_start(last_frame) + 1, track.num_windows))

    def last_start(self, frame: int) -> int:
        """Return the last window whose first frame is not after `frame`, which is 0 or more."""
        # Invert `first_frame`: guess by division, then step back while the guess starts too late.
        window = int(frame / self._frames_per_hop) + 1
        while self.first_frame(window) > frame:
            window -= 1
        return window

    def split_by_length(
        self, shards: Shards, split: str
    ) -> tuple[list[TrackRecord], list[TrackRecord]]:
        """Return the tracks of a split that can hold an excerpt, and those that cannot.

        Raises MissingDataError if there are no tracks, or none is long enough.
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
                f"{longest.num_samples / self.layout.sample_rate_hz:.2f} s: use shorter excerpts "
                "(--seconds of flsep-precompute mixes, --set data.excerpt_seconds=... of "
                "flsep-train)"
            )
        return long_enough, short


@dataclass(frozen=True, slots=True)
class MixEmbedding:
    """The teacher's output for a mix itself, in windows that start with the excerpt.

    Attributes
    ----------
    embedding : float32 [signal, window, dim]
        Embeddings of the mixture, followed by those of the scaled sources if they were stored.
    activity_db : float32 [signal, window]
        Level in dBFS.
    """

    embedding: npt.NDArray[np.float32]
    activity_db: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Draw:
    """Recipe of one excerpt.

    Attributes
    ----------
    places : tuple of (TrackRecord, int)
        Track and start window: one place for all signals, or one for each source.
    swaps : tuple of bool
        Reverse the order of the channels, for each place.
    gains : tuple of float or None
        Gain of each source; None stands for the track with its own mixture.
    heard : MixEmbedding or None
        The teacher's output for the mix; None stands for that of the tracks.
    """

    places: tuple[tuple[TrackRecord, int], ...]
    swaps: tuple[bool, ...]
    gains: tuple[float, ...] | None
    heard: MixEmbedding | None = None


class RandomMixes:
    """Mixes of random excerpts: each source from a random track, with its own gain and swap.

    Gains are uniform in [min_gain, max_gain]; `swap_probability` is that of reversing a source's
    channels. All `tracks` must be able to hold an excerpt; their order affects what is drawn. An
    epoch has `mixes_per_track` mixes for each of them. Seed, epoch and index decide a mix.
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
        # 1 + index, since (seed, epoch, 0) gives the same random numbers as (seed, epoch), which
        # seeds the shuffle of original excerpts.
        rng = np.random.default_rng((self._seed, epoch, 1 + index))
        # The order of the draws is part of what a seed means: another order gives other mixes.
        places = []
        for _ in range(self._num_sources):
            track, starts = self._tracks[rng.integers(len(self._tracks))]
            places.append((track, starts[rng.integers(len(starts))]))
        swaps = rng.random(self._num_sources) < self._swap_probability
        gains = rng.uniform(*self._gains, self._num_sources)
        return Draw(tuple(places), tuple(swaps.tolist()), tuple(gains.tolist()))
