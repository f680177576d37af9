"""Copy excerpts from shards into batches.

The excerpts are slices of memory maps, which threads copy into one buffer a batch. A copy does not
hold Python's lock, so that threads read as fast as processes would, without two more copies
through shared memory. The spectra keep their stored dtype and order until `assemble` gathers and
mixes them on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from flsep.cache import Draw, Grid, Shards, TrackRecord
from flsep.trainer.data.batch import Batch
from flsep.trainer.data.buffer import Buffer
from flsep.trainer.data.preloaded import PreloadedShards
from flsep.trainer.errors import DataError
from flsep.trainer.teacher import Standard, TeacherWindows, held_windows


class Reader:
    """Read excerpts, from any number of threads.

    `teacher_signal` is the signal whose embeddings are read, 'mixture' or 'stems', or None for no
    embeddings. Raises DataError if the shards have no statistics to standardise them with.
    """

    def __init__(
        self, shards: Shards | PreloadedShards, grid: Grid, teacher_signal: str | None
    ) -> None:
        self.layout, self.grid = shards.layout, grid
        self.teacher_signal = teacher_signal
        self.standard: Standard | None = None
        if teacher_signal is not None:
            if shards.index.statistics is None:
                raise DataError(
                    f"{shards.folder}: no training split, and so no statistics of the embeddings; "
                    "precompute a corpus that has one"
                )
            self.standard = Standard.of(shards.index.statistics, teacher_signal)
        self._shards = shards

    def allocate(
        self, draws: Sequence[Draw], *, pin: bool = False, num_in_all: int | None = None
    ) -> Batch:
        """Make a batch for these excerpts, which `fill` fills one excerpt at a time.

        With `pin`, the batch goes to a GPU. `num_in_all` is the number of excerpts in the batches
        of all ranks together, by default that of `draws`.
        """
        preloaded = self._find_preloaded(pin)
        is_mixed = draws[0].gains is not None
        # The mixture of mixed sources is computed, not read.
        num_signals = len(self.layout.sources) + (not is_mixed)
        shapes = self._list_shapes(
            num_signals, len(draws), is_mixed=is_mixed, with_frames=preloaded is None
        )
        buffer = Buffer.allocate(shapes, pin=pin)
        batch = Batch(
            buffer=buffer,
            preloaded_frames=None if preloaded is None else preloaded.frames,
            num_frames=self.grid.num_frames,
            names=tuple(self._name(draw) for draw in draws),
            num_in_all=len(draws) if num_in_all is None else num_in_all,
        )
        if is_mixed:
            buffer.tensors["gains"].copy_(torch.tensor([draw.gains for draw in draws]).T)
        # An excerpt from one place has one swap for all of its signals.
        swaps = [draw.swaps * (num_signals // len(draw.swaps)) for draw in draws]
        batch.swaps.copy_(torch.tensor(swaps).T)
        num_frames = self.grid.num_frames
        end = num_signals * len(draws) * num_frames
        # Signals lie one after another; `fill` overwrites these starts if frames are preloaded.
        torch.arange(0, end, num_frames, out=batch.starts.view(-1))
        if (windows := batch.windows) is not None:
            # Windows beyond the end of a track stay as they are here.
            windows.embeddings.zero_()
            windows.activity_db.fill_(-torch.inf)
            windows.held.zero_()
        return batch

    def _list_shapes(
        self, num_signals: int, num_excerpts: int, *, is_mixed: bool, with_frames: bool
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Return dtype and shape of each tensor of a batch."""
        layout, num_frames = self.layout, self.grid.num_frames
        shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "starts": (torch.int64, (num_signals, num_excerpts)),
            "swaps": (torch.bool, (num_signals, num_excerpts)),
        }
        if with_frames:
            shapes["frames"] = (
                getattr(torch, layout.stft_dtype),
                (num_signals * num_excerpts * num_frames, layout.num_channels, layout.num_bins, 2),
            )
        if is_mixed:
            shapes["gains"] = (torch.float32, (num_signals, num_excerpts))
        if self.teacher_signal is not None:
            # Each stem has windows of its own, the mixture one set for each excerpt.
            lead = (len(layout.sources),) if self.teacher_signal == "stems" else ()
            windows = (*lead, num_excerpts, self.grid.num_windows)
            shapes |= {
                "embeddings": (torch.float32, (*windows, layout.embedding_size)),
                "activity_db": (torch.float32, windows),
                "bounds": (torch.int64, (*windows, 2)),
                "inside": (torch.bool, windows),
                "held": (torch.int64, (num_excerpts, num_frames)),
            }
        return shapes

    def fill(self, batch: Batch, slot: int, draw: Draw) -> None:
        """Copy one excerpt into a batch; raises CacheError for damaged shards."""
        self._fill_spectra(batch, slot, draw)
        if (windows := batch.windows) is None:
            return
        if self.teacher_signal == "mixture":
            self._fill_mixture_windows(windows, slot, draw)
        else:
            self._fill_stem_windows(windows, slot, draw)

    def _fill_spectra(self, batch: Batch, slot: int, draw: Draw) -> None:
        """Copy the spectra, or say where the preloaded ones start."""
        num_frames = self.grid.num_frames
        starts = batch.starts.numpy()
        for row in range(len(starts)):
            signal = row if draw.gains is None else 1 + row  # 0 is the mixture
            # An excerpt of one place takes all of its signals from there.
            track, window = draw.places[row if len(draw.places) > 1 else 0]
            start = self.layout.window_frames(window)[0]
            if batch.preloaded_frames is not None:
                assert isinstance(self._shards, PreloadedShards)
                starts[row, slot] = self._shards.first_frame(track, signal) + start
            else:
                stored = self._shards.read(track, "stft", signal)
                begin = starts[row, slot]
                out = batch.frames.numpy()[begin : begin + num_frames]
                np.copyto(out, stored[start : start + num_frames])

    def _fill_mixture_windows(self, windows: TeacherWindows, slot: int, draw: Draw) -> None:
        """Fill in the windows of the mixture, and which of them each frame holds."""
        track, first = draw.places[0]
        if draw.heard is not None:  # the teacher heard this mix, from its start on
            first, num_windows = 0, draw.heard.embedding.shape[1]
            self._fill_windows(
                windows, (slot,), 0, draw.heard.embedding[0], draw.heard.activity_db[0]
            )
        else:
            num_windows = track.num_windows
            self._fill_track_windows(windows, (slot,), track, first, 0)
        # Frames before the first or after the last window of the excerpt hold the nearest one.
        start = self.layout.window_frames(first)[0]
        frames = np.arange(start, start + self.grid.num_frames)
        held = held_windows(self.layout, frames, num_windows) - first
        windows.held.numpy()[slot] = np.clip(held, 0, self.grid.num_windows - 1)

    def _fill_stem_windows(self, windows: TeacherWindows, slot: int, draw: Draw) -> None:
        """Fill in the windows of each stem."""
        heard = draw.heard
        for source in range(len(self.layout.sources)):
            entry, signal = (source, slot), 1 + source
            if heard is not None and len(heard.embedding) > 1:  # the scaled stems were heard too
                self._fill_windows(
                    windows, entry, 0, heard.embedding[signal], heard.activity_db[signal]
                )
            else:
                track, first = draw.places[source if len(draw.places) > 1 else 0]
                self._fill_track_windows(windows, entry, track, first, signal)

    def _fill_track_windows(
        self,
        windows: TeacherWindows,
        entry: tuple[int, ...],
        track: TrackRecord,
        first: int,
        signal: int,
    ) -> None:
        """Fill in windows of a track, from window `first` on."""
        present = slice(first, min(first + self.grid.num_windows, track.num_windows))
        embedding, activity_db = (
            self._shards.read(track, name, signal)[present] for name in ("embedding", "activity")
        )
        self._fill_windows(windows, entry, first, embedding, activity_db)

    def _fill_windows(
        self,
        windows: TeacherWindows,
        entry: tuple[int, ...],
        first: int,
        embedding: npt.NDArray[np.float32],
        activity_db: npt.NDArray[np.float32],
    ) -> None:
        """Fill in what the teacher heard in an excerpt that starts at window `first`."""
        # `embedding` [window, dim] and `activity_db` [window] end where the track ends.
        count = len(embedding)
        assert self.standard is not None
        windows.embeddings.numpy()[entry][:count] = self.standard(embedding)
        windows.activity_db.numpy()[entry][:count] = activity_db
        bounds = self.grid.bounds(first)
        windows.bounds.numpy()[entry] = bounds
        # A window counts if it ends in the excerpt and the teacher heard it.
        inside = bounds[:, 1] <= self.grid.num_frames
        inside[count:] = False
        windows.inside.numpy()[entry] = inside

    def _find_preloaded(self, pin: bool) -> PreloadedShards | None:
        """Return the preloaded shards if they are where training computes."""
        shards = self._shards
        # A batch is page-locked exactly if training computes on a GPU.
        if isinstance(shards, PreloadedShards) and shards.frames.is_cuda == pin:
            return shards
        return None

    def _name(self, draw: Draw) -> str:
        seconds = self.layout.window_hop_seconds
        return " + ".join(f"{track.name!r} at {k * seconds:.2f} s" for track, k in draw.places)
