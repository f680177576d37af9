"""The contract between writer and reader: what goes in comes out, damage is refused."""

import hashlib
import json
import multiprocessing
import pickle
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from flsep.cache import (
    CacheError,
    DamagedDataError,
    FormatVersionError,
    MismatchError,
    MissingDataError,
    ShardFile,
    Shards,
    build_index,
    verify_shards,
    write_index,
)
from flsep.cache.format import fingerprint

Content = dict[str, dict[str, Any]]


def same_content(shards: Shards, content: Content) -> None:
    tracks = [track for split in ("train", "valid", "test") for track in shards.tracks(split)]
    assert {track.name for track in tracks} == set(content)
    for track in tracks:
        for signal in range(3):
            for name in ("stft", "embedding", "activity"):
                expected = content[track.name][name][signal]
                found = shards.read(track, name, signal)
                assert found.dtype == expected.dtype
                np.testing.assert_array_equal(found, expected)
            if track.has_audio:
                audio = shards.read_audio(track, signal)
                np.testing.assert_allclose(
                    audio, content[track.name]["audio"][signal], atol=1.5 / 32767
                )


def test_round_trip(shards: tuple[Path, Content]) -> None:
    folder, content = shards
    same_content(Shards(folder), content)
    assert [track.name for track in Shards(folder).tracks("train")] == ["a / b", "ü"]


def test_reads_are_maps_that_cannot_be_written(shards: tuple[Path, Content]) -> None:
    reader = Shards(shards[0])
    array = reader.read(reader.tracks("train")[0], "stft", 1)
    assert not array.flags.owndata
    assert array.flags.aligned
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 0


def test_pickled_reader_holds_no_open_shard(shards: tuple[Path, Content]) -> None:
    folder, content = shards
    reader = Shards(folder)
    same_content(reader, content)
    data = pickle.dumps(reader)
    assert len(data) < 20_000
    same_content(pickle.loads(data), content)


def test_statistics_are_those_of_the_training_split(shards: tuple[Path, Content]) -> None:
    folder, content = shards
    statistics = Shards(folder).index.statistics
    assert statistics is not None
    parts = [content["a / b"], content["ü"]]
    frames = 2 * 101
    total, squares = sum(part["magnitude_moments"] for part in parts)
    np.testing.assert_allclose(statistics.magnitude_mean, total / frames)
    np.testing.assert_allclose(
        statistics.magnitude_std, np.sqrt(squares / frames - (total / frames) ** 2)
    )
    for signal in range(3):
        active = np.concatenate(
            [part["embedding"][signal][part["activity"][signal] >= -60] for part in parts]
        ).astype(np.float64)
        assert statistics.num_windows[signal] == len(active) == (18 if signal == 1 else 20)
        np.testing.assert_allclose(statistics.embedding_mean[signal], active.mean(axis=0))
        np.testing.assert_allclose(statistics.embedding_std[signal], active.std(axis=0))


def test_index_does_not_depend_on_the_order_of_shards(
    shards: tuple[Path, Content], tmp_path: Path
) -> None:
    folder, _ = shards
    before = (folder / "index.json").read_bytes()
    write_index(folder, build_index(ShardFile(folder / name) for name in ("0.h5", "1.h5")))
    assert (folder / "index.json").read_bytes() == before


def test_folder_without_index(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="run it again to finish"):
        Shards(tmp_path)
    with pytest.raises(MissingDataError, match="no such folder"):
        Shards(tmp_path / "nothing")


def test_missing_shard_is_named(shards: tuple[Path, Content]) -> None:
    folder, _ = shards
    (folder / "1.h5").unlink()
    reader = Shards(folder)
    reader.check_files("train")
    with pytest.raises(MissingDataError, match=r"1\.h5: listed in the index but missing"):
        reader.check_files("train", "test")


