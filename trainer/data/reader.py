"""From shards to batches.

What is read are slices of memory maps, copied into one buffer a batch by threads: a copy does not
hold Python's lock, so that threads read as fast as processes would, without two more copies through
shared memory. Each excerpt of a signal is one contiguous copy. The buffer is page-locked where it
goes on to a GPU, and crosses to it in one transfer on a stream of its own, while the batch before
is computed with. The spectra stay as they are stored, also in their order, until `assemble`
gathers and mixes them on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from flsep.cache import Draw, Grid, Shards, TrackRecord
from flsep.trainer.data.batch import Batch, allocate_together
from flsep.trainer.data.resident import Resident
from flsep.trainer.errors import DataError
from flsep.trainer.teacher import Standard, TeacherWindows, held_windows


class Reader:
    """Read excerpts, from any number of threads.

    Parameters
    ----------
    shards : Shards or Resident
        The data, mapped or loaded.
    grid : Grid
        How long the excerpts are.
    teacher_signal : {'mixture', 'stems'} or None
        Whose embeddings to give; None for none.

    Attributes
    ----------
    standard : Standard or None
        Standardises the embeddings.

    Raises
    ------
    DataError
        If embeddings are wanted and the shards have no statistics of them.
    """

    def __init__(self, shards: Shards | Resident, grid: Grid, teacher_signal: str | None) -> None:
        self.layout, self.grid = shards.layout, grid
        self.teacher_signal = teacher_signal
        self.standard: Standard | None = None
        if teacher_signal is not None:
            if shards.index.statistics is None:
                raise DataError(f"{shards.folder}: no training split, hence no statistics")
            self.standard = Standard.of(shards.index.statistics, teacher_signal)
        self._shards = shards

    def allocate(
        self, draws: Sequence[Draw], *, pin: bool = False, num_in_all: int | None = None
    ) -> Batch:
        """Make a batch for these excerpts, to be filled by `fill`, one excerpt at a time.

        With `pin` it is to go to a GPU.
        """
        layout, num_frames, batch = self.layout, self.grid.num_frames, len(draws)
        mixed = draws[0].gains is not None
        num_signals = len(layout.sources) + (not mixed)
        resident = self._resident(pin)
        pieces: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "starts": (torch.int64, (num_signals, batch)),
            "swaps": (torch.bool, (num_signals, batch)),
        }
        if resident is None:
            pieces["frames"] = (
                getattr(torch, layout.stft_dtype),
                (num_signals * batch * num_frames, layout.num_channels, layout.num_bins, 2),
            )
        if mixed:
            pieces["gains"] = (torch.float32, (num_signals, batch))
        if self.teacher_signal is not None:
            lead = (len(layout.sources),) if self.teacher_signal == "stems" else ()
            shape = (*lead, batch, self.grid.num_windows)
            pieces |= {
                "embeddings": (torch.float32, (*shape, layout.embedding_size)),
                "activity_db": (torch.float32, shape),
                "bounds": (torch.int64, (*shape, 2)),
                "inside": (torch.bool, shape),
                "held": (torch.int64, (batch, num_frames)),
            }
        buffer, tensors = allocate_together(pieces, pin=pin)
        if mixed:
            tensors["gains"].copy_(torch.tensor([draw.gains for draw in draws]).T)
        swaps = [draw.swaps * (num_signals // len(draw.swaps)) for draw in draws]
        tensors["swaps"].copy_(torch.tensor(swaps).T)
        torch.arange(
            0, num_signals * batch * num_frames, num_frames, out=tensors["starts"].view(-1)
        )
        windows = None
        if self.teacher_signal is not None:
            windows = TeacherWindows(
                **{name: tensors[name] for name in TeacherWindows.__dataclass_fields__}
            )
            windows.embeddings.zero_()
            windows.activity_db.fill_(-torch.inf)
            windows.held.zero_()
        return Batch(
            frames=tensors["frames"] if resident is None else resident.frames,
            starts=tensors["starts"],
            swaps=tensors["swaps"],
            gains=tensors.get("gains"),
            windows=windows,
            buffer=buffer,
            num_frames=num_frames,
            names=tuple(self._name(draw) for draw in draws),
            num_in_all=batch if num_in_all is None else num_in_all,
        )

    def fill(self, batch: Batch, slot: int, draw: Draw) -> None:
        """Copy one excerpt into a batch; raises CacheError for damaged shards."""
        num_frames = self.grid.num_frames
        num_signals = len(batch.starts)
        starts = batch.starts.numpy()
        for row in range(num_signals):
            signal = row if draw.gains is None else 1 + row
            track, window = draw.places[row if len(draw.places) > 1 else 0]
            start = self.layout.window_frames(window)[0]
            if isinstance(self._shards, Resident) and batch.frames is self._shards.frames:
                starts[row, slot] = self._shards.first_frame(track, signal) + start
            else:
                stored = self._shards.read(track, "stft", signal)
                begin = starts[row, slot]
                out = batch.frames.numpy()[begin : begin + num_frames]
                np.copyto(out, stored[start : start + num_frames])
        if batch.windows is None:
            return
        heard = draw.heard
        if self.teacher_signal == "mixture":
            track, window = draw.places[0]
            if heard is not None:
                window, num_windows = 0, heard.embedding.shape[1]
                self._fill_windows(
                    batch.windows, (slot,), 0, heard.embedding[0], heard.activity_db[0]
                )
            else:
                num_windows = track.num_windows
                self._fill_windows_of(batch.windows, (slot,), track, window, 0)
            start = self.layout.window_frames(window)[0]
            frames = np.arange(start, start + num_frames)
            held = held_windows(self.layout, frames, num_windows) - window
            batch.windows.held.numpy()[slot] = np.clip(held, 0, self.grid.num_windows - 1)
            return
        for signal in range(1, 1 + len(self.layout.sources)):
            entry = (signal - 1, slot)
            if heard is not None and len(heard.embedding) > 1:
                self._fill_windows(
                    batch.windows, entry, 0, heard.embedding[signal], heard.activity_db[signal]
                )
            else:
                track, window = draw.places[signal - 1 if len(draw.places) > 1 else 0]
                self._fill_windows_of(batch.windows, entry, track, window, signal)

    def _resident(self, pin: bool) -> Resident | None:
        """Return where excerpts can stay, as the batch is gathered from there."""
        shards = self._shards
        if isinstance(shards, Resident) and shards.frames.is_cuda == pin:
            return shards
        return None

    def _fill_windows_of(
        self,
        windows: TeacherWindows,
        entry: tuple[int, ...],
        track: TrackRecord,
        first: int,
        signal: int,
    ) -> None:
        """Fill in what the teacher heard in a track."""
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
        """Fill in the windows from the `first` of a track on, in which the excerpt starts."""
        count = len(embedding)
        assert self.standard is not None
        windows.embeddings.numpy()[entry][:count] = self.standard(embedding)
        windows.activity_db.numpy()[entry][:count] = activity_db
        bounds = self.grid.bounds(first)
        windows.bounds.numpy()[entry] = bounds
        inside = bounds[:, 1] <= self.grid.num_frames
        inside[count:] = False
        windows.inside.numpy()[entry] = inside

    def _name(self, draw: Draw) -> str:
        seconds = self.layout.window_hop_seconds
        return " + ".join(f"{track.name!r} at {k * seconds:.2f} s" for track, k in draw.places)
