"""Read audio files block by block at a given rate, and write wav files atomically."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from flsep.cache.files import replacing
from flsep.trainer.errors import AudioError

if TYPE_CHECKING:
    import av

AUDIO_SUFFIXES = frozenset(
    {".aac", ".aif", ".aiff", ".flac", ".m4a", ".mp3", ".mp4"}
    | {".oga", ".ogg", ".opus", ".wav", ".webm", ".wma"}
)
_INSTALL = "run `pip install flsep[trainer]`"
# These containers declare their length; for others FFmpeg estimates it.
_KNOW_THEIR_LENGTH = {"wav", "flac", "ogg", "aiff", "mov,mp4,m4a,3gp,3g2,mj2"}
_TOLERATED_SECONDS = 0.5
"""A file that is shorter than declared by more than this was cut short."""
_UNKNOWN_BYTES = 0x7FFFF000
"""A wav header that declares this or more leaves the length open."""


def read_blocks(
    path: Path, *, sample_rate_hz: int, num_channels: int
) -> Iterator[NDArray[np.float32]]:
    """Decode the first audio stream of a file with FFmpeg's libraries, resampled by swresample.

    Mono is duplicated to `num_channels`; other files must have as many channels.

    Yields
    ------
    ndarray
        float32 [channel, sample], full scale 1, of any length.

    Raises
    ------
    AudioError
        If the file cannot be decoded to its end, holds no audio, holds NaN or infinity, or has
        another number of channels.
    """
    try:
        import av
    except ImportError as error:
        raise AudioError(f"reading audio needs PyAV ({error}): {_INSTALL}") from error
    num_samples = 0
    _check_riff(path)
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            if not container.streams.audio:
                raise AudioError(f"{path}: holds no audio")
            stream = container.streams.audio[0]
            if not stream.channels:
                raise AudioError(f"{path}: holds no audio")
            if stream.channels not in (1, num_channels):
                raise AudioError(
                    f"{path}: has {stream.channels} channels, the separator takes {num_channels} "
                    "or mono; mix it down first"
                )
            declared_seconds = _declared_seconds(container, stream)
            # A declared length of 0 is an unknown one, and sets no limit.
            most_samples = round(declared_seconds * sample_rate_hz) or sys.maxsize
            resampler = av.AudioResampler(format="fltp", rate=sample_rate_hz)  # planar float32
            form: tuple[Any, ...] | None = None
            for frame in _frames_and_end(container.decode(stream)):
                if frame is not None:
                    # The resampler takes frames of one form only.
                    found = frame.sample_rate, frame.layout.name, frame.format.name
                    if found != (form := form or found):
                        raise AudioError(
                            f"{path}: changes from {form} to {found} in the middle; convert it to "
                            "one sample rate and channel layout"
                        )
                for resampled in resampler.resample(frame):
                    block = resampled.to_ndarray().astype(np.float32, copy=False)
                    if not np.isfinite(block).all():
                        raise AudioError(f"{path}: holds NaN or infinity; repair it")
                    # Codecs with frames of a fixed size decode beyond the end.
                    block = block[:, : most_samples - num_samples]
                    num_samples += block.shape[1]
                    # A view, which duplicates mono without a copy.
                    yield np.broadcast_to(block, (num_channels, block.shape[1]))
    except av.FFmpegError as error:
        raise AudioError(f"{path}: cannot be decoded ({error.strerror}); damaged?") from error
    # FFmpeg may decode a truncated file without an error.
    seconds = num_samples / sample_rate_hz
    if seconds < declared_seconds - _TOLERATED_SECONDS:
        raise AudioError(
            f"{path}: holds {seconds:.2f} of the {declared_seconds:.2f} s that it declares; "
            "cut short, replace it"
        )
    if not num_samples:
        raise AudioError(f"{path}: has no samples")


def _check_riff(path: Path) -> None:
    """Refuse a wav file that is shorter than its header declares; FFmpeg does not mind."""
    if path.suffix.lower() != ".wav" or not path.is_file():
        return
    with open(path, "rb") as file:
        header = file.read(8)
    declared_bytes = int.from_bytes(header[4:], "little")
    found_bytes = path.stat().st_size - 8
    # The last pad byte is often missing; programs that write to a pipe declare the maximum.
    if header[:4] == b"RIFF" and found_bytes + 1 < declared_bytes < _UNKNOWN_BYTES:
        raise AudioError(
            f"{path}: holds {found_bytes} of the {declared_bytes} bytes that it declares; "
            "cut short, replace it"
        )


def _frames_and_end(frames: Iterator["av.AudioFrame"]) -> Iterator["av.AudioFrame | None"]:
    """Pass frames on, then None, which makes a resampler return the samples that it buffers."""
    yield from frames
    yield None


def _declared_seconds(container: Any, stream: Any) -> float:
    """Return the length that a stream declares, 0 if it declares none."""
    if container.format.name not in _KNOW_THEIR_LENGTH or stream.duration is None:
        return 0.0
    return float(stream.duration * stream.time_base)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


class WavWriters:
    """Write one wav file a source, block by block; the files appear when all are complete.

    The files are ``<name>.wav`` in `folder`, which is made if needed and removed if it stays empty.
    Raises AudioError if they cannot be written.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], *, sample_rate_hz: int, num_channels: int
    ) -> None:
        try:
            import soundfile
        except (ImportError, OSError) as error:
            raise AudioError(f"writing audio needs soundfile ({error}): {_INSTALL}") from error
        self._error = soundfile.LibsndfileError
        self._folder = folder
        try:
            with ExitStack() as stack:
                folder.mkdir(parents=True, exist_ok=True)
                stack.callback(_remove_if_empty, folder)
                paths = [stack.enter_context(replacing(folder / f"{name}.wav")) for name in names]
                # The stack closes all files before it gives the first one its name.
                # An estimate may exceed full scale and must not clip: 32-bit float.
                self._files: list[Any] = [
                    stack.enter_context(
                        soundfile.SoundFile(
                            path, "w", sample_rate_hz, num_channels, format="WAV", subtype="FLOAT"
                        )
                    )
                    for path in paths
                ]
                # From here on, `__exit__` completes or undoes all of this.
                self._stack = stack.pop_all()
        except (OSError, soundfile.LibsndfileError) as error:
            raise AudioError(f"cannot write into {folder} ({error})") from error

    def write(self, estimates: NDArray[np.float32]) -> None:
        """Append a block, float32 [source, channel, sample]."""
        for file, estimate in zip(self._files, estimates, strict=True):
            try:
                file.write(estimate.T)
            except self._error as error:
                raise AudioError(
                    f"{self._folder}: cannot be written ({error}); is the disk full?"
                ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)
