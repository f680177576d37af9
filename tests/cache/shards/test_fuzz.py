"""Damaged shards against the reader, in a process of its own: HDF5 itself may crash or hang."""

import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flsep.cache import ShardFile, build_index, verify_shards, write_index

NUM_EXAMPLES = int(os.environ.get("FLSEP_FUZZ", 300))
SECONDS = 20
CRASHES = ("crashed with status -11", "crashed with status -6", "crashed with status -8")

READER = """
import hashlib, resource, sys, traceback
from pathlib import Path
from flsep.cache import CacheError, ShardFile

resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
for line in sys.stdin:
    try:
        shard = ShardFile(Path(line.rstrip()))
        digest = hashlib.sha256()
        for position, track in enumerate(shard.tracks):
            digest.update(repr((track.name, track.split, track.audio_scale)).encode())
            for name, stored in track.datasets.items():
                for entry in range(stored.dataset.shape[0]):
                    digest.update(shard.read(position, name, entry, verify=True))
        answer = digest.hexdigest()
    except CacheError:
        answer = "refused"
    except BaseException:
        answer = "raised " + traceback.format_exc().replace(chr(10), " | ")
    print(answer, flush=True)
"""


class Reader:
    """A process that reads shards; started again after a crash."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def read(self, path: Path) -> str:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-c", READER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{path}\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], SECONDS)[0]:
            self.stop()
            return "hung"
        answer = self._process.stdout.readline().strip()
        if not answer:
            status = self._process.wait()
            self.stop()
            return f"crashed with status {status}"
        return answer

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader()
    yield reader
    reader.stop()


@pytest.fixture
def shard(
    tmp_path: Path, write_shard: Callable[..., Path], track_arrays: Callable[..., dict[str, Any]]
) -> Path:
    tracks = {"a / b": ("train", track_arrays(0, 64, 2)), "../c": ("test", track_arrays(1, 64, 2))}
    return write_shard(tmp_path / "x.h5", tracks)


def metadata_places(data: bytes) -> list[int]:
    """Where HDF5's own structures begin, and the bytes after: what is worth damaging."""
    places = set(range(64))
    for mark in (
        b"\x89HDF",
        b"OHDR",
        b"OCHK",
        b"FRHP",
        b"FHDB",
        b"BTHD",
        b"TREE",
        b"HEAP",
        b"SNOD",
    ):
        start = data.find(mark)
        while start >= 0:
            places.update(range(start, min(start + 400, len(data))))
            start = data.find(mark, start + 1)
    return sorted(places)


change = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 1 << 30), st.integers(0, 7)),
    st.tuples(st.just("set"), st.integers(0, 1 << 30), st.sampled_from([0, 1, 127, 128, 254, 255])),
    st.tuples(st.just("wide"), st.integers(0, 1 << 30), st.sampled_from([1, 2, 4, 8])),
    st.tuples(st.just("cut"), st.integers(0, 1 << 30), st.just(0)),
    st.tuples(st.just("copy"), st.integers(0, 1 << 30), st.integers(0, 1 << 30)),
)


def damage(data: bytes, places: list[int], changes: list[tuple[str, int, int]]) -> bytes:
    damaged = bytearray(data)
    for kind, number, value in changes:
        place = places[number % len(places)]
        if place >= len(damaged):
            continue
        if kind == "flip":
            damaged[place] ^= 1 << value
        elif kind == "set":
            damaged[place] = value
        elif kind == "wide":
            damaged[place : place + value] = b"\xff" * min(value, len(damaged) - place)
        elif kind == "cut":
            del damaged[number % len(damaged) :]
        else:
            source = places[value % len(places)]
            piece = damaged[source : source + 48]
            damaged[place : place + len(piece)] = piece
    return bytes(damaged)


def fuzz(check: Callable[[list[tuple[str, int, int]]], None]) -> None:
    settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )(given(st.lists(change, min_size=1, max_size=4))(check))()