def test_truncated_shard_is_refused(shards: tuple[Path, Content]) -> None:
    folder, _ = shards
    path = folder / "0.h5"
    data = path.read_bytes()
    for size in (0, 10, 500, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(DamagedDataError, match=re.escape(str(path))):
            ShardFile(path)
        with pytest.raises(DamagedDataError, match=f"{size} bytes, the index says {len(data)}"):
            Shards(folder).check_files("train")


@pytest.mark.parametrize("name", ["stft", "embedding", "activity", "audio"])
def test_flipped_byte_is_refused_on_first_read(shards: tuple[Path, Content], name: str) -> None:
    folder, _ = shards
    stored = ShardFile(folder / "1.h5").tracks[0].datasets[name]
    data = bytearray((folder / "1.h5").read_bytes())
    data[stored.offset + stored.dataset.num_bytes - 1] ^= 1
    (folder / "1.h5").write_bytes(data)
    reader = Shards(folder)
    track = reader.tracks("test")[0]
    reader.read(track, name, 0)
    with pytest.raises(DamagedDataError, match=f"{name} of voice of track '../c' does not have"):
        reader.read(track, name, 2)
    problems = {verdict.name: verdict.problem for verdict in verify_shards(folder)}
    assert problems["0.h5"] is None
    assert "does not have its digest" in str(problems["1.h5"])


def test_flipping_any_byte_is_noticed_or_harmless(shards: tuple[Path, Content]) -> None:
    """Every byte of a small shard's metadata, and a sample of its data."""
    folder, _ = shards
    path = folder / "1.h5"
    original = path.read_bytes()
    shard = ShardFile(path)
    expected = [
        shard.read(0, name, entry, verify=True).tobytes()
        for name, stored in shard.tracks[0].datasets.items()
        for entry in range(stored.dataset.shape[0])
    ]
    rng = np.random.default_rng(0)
    for position in rng.choice(len(original), 400, replace=False):
        data = bytearray(original)
        data[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            damaged = ShardFile(path)
            found = [
                damaged.read(0, name, entry, verify=True).tobytes()
                for name, stored in damaged.tracks[0].datasets.items()
                for entry in range(stored.dataset.shape[0])
            ]
        except CacheError:
            continue
        assert found == expected, f"byte {position} changed what was read"


def edit(path: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


def replace(file: h5py.File, **options: Any) -> None:
    group = file["track-00000"]
    data = group["activity"][()]
    digests = group["activity"].attrs["sha256"]
    del group["activity"]
    group.create_dataset("activity", data=data, **options).attrs["sha256"] = digests


def link(file: h5py.File, target: Any) -> None:
    del file["track-00000/activity"]
    file["track-00000/activity"] = target


def swap_sources(file: h5py.File) -> None:
    layout = json.loads(file.attrs["layout"])
    file.attrs["layout"] = json.dumps({**layout, "sources": layout["sources"][::-1]})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda f: f.attrs.update(version=2), FormatVersionError, "format version 2, .* reads 1"),
        (lambda f: f.attrs.update(format="x"), DamagedDataError, "not of the format flsep-shard"),
        (lambda f: f.attrs.update(config="{}"), DamagedDataError, "does not have the fingerprint"),
        (lambda f: f.attrs.update(layout="[]"), DamagedDataError, "not readable as a shard"),
        (swap_sources, DamagedDataError, "layout is not that of its configuration"),
        (lambda f: link(f, h5py.SoftLink("/track-00000/stft")), DamagedDataError, "external link"),
        (lambda f: link(f, h5py.ExternalLink("0.h5", "/x")), DamagedDataError, "external link"),
        (lambda f: replace(f, chunks=(1, 1)), DamagedDataError, "not stored contiguously"),
        (
            lambda f: replace(f, external=[("other.raw", 0, h5py.h5f.UNLIMITED)]),
            DamagedDataError,
            "not stored contiguously",
        ),
        (lambda f: replace(f, dtype="f8"), DamagedDataError, "is float64 .* expected float32"),
        (
            lambda f: f["track-00000"].attrs.update(num_samples=10**15),
            DamagedDataError,
            r"audio is int16 .* expected int16",
        ),
        (lambda f: f["track-00000"].attrs.update(num_windows=-1), DamagedDataError, "attributes"),
        (lambda f: f.move("track-00000/stft", "track-00000/x"), DamagedDataError, "holds"),
        (lambda f: f.move("track-00000", "track-1"), DamagedDataError, "holds"),
    ],
)
def test_malformed_shard_is_refused(
    shards: tuple[Path, Content],
    change: Callable[[h5py.File], None],
    error: type[CacheError],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, _ = shards
    monkeypatch.chdir(folder)
    path = folder / "1.h5"
    edit(path, change)
    with pytest.raises(error, match=message) as caught:
        ShardFile(path)
    assert str(path) in str(caught.value)


def test_some_other_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.h5"
    path.write_text("hello")
    with pytest.raises(DamagedDataError, match="not readable as a shard"):
        ShardFile(path)
    with pytest.raises(MissingDataError, match="no such shard"):
        ShardFile(tmp_path / "y.h5")


def test_shard_of_another_configuration_is_refused(
    shards: tuple[Path, Content], write_shard: Callable[..., Path]
) -> None:
    folder, content = shards
    write_shard(folder / "1.h5", {"../c": ("test", content["../c"])}, other=True)
    reader = Shards(folder)
    with pytest.raises(MismatchError, match="another configuration"):
        reader.read(reader.tracks("test")[0], "stft", 0)
    with pytest.raises(MismatchError, match="another configuration"):
        build_index([ShardFile(folder / "0.h5"), ShardFile(folder / "1.h5")])


def test_exchanged_shard_is_refused(
    shards: tuple[Path, Content], write_shard: Callable[..., Path]
) -> None:
    folder, content = shards
    write_shard(folder / "1.h5", {"../c": ("test", content["ü"])})
    reader = Shards(folder)
    with pytest.raises(MismatchError, match=r"track '\.\./c' is not the one that the index lists"):
        reader.read(reader.tracks("test")[0], "stft", 0)
    assert "not the shard that the index lists" in str(list(verify_shards(folder))[1].problem)


def test_track_stored_twice_is_refused(
    shards: tuple[Path, Content], write_shard: Callable[..., Path]
) -> None:
    folder, content = shards
    write_shard(folder / "2.h5", {"ü": ("test", content["../c"])})
    with pytest.raises(MismatchError, match=r"stored twice: \['ü'\]"):
        build_index(ShardFile(path) for path in sorted(folder.glob("*.h5")))


def test_no_audio_for_training_tracks(shards: tuple[Path, Content]) -> None:
    reader = Shards(shards[0])
    with pytest.raises(MissingDataError, match="has no audio"):
        reader.read_audio(reader.tracks("train")[0], 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.update(version=7), FormatVersionError, "format version 7"),
        (lambda c: c.update(format="x"), DamagedDataError, "format is 'x', expected 'flsep-index'"),
        (lambda c: c["tracks"][0].update(num_frames=7), DamagedDataError, "digest does not match"),
        (lambda c: c.pop("tracks"), DamagedDataError, "digest does not match"),
    ],
)
def test_altered_index_is_refused(
    shards: tuple[Path, Content],
    change: Callable[[dict[str, Any]], Any],
    error: type[CacheError],
    message: str,
) -> None:
    path = shards[0] / "index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(error, match=message):
        Shards(shards[0])


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "null", "{}", '{"format": NaN}', "\xff", pytest.param("[" * 100_000, id="deep")],
)
def test_what_is_no_index_is_refused(shards: tuple[Path, Content], text: str) -> None:
    path = shards[0] / "index.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DamagedDataError, match=f"{path}: not readable as an index"):
        Shards(shards[0])


