"""The excerpts of an epoch; each depends on (seed, epoch, index) alone.

Excerpts start on the teacher's grid: an excerpt that starts at window ``k`` starts at the first
frame of that window.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flsep.cache import Draw, Grid, RandomMixes, RenderedMixes, TrackRecord
from flsep.trainer.config import DataConfig
from flsep.trainer.errors import DataError
from flsep.trainer.parallel import Rank


def smallest_batch(num_excerpts: int, batch_size: int) -> int:
    """Return the number of excerpts in the last batch of an epoch; the others have `batch_size`."""
    return num_excerpts - (num_excerpts - 1) // batch_size * batch_size


class Excerpts(Protocol):
    """The excerpts of an epoch."""

    def __len__(self) -> int: ...

    def draw(self, epoch: int, index: int) -> Draw:
        """Return one excerpt of an epoch; it depends only on the arguments and the seed."""


def draw_excerpts(
    grid: Grid,
    tracks: Sequence[TrackRecord],
    config: DataConfig,
    seed: int,
    rendered: RenderedMixes | None = None,
) -> Excerpts:
    """Return the training excerpts under the mixing of the configuration.

    `tracks` must all be long enough for an excerpt. Raises DataError if rendered mixes are
    missing, not wanted, or made with other settings, and CacheError if their files are missing or
    truncated.
    """
    if config.mixing == "rendered":
        if rendered is None:
            raise DataError(
                "--mixing rendered needs --mixes FOLDER, which flsep-precompute mixes has written"
            )
        # The mixes hold their own draws: the seed of the training does not change them.
        _check_rendered(rendered, config)
        return rendered
    if rendered is not None:
        raise DataError(f"--mixes {rendered.mixes.folder}: use it with --mixing rendered")
    if config.mixing == "original":
        return OriginalExcerpts(
            grid,
            tracks,
            excerpts_per_track=config.excerpts_per_track,
            swap_probability=config.swap_probability,
            seed=seed,
        )
    return RandomMixes(
        grid,
        tracks,
        mixes_per_track=config.excerpts_per_track,
        min_gain=config.min_gain,
        max_gain=config.max_gain,
        swap_probability=config.swap_probability,
        seed=seed,
    )


def _check_rendered(rendered: RenderedMixes, config: DataConfig) -> None:
    """Refuse mixes of another split or other settings, or whose files are missing."""
    mixes = rendered.mixes
    if mixes.config.split != "train":
        raise DataError(
            f"{mixes.folder}: mixes of the split {mixes.config.split!r}; expected 'train': render "
            "others"
        )
    # These settings would have no effect on mixes that are rendered already.
    gains = ("min_gain", "max_gain", "swap_probability")
    for name in ("excerpt_seconds", "excerpts_per_track", *gains):
        wanted, found = getattr(config, name), getattr(mixes.config, name)
        if wanted != found:
            raise DataError(
                f"{mixes.folder}: rendered with {name} {found:g}, the training has {wanted:g}; use "
                f"--set data.{name}={found:g}, or render others"
            )
    mixes.check_files()


class OriginalExcerpts:
    """Excerpts of the tracks as they are: the same number from each, in random order.

    The channels of an excerpt may be swapped. There is no gain: the teacher's embedding belongs to
    the unchanged mixture.
    """

    def __init__(
        self,
        grid: Grid,
        tracks: Sequence[TrackRecord],
        *,
        excerpts_per_track: int,
        swap_probability: float,
        seed: int,
    ) -> None:
        self._tracks = [(track, grid.starts(track)) for track in tracks]
        self._excerpts_per_track = excerpts_per_track
        self._swap_probability = swap_probability
        self._seed = seed
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return len(self._tracks) * self._excerpts_per_track

    def draw(self, epoch: int, index: int) -> Draw:
        """Draw one excerpt."""
        # 1 + index: with index 0 the entropy would be that of the epoch's shuffle.
        rng = np.random.default_rng((self._seed, epoch, 1 + index))
        # Excerpts are numbered track by track; the shuffle puts the numbers in random order.
        track, starts = self._tracks[self._shuffle(epoch)[index] // self._excerpts_per_track]
        place = (track, starts[rng.integers(len(starts))])
        return Draw((place,), (bool(rng.random() < self._swap_probability),), None)

    def _shuffle(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the order of an epoch's excerpts."""
        # The last order is kept: each draw of the epoch needs it.
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self))
            self._order = epoch, order
        return self._order[1]


class ConsecutiveExcerpts:
    """The validation excerpts: whole tracks, as they are, the same in every epoch.

    Each excerpt starts at the last window that leaves no gap after the excerpt before. The last
    excerpt of a track starts as late as possible. All have the same length and weight.
    """

    def __init__(self, grid: Grid, tracks: Sequence[TrackRecord]) -> None:
        self._tracks = tracks
        self._last = np.array([len(grid.starts(track)) - 1 for track in tracks], np.int64)
        # Tracks differ only in their ends, so that one path of start windows serves all of them.
        longest = int(self._last.max(initial=0))
        path = [0]
        while path[-1] < longest:
            end = grid.first_frame(path[-1]) + grid.num_frames
            following = grid.last_start(end)
            # At least one window on, even if windows are longer than excerpts.
            path.append(min(max(path[-1] + 1, following), longest))
        self._path = np.array(path, np.int64)
        # Number of excerpts in each track and all tracks before it.
        self._ends = np.cumsum(np.searchsorted(self._path, self._last) + 1)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def draw(self, epoch: int, index: int) -> Draw:
        """Return one excerpt."""
        if not 0 <= index < len(self):
            raise IndexError(f"excerpt {index} of {len(self)}")
        # First the track that holds the index, then the place within the track.
        number = int(np.searchsorted(self._ends, index, "right"))
        position = index - (int(self._ends[number - 1]) if number else 0)
        window = min(int(self._path[position]), int(self._last[number]))
        return Draw(((self._tracks[number], window),), (False,), None)


class BatchesOfRank:
    """The excerpts of the whole batches that one rank validates on; the ranks take turns."""

    def __init__(self, excerpts: Excerpts, batch_size: int, rank: Rank) -> None:
        self._excerpts, self._batch_size, self._rank = excerpts, batch_size, rank

    def __len__(self) -> int:
        # The last batch, of `rest` excerpts, belongs to the rank whose turn it is.
        num_batches, rest = divmod(len(self._excerpts), self._batch_size)
        own = len(range(self._rank.number, num_batches, self._rank.world_size)) * self._batch_size
        has_rest = num_batches % self._rank.world_size == self._rank.number
        return own + rest * has_rest

    def draw(self, epoch: int, index: int) -> Draw:
        """Return one excerpt of this rank's batches."""
        batch, place = divmod(index, self._batch_size)
        batch = batch * self._rank.world_size + self._rank.number
        return self._excerpts.draw(epoch, batch * self._batch_size + place)
