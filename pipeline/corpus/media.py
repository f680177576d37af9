"""Decode and probe audio, in process: libsndfile for sound files, FFmpeg for containers."""

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr
from av.stream import Discard
from numpy.typing import NDArray

from flsep.pipeline.errors import MediaError

SOUND_SUFFIXES = frozenset({".wav", ".flac", ".ogg", ".aif", ".aiff"})
"""Files that libsndfile reads. FFmpeg reads all others: libsndfile pads a cut mp3 with zeros."""

CODEC_FRAME_SAMPLES = 2048
"""The longest frame of AAC or MP3: containers declare their length with this precision."""

_BLOCK_SAMPLES = 1 << 16
_UNKNOWN_CHUNK_BYTES = 0x7FFFF000  # a size from here on means unknown: written to a pipe


@dataclass(frozen=True, slots=True)
class AudioStream:
    """Where to find one signal: a file, and the index among its audio streams (None: the first)."""

    path: Path
    stream: int | None = None

    def __str__(self) -> str:
        """Return the path, and the stream if one was chosen."""
        return str(self.path) if self.stream is None else f"{self.path}, stream {self.stream}"


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What a header says about one audio stream; `num_samples` to within `tolerance_samples`."""

    sample_rate_hz: int
    num_channels: int
    num_samples: int
    num_streams: int


_Blocks = Iterator[NDArray[np.float32]]  # each [sample, channel]
_Opened = tuple[tuple[MediaInfo, ...], Callable[[int], _Blocks]]


def tolerance_samples(source: AudioStream) -> int:
    """Return how many samples the decoded length may differ from the declared length."""
    return 0 if _is_sound(source.path) else CODEC_FRAME_SAMPLES


def probe(source: AudioStream) -> MediaInfo:
    """Read the header of one stream; raises MediaError for missing, unreadable and cut files."""
    return probe_all([source])[0]


def probe_all(sources: Sequence[AudioStream]) -> list[MediaInfo]:
    """Probe several streams, opening each file once; raises MediaError for the first bad one."""
    infos = {path: _read_headers(path) for path in dict.fromkeys(source.path for source in sources)}
    return [_pick(source, infos[source.path]) for source in sources]


def decode(
    source: AudioStream, *, sample_rate_hz: int = 44100, num_channels: int = 2
) -> Iterator[NDArray[np.float32]]:
    """Decode one stream in blocks of about 1.5 s, float32 [channel, sample], full scale 1.

    The stream is resampled (soxr, HQ) and mono is copied to all channels where needed. Containers
    are trimmed as by the program `ffmpeg`: the encoder's priming is dropped, the padding of the
    last codec frame is kept. Raises MediaError if the file is missing, undecodable, empty or not as
    long as declared, has another number of channels, or holds NaN or infinity.
    """
    with _open(source.path) as (infos, read):
        info = _pick(source, infos)
        if info.num_channels not in (1, num_channels):
            raise MediaError(
                f"{source}: has {info.num_channels} channels, expected {num_channels} or 1; "
                "mix it down first"
            )
        # Check before resampling: the declared length counts samples of the file's own rate.
        blocks = _complete(read(source.stream or 0), source, info.num_samples)
        if info.sample_rate_hz != sample_rate_hz:
            blocks = _resample(blocks, info, sample_rate_hz)
        for block in blocks:
            yield np.broadcast_to(block.T, (num_channels, len(block)))


def _is_sound(path: Path) -> bool:
    return path.suffix.lower() in SOUND_SUFFIXES


def _read_headers(path: Path) -> tuple[MediaInfo, ...]:
    with _open(path) as (infos, _):
        return infos


def _pick(source: AudioStream, infos: tuple[MediaInfo, ...]) -> MediaInfo:
    index = source.stream or 0
    if index >= len(infos):
        raise MediaError(
            f"{source.path}: has {len(infos)} audio streams, expected at least {index + 1}"
        )
    if not infos[index].num_samples:
        raise MediaError(f"{source}: has no samples; remove or replace it")
    return infos[index]


@contextmanager
def _open(path: Path) -> Iterator[_Opened]:
    # `_readable` is the outer context, so that it also sees errors raised while decoding.
    opener: Callable[[Path], AbstractContextManager[_Opened]]
    opener = _open_sound if _is_sound(path) else _open_container
    with _readable(path), opener(path) as opened:
        yield opened


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Refuse missing and empty files, and turn the errors of both libraries into MediaError."""
    try:
        if not path.is_file():
            raise MediaError(f"{path}: no such file")
        if not path.stat().st_size:
            raise MediaError(f"{path}: is an empty file; remove or replace it")
        yield
    except (OSError, soundfile.LibsndfileError, av.FFmpegError) as error:
        reason = str(getattr(error, "error_string", None) or getattr(error, "strerror", error))
        raise MediaError(
            f"{path}: cannot be decoded ({reason.strip().rstrip('.')}); damaged or no audio file?"
        ) from error


