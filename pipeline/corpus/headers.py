"""Read the headers of the commonest files, MP4 with AAC and plain wav, without a decoder.

FFmpeg takes 7 ms to open a stem file, mostly to set up decoders; a plan needs the lengths alone.
These readers know one plain form of each format. Whatever differs from it they leave, by returning
None, to the libraries that decode: which say the same of the plain form, and know the rest.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

_MOST_MOOV_BYTES = 64 << 20
_MOST_BOXES = 64  # at the top level
_AAC_RATES_HZ = (96000, 88200, 64000, 48000, 44100, 32000)  # lower ones may hide a doubled rate
_WAV_KINDS = {(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)}  # format and bits a sample
_UNKNOWN_CHUNK_BYTES = 0x7FFFF000


class StreamHeader(NamedTuple):
    """One audio stream, as its header has it."""

    sample_rate_hz: int
    num_channels: int
    num_samples: int


class _UnknownFormError(Exception):
    """Not the plain form: let a library look at it."""


_Place = tuple[int, int]  # where the content of a box starts and stops
_HEAD = struct.Struct(">I4s").unpack_from


def read_header(path: Path) -> tuple[StreamHeader, ...] | None:
    """Return the audio streams of an MP4 or wav file of the plain form, else None.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix not in (".wav", ".mp4", ".m4a"):
        return None
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        num_bytes = os.fstat(descriptor).st_size
        head = os.pread(descriptor, 4096, 0)
        if suffix == ".wav":
            _require(head[:4] == b"RIFF" and head[8:12] == b"WAVE")
            return (_read_wav(head, num_bytes),)
        _require(head[4:8] == b"ftyp")
        return tuple(_read_movie(_load_movie(descriptor, num_bytes), num_bytes))
    except (_UnknownFormError, struct.error, LookupError, ValueError):
        pass
    finally:
        os.close(descriptor)
    return None


def _require(plain: bool) -> None:
    if not plain:
        raise _UnknownFormError


