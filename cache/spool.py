"""A waveform that waits on the disk until its end is known."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

_SAMPLES_AT_ONCE = 1 << 20


class Spool:
    """One signal's samples that wait for its end, on the disk: memory may not hold a long one.

    Parameters
    ----------
    folder : Path
        Where the disk has room; the file has no name in it.
    num_channels, num_samples : int
        Length of the signal.

    Attributes
    ----------
    num_held : int
        Samples a channel that wait.
    peak : float
        Largest magnitude among them.

    Raises
    ------
    OSError
        If there is no room.
    """

    def __init__(self, folder: Path, num_channels: int, num_samples: int) -> None:
        self.num_held = 0
        self.peak = 0.0
        self._num_channels = num_channels
        self._num_samples = num_samples
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115
        try:
            reserve(self._file.fileno(), num_channels * num_samples * 4, folder)
        except OSError:
            self.close()
            raise

    def add(self, block: npt.NDArray[np.float32]) -> None:
        """Take the next samples, float32 [channel, sample]."""
        if not block.size:
            return
        self.peak = max(self.peak, float(np.abs(block).max()))
        for channel, samples in enumerate(block):
            raw = np.ascontiguousarray(samples, np.float32).data.cast("B")
            position = 4 * (channel * self._num_samples + self.num_held)
            write_at(self._file.fileno(), raw, position)
        self.num_held += block.shape[1]

    def read(self) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the samples of the first channel, then those of the next, float32 [sample]."""
        self._file.seek(0)
        left = self._num_channels * self._num_samples
        while left:
            samples = np.fromfile(self._file, np.float32, min(left, _SAMPLES_AT_ONCE))
            left -= len(samples)
            yield samples

    def close(self) -> None:
        """Give the space back."""
        self._file.close()


def write_at(descriptor: int, raw: memoryview, position: int) -> None:
    """Write bytes to a place in a file."""
    while raw:
        count = os.pwrite(descriptor, raw, position)
        raw, position = raw[count:], position + count


def reserve(descriptor: int, num_bytes: int, path: Path) -> None:
    """Take space for a file on the disk; raises OSError, with `path` named, if there is none."""
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
    except OSError as error:
        error.filename = str(path)
        raise