def test_index_that_names_a_file_elsewhere_is_refused(shards: tuple[Path, Content]) -> None:
    path = shards[0] / "index.json"
    content = json.loads(path.read_text())
    del content["sha256"]
    content["shards"] = {f"../{name}": size for name, size in content["shards"].items()}
    path.write_text(json.dumps({**content, "sha256": fingerprint(content)}))
    with pytest.raises(DamagedDataError, match=r"'\.\./0.h5' is not a file name in this folder"):
        Shards(shards[0])


def test_more_shards_than_are_kept_mapped(
    tmp_path: Path,
    write_shard: Callable[..., Path],
    track_arrays: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flsep.cache.shards.reader._MAX_MAPPED_SHARDS", 2)
    content = {str(seed): track_arrays(seed, 320, 2) for seed in range(5)}
    paths = [
        write_shard(tmp_path / f"{name}.h5", {name: ("train", arrays)})
        for name, arrays in content.items()
    ]
    write_index(tmp_path, build_index(map(ShardFile, paths)))
    reader = Shards(tmp_path)
    kept = reader.read(reader.tracks("train")[0], "stft", 0)
    same_content(reader, content)
    assert sum(shard._map is not None for shard in reader._open.values()) == 2
    np.testing.assert_array_equal(kept, content["0"]["stft"][0])
    # Neither HDF5 nor the digests are asked again.
    monkeypatch.setattr("h5py.File", None)
    monkeypatch.setattr("hashlib.sha256", None)
    same_content(reader, content)


def test_a_shard_replaced_while_in_use_is_refused(
    shards: tuple[Path, Content], write_shard: Callable[..., Path]
) -> None:
    folder, content = shards
    reader = Shards(folder)
    track = reader.tracks("test")[0]
    before = reader.read(track, "stft", 0)
    write_shard(folder / "1.h5", {"../c": ("test", content["ü"])})
    # What is mapped stays what it was.
    np.testing.assert_array_equal(before, content["../c"]["stft"][0])
    np.testing.assert_array_equal(reader.read(track, "stft", 0), content["../c"]["stft"][0])
    reader._open["1.h5"].unmap()
    with pytest.raises(MismatchError, match=r"1\.h5: replaced or altered since it was opened"):
        reader.read(track, "stft", 0)


def digest_all(reader: Shards) -> str:
    """Digest everything the shards hold, as `reader` reads it."""
    digest = hashlib.sha256()
    for track in reader.index.tracks:
        for name in ("stft", "embedding", "activity"):
            for signal in range(3):
                digest.update(reader.read(track, name, signal).tobytes())
    return digest.hexdigest()


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_another_process_reads_the_same(shards: tuple[Path, Content], method: str) -> None:
    reader = Shards(shards[0])
    expected = digest_all(reader)
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(digest_all, reader).result() == expected


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_inherit_a_held_lock(shards: tuple[Path, Content]) -> None:
    reader = Shards(shards[0])
    expected = digest_all(reader)
    results = multiprocessing.get_context("fork").SimpleQueue()
    child = multiprocessing.get_context("fork").Process(
        target=lambda: results.put(digest_all(reader)), daemon=True
    )
    with reader._lock:
        child.start()
    child.join(30)
    assert child.exitcode == 0
    assert results.get() == expected


def test_many_threads_read_the_same(
    shards: tuple[Path, Content], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flsep.cache.shards.reader._MAX_MAPPED_SHARDS", 1)
    expected = digest_all(Shards(shards[0]))
    reader = Shards(shards[0])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: digest_all(reader), range(40)))
    assert set(found) == {expected}