def _read_wav(head: bytes, num_bytes: int) -> StreamHeader:
    (riff_bytes,) = struct.unpack_from("<I", head, 4)
    _require(riff_bytes in (num_bytes - 8, num_bytes - 7) and riff_bytes < _UNKNOWN_CHUNK_BYTES)
    place = 12
    shape: tuple[int, int, int] | None = None
    while True:
        kind, size = struct.unpack_from("<4sI", head, place)
        place += 8
        if kind == b"fmt ":
            form, channels, rate, _, frame_bytes, bits = struct.unpack_from("<HHIIHH", head, place)
            if form == 0xFFFE and size >= 40:  # extensible: the form is the start of a GUID
                (form,) = struct.unpack_from("<H", head, place + 24)
            _require(
                (form, bits) in _WAV_KINDS and 0 < channels * bits // 8 == frame_bytes and rate > 0
            )
            shape = (rate, channels, frame_bytes)
        elif kind == b"data":
            _require(shape is not None and place + size <= num_bytes)
            assert shape is not None
            return StreamHeader(shape[0], shape[1], size // shape[2])
        place += size + size % 2


def _load_movie(descriptor: int, num_bytes: int) -> bytes:
    """Read the content of the box that describes the streams, wherever it is in the file."""
    place = 0
    for _ in range(_MOST_BOXES):
        head = os.pread(descriptor, 16, place)
        size, kind = struct.unpack_from(">I4s", head)
        start = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", head, 8)
            start = 16
        _require(size >= start and place + size <= num_bytes)
        if kind == b"moov":
            _require(size <= _MOST_MOOV_BYTES)
            return os.pread(descriptor, size - start, place + start)
        _require(kind != b"moof")
        place += size
    raise _UnknownFormError


def _boxes(data: bytes, start: int, stop: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield the kind of each box, and where its content starts and stops."""
    while start < stop:
        size, kind = _HEAD(data, start)
        if not 8 <= size <= stop - start:
            raise _UnknownFormError
        yield kind, start + 8, start + size
        start += size


def _children(data: bytes, place: _Place) -> dict[bytes, _Place]:
    boxes = list(_boxes(data, *place))
    children = {kind: (start, stop) for kind, start, stop in boxes}
    _require(len(children) == len(boxes))
    return children


def _read_movie(data: bytes, num_bytes: int) -> Iterator[StreamHeader]:
    movie_scale = 0
    for kind, start, stop in _boxes(data, 0, len(data)):
        _require(kind != b"mvex")  # its samples are in fragments
        if kind == b"mvhd":
            _require(data[start] == 0)
            (movie_scale,) = struct.unpack_from(">I", data, start + 12)
        elif kind == b"trak":
            track = _children(data, (start, stop))
            media = _children(data, track[b"mdia"])
            handler = media[b"hdlr"][0] + 8
            if data[handler : handler + 4] == b"soun":
                yield _read_stream(data, track, media, movie_scale, num_bytes)


def _read_stream(
    data: bytes,
    track: dict[bytes, _Place],
    media: dict[bytes, _Place],
    movie_scale: int,
    num_bytes: int,
) -> StreamHeader:
    header = media[b"mdhd"][0]
    _require(data[header] == 0)
    scale, duration = struct.unpack_from(">II", data, header + 12)
    tables = _children(data, _children(data, media[b"minf"])[b"stbl"])
    rate, channels = _read_aac(data, tables[b"stsd"])
    (num_runs,) = struct.unpack_from(">I", data, tables[b"stts"][0] + 4)
    runs = np.frombuffer(data, ">u4", 2 * num_runs, tables[b"stts"][0] + 8).astype(np.int64)
    duration = min(duration, int(runs[::2] @ runs[1::2]))
    _require(scale > 0 and duration > 0 and runs[::2].sum() == _num_packets(data, tables))
    _require(_media_end(data, tables) <= num_bytes)
    if b"edts" in track:
        _require_whole(data, track[b"edts"], scale, duration, movie_scale)
    return StreamHeader(rate, channels, round(duration / scale * rate))


def _read_aac(data: bytes, table: _Place) -> tuple[int, int]:
    """Return rate and channels of AAC-LC in its plain form."""
    (num_entries,) = struct.unpack_from(">I", data, table[0] + 4)
    _require(num_entries == 1)
    ((kind, start, stop),) = _boxes(data, table[0] + 8, table[1])
    version, _, _, entry_channels = struct.unpack_from(">HHIH", data, start + 8)
    _require(kind == b"mp4a" and version == 0)
    place = _children(data, (start + 28, stop))[b"esds"][0] + 4
    # Descriptors inside one another: elementary stream, decoder, and the decoder's own words.
    place = _enter(data, place, 3)
    _require(data[place + 2] == 0)  # no optional fields
    place = _enter(data, place + 3, 4)
    _require(data[place] == 0x40)  # MPEG-4 audio
    place = _enter(data, place + 13, 5)
    (word,) = struct.unpack_from(">H", data, place)
    codec, rate, channels = word >> 11, word >> 7 & 15, word >> 3 & 15
    _require(codec == 2 and rate < len(_AAC_RATES_HZ) and channels in (1, 2) and not word & 7)
    _require(channels == entry_channels or entry_channels == 2)
    return _AAC_RATES_HZ[rate], channels


def _enter(data: bytes, place: int, tag: int) -> int:
    """Return where the content of a descriptor starts; its length takes up to four bytes."""
    _require(data[place] == tag)
    for width in range(1, 5):
        if data[place + width] < 0x80:
            return place + width + 1
    raise _UnknownFormError


def _num_packets(data: bytes, tables: dict[bytes, _Place]) -> int:
    count: int = struct.unpack_from(">I", data, tables[b"stsz"][0] + 8)[0]
    return count


def _media_end(data: bytes, tables: dict[bytes, _Place]) -> int:
    """Return where in the file the last packet of a stream ends."""
    wide = b"co64" in tables
    offsets = tables[b"co64" if wide else b"stco"][0]
    (num_chunks,) = struct.unpack_from(">I", data, offsets + 4)
    (offset,) = struct.unpack_from(
        ">Q" if wide else ">I", data, offsets + 8 + (num_chunks - 1) * (8 if wide else 4)
    )
    chunking = tables[b"stsc"][0]
    (num_runs,) = struct.unpack_from(">I", data, chunking + 4)
    runs = np.frombuffer(data, ">u4", 3 * num_runs, chunking + 8).reshape(-1, 3).astype(np.int64)
    lengths = np.empty(num_runs, np.int64)  # how many chunks a run has
    lengths[:-1] = runs[1:, 0] - runs[:-1, 0]
    lengths[-1] = num_chunks + 1 - runs[-1, 0]
    num_packets = _num_packets(data, tables)
    _require(lengths.min() > 0 and lengths @ runs[:, 1] == num_packets)
    num_last = int(runs[-1, 1])
    sizes = tables[b"stsz"][0]
    (common_bytes,) = struct.unpack_from(">I", data, sizes + 4)
    _require(common_bytes == 0)
    last = np.frombuffer(data, ">u4", num_last, sizes + 12 + 4 * (num_packets - num_last))
    return int(offset) + int(last.sum(dtype=np.int64))


def _require_whole(data: bytes, edits: _Place, scale: int, duration: int, movie_scale: int) -> None:
    """Require that the list of edits plays the whole of the stream, from its start."""
    place = _children(data, edits)[b"elst"][0]
    version, num_edits, length, start, rate = struct.unpack_from(">B3xIIiI", data, place)
    _require(version == 0 and num_edits == 1 and start == 0 and rate == 1 << 16)
    _require(length * scale >= duration * movie_scale)
