import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_mixes import make_mixes

from flsep.cache import (
    CacheError,
    DamagedDataError,
    FormatVersionError,
    MismatchError,
    MissingDataError,
    Mixes,
    MixesConfig,
    MixesFile,
    Shards,
    build_index,
    verify_mixes,
    write_index,
    write_mixes,
)
from flsep.cache.errors import FieldError, NonFiniteDataError
from flsep.cache.mixes import file as mixes
from flsep.cache.mixes import folder as rendered
from flsep.cache.sealed import write_sealed
from flsep.cache.shards.file import ShardFile

NUM_EXAMPLES = int(os.environ.get("FLSEP_FUZZ", 300))


@pytest.fixture
def shards(
    tmp_path: Path, write_shard: Callable[..., Path], track_arrays: Callable[..., dict[str, Any]]
) -> Shards:
    folder = tmp_path / "shards"
    folder.mkdir()
    tracks = {name: ("train", track_arrays(seed)) for seed, name in enumerate("ab")}
    path = write_shard(folder / "0.h5", tracks)
    write_index(folder, build_index([ShardFile(path)]))
    return Shards(folder)


@pytest.fixture
def make(shards: Shards, tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "mixes", **options: Any) -> Path:
        make_mixes(tmp_path / name, shards, excerpt_seconds=0.1, **options)
        return tmp_path / name

    return make


def test_round_trip(
    make: Callable[..., Path], shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (mixes, rendered):
        monkeypatch.setattr(module, "MIXES_PER_FILE", 4)
    folder = make(with_stems=True, num_windows=5)
    names = [f"epoch-00000{e}-000000{first}.h5" for e in (0, 1) for first in (0, 4)]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "mixes.json"]
    opened = Mixes(folder)
    assert list(opened.num_bytes) == names
    assert opened.num_epochs == 2
    assert [verdict.problem for verdict in verify_mixes(opened)] == [None] * 4
    excerpts = opened.of(shards)
    assert len(excerpts) == 6
    files = [MixesFile.read(folder / name).arrays for name in names]
    for epoch in (0, 1):
        for index in range(6):
            file, place = files[2 * epoch + index // 4], index % 4
            draw = excerpts.draw(epoch, index)
            assert draw.gains is not None
            assert draw.heard is not None
            tracks = shards.tracks("train")
            assert [tracks.index(t) for t, _ in draw.places] == file["track"][place].tolist()
            assert [shards.layout.window_frames(k)[0] for _, k in draw.places] == file["frame"][
                place
            ].tolist()
            assert np.array_equal(np.float32(draw.gains), file["gain"][place])
            assert draw.swaps == tuple(file["swap"][place].astype(bool).tolist())
            assert draw.heard.embedding.shape == (3, 5, 3)
            assert np.array_equal(draw.heard.embedding, file["embedding"][place])
            assert np.array_equal(draw.heard.activity_db, file["activity"][place])


def test_bytes_of_a_mix(make: Callable[..., Path]) -> None:
    make()
    config = Mixes(make("other")).config
    # 2 sources: track, frame, gain (4 bytes) and swap (1); 2 windows of 3 numbers and a level.
    assert config.num_bytes(1) == 2 * 13 + 2 * (3 + 1) * 4
    half = Mixes(make("half", embedding_dtype="float16")).config
    assert half.num_bytes(1) == 2 * 13 + 2 * (3 * 2 + 4)


def test_the_same_mixes_have_the_same_bytes(make: Callable[..., Path]) -> None:
    one, other = make(), make("other")
    for path in one.iterdir():
        assert path.read_bytes() == (other / path.name).read_bytes()


def refusal(path: Path) -> str:
    with pytest.raises(CacheError) as caught:
        MixesFile.read(path)
    return str(caught.value)


def test_a_file_that_is_none(make: Callable[..., Path], shards: Shards, tmp_path: Path) -> None:
    path = make() / "epoch-000000-0000000.h5"
    content = path.read_bytes()
    path.write_bytes(content[:300])
    assert f"{path}: not readable as mixes" in refusal(path)
    path.write_bytes(b"")
    assert "not readable as mixes" in refusal(path)
    path.unlink()
    assert f"{path}: missing; run flsep-precompute mixes again" in refusal(path)
    assert "not of the format flsep-mixes" in refusal(shards.folder / "0.h5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.attrs.modify("version", 2), "version 2, this flsep reads 1"),
        (lambda file: file.attrs.modify("epoch", 1), "does not have the digest it states"),
        (lambda file: file.__delitem__("gain"), "holds ['activity', 'embedding', 'frame', 'swa"),
        (lambda file: file.attrs.__delitem__("config"), "not readable as mixes"),
        (lambda file: file["gain"].__setitem__((0, 0), 1.0), "does not have the digest"),
        (lambda file: relink(file, h5py.SoftLink("/frame")), "gain is not stored in this file"),
        (lambda file: relink(file, h5py.ExternalLink("x.h5", "/gain")), "not readable as mixes"),
        (lambda file: resize(file, (2, 2)), "gain is float32 (2, 2)"),
        (lambda file: resize(file, (6, 1 << 40)), "gain is float32 (6, 1099511627776)"),
    ],
)
def test_altered_files_are_refused(
    make: Callable[..., Path], change: Callable[[h5py.File], None], message: str
) -> None:
    path = make() / "epoch-000000-0000000.h5"
    with h5py.File(path, "r+") as file:
        change(file)
    assert message in refusal(path)


