"""Stored tracks computed again from their corpus, for real."""

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from flsep.cache import ShardFile, build_index, write_index
from flsep.pipeline.cli import cli

RATE_HZ = 16000
OPTIONS = ["--sample-rate", str(RATE_HZ), "--n-fft", "512", "--hop", "128", "--sources", "a,b"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for number in range(4):
        folder = tmp_path / "corpus" / ("test" if number == 3 else "train") / f"t{number}"
        folder.mkdir(parents=True)
        for name in ("a", "b", "mixture"):
            waveform = rng.uniform(-0.4, 0.4, (20000, 2))
            soundfile.write(folder / f"{name}.wav", waveform, RATE_HZ)
    return tmp_path / "corpus"


@pytest.fixture
def shards(corpus: Path, tmp_path: Path, tiny_teacher: Path) -> Path:
    arguments = ["run", str(corpus), str(tmp_path / "s"), "--teacher", str(tiny_teacher)]
    result = CliRunner().invoke(cli, [*arguments, *OPTIONS, "--workers", "0"])
    assert result.exit_code == 0, result.output
    return tmp_path / "s"


@pytest.fixture
def recheck(corpus: Path, shards: Path) -> Callable[..., Result]:
    def recheck(*options: str) -> Result:
        arguments = ["verify", str(shards), "--against", str(corpus), "--workers", "0", *options]
        return CliRunner().invoke(cli, arguments)

    return recheck


def store(shards: Path, name: str, track: str, dataset: str, change: Callable) -> None:
    """Change one array of a shard, with digests and index as if it had been written so."""
    import hashlib

    path = next(path for path in shards.glob("*.h5") if path.name.startswith(name))
    with h5py.File(path, "r+") as file:
        group = next(group for group in file.values() if group.attrs["name"] == track)
        stored = group[dataset]
        stored[...] = change(stored[...])
        digests = [hashlib.sha256(entry.tobytes()).hexdigest().encode() for entry in stored[...]]
        stored.attrs.modify("sha256", np.array(digests, "S64"))
    write_index(shards, build_index(ShardFile(path) for path in shards.glob("*.h5")))


def test_what_was_just_made_is_equal(recheck: Callable[..., Result], shards: Path) -> None:
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    result = recheck()
    assert result.exit_code == 0, result.output
    # three signals of stft, embedding, activity, embedding_moments; two moments; audio of the test
    assert f"{4 * (3 * 4 + 2) + 3} signals compared" in result.output
    assert "all equal\n" in result.output
    assert {path.name: path.read_bytes() for path in shards.iterdir()} == before


@pytest.mark.heavy
def test_workers_compare_too(recheck: Callable[..., Result]) -> None:
    result = recheck("--workers", "1")
    assert result.exit_code == 0, result.output
    assert "all equal" in result.output


def test_rounding_is_counted_and_more_is_named(
    recheck: Callable[..., Result], shards: Path
) -> None:
    store(shards, "train", "t1", "embedding", lambda values: values * np.float32(1 + 1e-5))
    result = recheck()
    assert result.exit_code == 0, result.output
    assert "all equal, 3 of them but for rounding" in result.output

    def shift(values: np.ndarray) -> np.ndarray:
        values[1] *= 1.5
        return values

    store(shards, "test", "t3", "stft", shift)
    result = recheck()
    assert result.exit_code == 1
    path = next(shards.glob("test-*.h5"))
    assert f"{path}: stft[1] of track 't3' differs from the corpus by 0.33" in result.output
    assert "1 differ" in result.output


def test_another_corpus_is_named(
    recheck: Callable[..., Result], corpus: Path, shards: Path
) -> None:
    waveform, _ = soundfile.read(corpus / "train" / "t0" / "a.wav")
    soundfile.write(corpus / "train" / "t0" / "a.wav", waveform[::-1], RATE_HZ)
    result = recheck()
    assert result.exit_code == 1
    assert "stft[1] of track 't0' differs" in result.output
    for name in ("a", "b", "mixture"):
        soundfile.write(corpus / "train" / "t1" / f"{name}.wav", waveform[:9999], RATE_HZ)
    shutil.rmtree(corpus / "train" / "t2")
    (corpus / "test" / "t3" / "a.wav").unlink()
    result = recheck()
    assert result.exit_code == 1
    assert "track 't1' has 20000 samples, 9999 in the corpus" in result.output
    assert "track 't2': it is not in the corpus" in result.output
    assert "track 't3': " in result.output
    assert "no file for a" in result.output


def test_impossible_requests_are_refused(
    recheck: Callable[..., Result],
    shards: Path,
    tmp_path: Path,
    build_tiny_teacher: Callable[..., Path],
) -> None:
    other = build_tiny_teacher(tmp_path / "other", dim=4)
    assert "the shards were made with" in str(recheck("--teacher", str(other)).exception)
    for options in (["--teacher", str(other)], ["--workers", "1"]):
        result = CliRunner().invoke(cli, ["verify", str(shards), *options])
        assert "no effect without --against" in str(result.exception)


def test_damage_is_found_before_anything_is_computed(
    recheck: Callable[..., Result], shards: Path
) -> None:
    path = next(shards.glob("test-*.h5"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = recheck()
    assert result.exit_code == 1
    assert "1 damaged" in result.output
    assert "compared" not in result.output