def test_a_damaged_shard_is_refused_or_read_as_it_was(shard: Path, reader: Reader) -> None:
    whole = shard.read_bytes()
    intact = reader.read(shard)
    assert len(intact) == 64
    places = metadata_places(whole)
    seen: set[str] = set()

    def check(changes: list[tuple[str, int, int]]) -> None:
        shard.write_bytes(damage(whole, places, changes))
        answer = reader.read(shard)
        seen.add(answer)
        assert answer in (intact, "refused"), (answer, changes)

    fuzz(check)
    assert "refused" in seen


def test_a_forged_shard_is_refused_or_read_or_crashes_hdf5(shard: Path, reader: Reader) -> None:
    """With its checksums renewed, as no accident does it; `verify` survives the crash."""
    whole = shard.read_bytes()
    places = metadata_places(whole)
    seen: set[str] = set()

    def check(changes: list[tuple[str, int, int]]) -> None:
        shard.write_bytes(renew_checksums(damage(whole, places, changes)))
        answer = reader.read(shard)
        seen.add(answer)
        assert len(answer) == 64 or answer in ("refused", *CRASHES), (answer, changes)

    fuzz(check)
    assert "refused" in seen


def test_verify_survives_what_crashes_hdf5(shard: Path, reader: Reader) -> None:
    whole = shard.read_bytes()
    write_index(shard.parent, build_index([ShardFile(shard)]))
    for place in metadata_places(whole):  # the first that does
        for bit in range(8):
            shard.write_bytes(renew_checksums(damage(whole, [place], [("flip", 0, bit)])))
            if reader.read(shard) in CRASHES:
                (verdict,) = verify_shards(shard.parent)
                assert f"{shard}: HDF5 crashes on this file, it was altered" in str(verdict.problem)
                return
    pytest.skip("this HDF5 does not crash")


def renew_checksums(data: bytes) -> bytes:
    """Give object headers of version 2 the checksum of what they hold now, as an attacker would."""
    renewed = bytearray(data)
    start = data.find(b"OHDR")
    while start >= 0:
        flags = data[start + 5] if start + 5 < len(data) else 0
        place = start + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        stop = place + width + int.from_bytes(data[place : place + width], "little")
        if stop + 4 <= len(data) and stop - start < 1 << 16:
            renewed[stop : stop + 4] = lookup3(bytes(renewed[start:stop])).to_bytes(4, "little")
        start = data.find(b"OHDR", start + 1)
    return bytes(renewed)


def lookup3(key: bytes) -> int:
    """Bob Jenkins' hash, which HDF5 uses for its checksums."""
    mask = 0xFFFFFFFF

    def rot(value: int, bits: int) -> int:
        return (value << bits | value >> (32 - bits)) & mask

    a = b = c = 0xDEADBEEF + len(key) & mask
    while len(key) > 12:
        a = a + int.from_bytes(key[0:4], "little") & mask
        b = b + int.from_bytes(key[4:8], "little") & mask
        c = c + int.from_bytes(key[8:12], "little") & mask
        a = (a - c & mask) ^ rot(c, 4)
        c = c + b & mask
        b = (b - a & mask) ^ rot(a, 6)
        a = a + c & mask
        c = (c - b & mask) ^ rot(b, 8)
        b = b + a & mask
        a = (a - c & mask) ^ rot(c, 16)
        c = c + b & mask
        b = (b - a & mask) ^ rot(a, 19)
        a = a + c & mask
        c = (c - b & mask) ^ rot(b, 4)
        b = b + a & mask
        key = key[12:]
    if not key:
        return c
    key = key.ljust(12, b"\0")
    a = a + int.from_bytes(key[0:4], "little") & mask
    b = b + int.from_bytes(key[4:8], "little") & mask
    c = c + int.from_bytes(key[8:12], "little") & mask
    for first, second, third in ((14, 11, 25), (16, 4, 14), (24, None, None)):
        c = ((c ^ b) - rot(b, first)) & mask
        if second is None:
            break
        a = ((a ^ c) - rot(c, second)) & mask
        b = ((b ^ a) - rot(a, third)) & mask
    return c


def test_the_checksums_are_hdf5s_own(shard: Path) -> None:
    data = shard.read_bytes()
    assert data.count(b"OHDR") > 4
    assert renew_checksums(data) == data