def relink(file: h5py.File, link: Any) -> None:
    del file["gain"]
    file["gain"] = link


def resize(file: h5py.File, shape: tuple[int, ...]) -> None:
    del file["gain"]
    file.create_dataset("gain", shape, "<f4", chunks=(1, 1))


def test_a_file_of_other_mixes_is_refused(make: Callable[..., Path]) -> None:
    one, other = make(), make("other", seed=1)
    name = "epoch-000001-0000000.h5"
    shutil.copy(other / name, one / name)
    opened = Mixes(one)
    opened.check_files()
    with pytest.raises(MismatchError, match=f"{name}: not the file that the index lists"):
        opened.read_file(name)
    problems = [verdict.problem for verdict in verify_mixes(opened)]
    assert problems[0] is None
    assert "not the file that the index lists" in str(problems[1])


def test_recipes_that_no_shard_can_follow(make: Callable[..., Path], shards: Shards) -> None:
    folder = make()
    config = Mixes(folder).config
    name = "epoch-000000-0000000.h5"
    arrays = dict(MixesFile.read(folder / name).arrays)
    for key, value in (("track", 2), ("frame", 1), ("frame", 1 << 31)):
        changed = {**arrays, key: arrays[key].copy()}
        changed[key][0, 0] = value
        write_mixes(folder / name, config, 0, changed, {})
        content = json.loads((folder / "mixes.json").read_text())
        del content["sha256"]
        content["files"][name]["sha256"] = MixesFile.read(folder / name).sha256
        write_sealed(folder / "mixes.json", content)
        with pytest.raises(DamagedDataError, match="where no excerpt starts"):
            Mixes(folder).of(shards).draw(0, 0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"version": 2}, FormatVersionError, "version 2, this flsep reads 1"),
        ({"format": "x"}, DamagedDataError, "its format is 'x', expected 'flsep-mixes'"),
        ({"num_epochs": 3}, DamagedDataError, "does not list the files of its epochs"),
        ({"num_epochs": "3"}, DamagedDataError, "mixes.json: not readable as an index"),
        ({"files": {"../x": {"bytes": 1, "sha256": ""}}}, DamagedDataError, "does not list"),
        ({"config": {}}, DamagedDataError, "has the fields"),
    ],
)
def test_altered_indexes_are_refused(
    make: Callable[..., Path], changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = make() / "mixes.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps(content))
    with pytest.raises(CacheError, match=r"altered|version 2|format"):
        Mixes(path.parent)
    del content["sha256"]
    write_sealed(path, content)
    with pytest.raises(error, match=message):
        Mixes(path.parent)


def test_no_mixes(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="no such folder; expected the output of flsep-pr"):
        Mixes(tmp_path / "none")
    with pytest.raises(MissingDataError, match=r"mixes.json: no index; if flsep-pre"):
        Mixes(tmp_path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"embedding": np.full((6, 1, 2, 3), np.nan)}, NonFiniteDataError, "embedding would hold"),
        ({"activity": np.full((6, 1, 2), -np.inf)}, NonFiniteDataError, "activity would hold NaN"),
        # too large for float16
        ({"embedding": np.full((6, 1, 2, 3), 1e5)}, NonFiniteDataError, "NaN or infinity as float"),
        # a bug of the caller
        ({"embedding": np.zeros((6, 1, 2, 4))}, ValueError, r"embedding is \(6, 1, 2, 4\); exp"),
    ],
)
def test_what_is_not_written(
    make: Callable[..., Path],
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    folder = make(embedding_dtype="float16")
    config = Mixes(folder).config
    arrays = {**MixesFile.read(folder / "epoch-000000-0000000.h5").arrays, **changes}
    with pytest.raises(error, match=message):
        write_mixes(tmp_path / "new.h5", config, 0, arrays, {})
    assert not (tmp_path / "new.h5").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("embedding_dtype", "float64"),
        ("num_tracks", 0),
        ("excerpt_seconds", -1.0),
        ("excerpt_seconds", float("inf")),
        ("min_gain", 2.0),
        ("max_gain", float("inf")),
        ("swap_probability", 1.5),
        ("seed", -1),
    ],
)
def test_configurations_that_make_no_sense(
    make: Callable[..., Path], name: str, value: Any
) -> None:
    with pytest.raises(FieldError, match=f"{name.partition('_')[2]}.* expected"):
        MixesConfig(**{**Mixes(make()).config.to_json(), name: value})


@settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_damage_gives_the_old_content_or_is_refused(
    make: Callable[..., Path], tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "mixes" / "epoch-000000-0000000.h5"
    if not path.exists():
        make()
    old = MixesFile.read(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    length = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(content[:length])
    try:
        new = MixesFile.read(damaged)
    except CacheError:
        return
    assert (new.config, new.epoch, new.sha256) == (old.config, old.epoch, old.sha256)
    assert all(np.array_equal(new.arrays[name], value) for name, value in old.arrays.items())