@contextmanager
def _open_sound(path: Path) -> Iterator[_Opened]:
    with path.open("rb") as file:
        header = file.read(8)
    order = {b"RIFF": "<I", b"FORM": ">I"}.get(header[:4])
    if order and len(header) == 8:
        # libsndfile takes a cut wav or aiff for a shorter one: compare the size with the header.
        (chunk_bytes,) = struct.unpack(order, header[4:])
        found_bytes = path.stat().st_size - 8
        if found_bytes + 1 < chunk_bytes < _UNKNOWN_CHUNK_BYTES:  # a last pad byte may be missing
            raise MediaError(
                f"{path}: holds {found_bytes} of the {chunk_bytes} bytes that its header declares; "
                "cut short, replace it"
            )
    with soundfile.SoundFile(path) as sound:
        info = MediaInfo(sound.samplerate, sound.channels, sound.frames, 1)
        yield (info,), lambda index: sound.blocks(_BLOCK_SAMPLES, dtype="float32", always_2d=True)


@contextmanager
def _open_container(path: Path) -> Iterator[_Opened]:
    with av.open(str(path), metadata_errors="replace") as container:
        streams = container.streams.audio

        def inspect(stream: av.AudioStream) -> MediaInfo:
            if len(stream.index_entries):
                # The index lies apart from the audio: in a cut file it points beyond the end.
                last = stream.index_entries[-1]
                if last.pos + last.size > container.size:
                    raise MediaError(
                        f"{path}: holds {container.size} bytes, but its index reaches "
                        f"{last.pos + last.size}; cut short, replace it"
                    )
            # Not all containers state a length for each stream; some state only their own.
            if stream.duration is not None and stream.time_base is not None:
                seconds = float(stream.duration * stream.time_base)
            elif container.duration is not None:
                seconds = container.duration / av.time_base
            else:
                raise MediaError(f"{path}: declares no length; convert it to wav")
            num_samples = round(seconds * stream.rate)
            return MediaInfo(stream.rate, stream.channels, num_samples, len(streams))

        def read(index: int) -> _Blocks:
            shape = (streams[index].rate, streams[index].channels)
            for stream in container.streams:
                if stream.index != streams[index].index:
                    stream.discard = Discard.all  # do not even read its packets
            # Codec frames are short; collect them into blocks before converting to float.
            fifo, to_float = av.AudioFifo(), av.AudioResampler(format="fltp")

            def flush() -> _Blocks:
                for frame in to_float.resample(fifo.read(_BLOCK_SAMPLES, partial=True)):
                    yield frame.to_ndarray().astype(np.float32, copy=False).T

            for frame in container.decode(streams[index]):
                if (frame.sample_rate, frame.layout.nb_channels) != shape:
                    raise MediaError(
                        f"{path}: changes its rate or channels midway; convert it to wav"
                    )
                frame.pts = None  # the queue would reject gaps in time
                fifo.write(frame)
                while fifo.samples >= _BLOCK_SAMPLES:
                    yield from flush()
            if fifo.samples:
                yield from flush()

        yield tuple(inspect(stream) for stream in streams), read


def _complete(blocks: _Blocks, source: AudioStream, num_declared: int) -> _Blocks:
    """Yield the blocks; raise MediaError unless they are finite and as long as declared."""
    num_samples = 0
    slack = tolerance_samples(source)
    for block in blocks:
        num_samples += len(block)
        # A stream that goes on beyond its declared length is refused below: decode no more of it.
        if num_samples > num_declared + slack:
            break
        if not np.isfinite(block).all():
            raise MediaError(f"{source}: holds NaN or infinite samples; repair or remove it")
        yield block
    if not num_samples or abs(num_samples - num_declared) > slack:
        extent = "more than" if num_samples > num_declared else f"only {num_samples} of"
        raise MediaError(
            f"{source}: holds {extent} the {num_declared} samples that its header declares; "
            "cut short or damaged, replace it"
        )


def _resample(blocks: _Blocks, info: MediaInfo, sample_rate_hz: int) -> _Blocks:
    resampler = soxr.ResampleStream(
        info.sample_rate_hz, sample_rate_hz, info.num_channels, dtype="float32", quality="HQ"
    )
    for block in blocks:
        yield resampler.resample_chunk(block)
    # The resampler holds samples back until it is told that no more follow.
    yield resampler.resample_chunk(np.empty((0, info.num_channels), np.float32), last=True)
