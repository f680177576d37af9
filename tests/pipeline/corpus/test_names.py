"""Names of tracks are data: whatever they are, nothing is written beside the shards."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner

from flsep.cache import Shards
from flsep.pipeline.cli import cli

RATE_HZ = 16000
OPTIONS = ["--sample-rate", str(RATE_HZ), "--n-fft", "512", "--hop", "128", "--sources", "a,b"]
NAMES = (
    "with spaces  ",
    "quotes ' \" `",
    "$(touch pwned); rm -rf *",
    "-option",
    "Größe 音楽 🎵",
    "e\u0301 and \u00e9",  # the same letter in two ways
    "dots ..",
    "back\\slash",
    "percent%20%s{0}",
    "case",
    "CASE",
    "Case",
    "a" * 255,
    "ü" * 127,  # 254 bytes
    "CON",
    "track-00000",
    "index.json",
)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    rng = np.random.default_rng(0)
    for name in NAMES:
        folder = root / name
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            pytest.skip("this file system does not tell cases apart")
        for source in ("a", "b"):
            soundfile.write(folder / f"{source}.wav", rng.uniform(-0.4, 0.4, (8000, 2)), RATE_HZ)
    return root


def everything(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_any_name_is_kept_and_no_file_is_called_so(
    corpus: Path, tmp_path: Path, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = tmp_path / "shards"
    working = tmp_path / "working"
    working.mkdir()
    monkeypatch.chdir(working)
    before = everything(tmp_path)
    arguments = ["run", str(corpus), str(shards), "--teacher", str(tiny_teacher), *OPTIONS]
    result = CliRunner().invoke(cli, [*arguments, "--workers", "0", "--valid-fraction", "0"])
    assert result.exit_code == 0, result.output
    names = [track.name for track in Shards(shards).tracks("train")]
    assert names == sorted(NAMES)
    written = everything(tmp_path) - before
    assert {path.parent for path in written} == {shards, tmp_path}
    shard_names = {path.name for path in shards.iterdir() if path.suffix == ".h5"}
    assert {path.name for path in written} == {
        "shards",
        ".lock",
        "config.json",
        "index.json",
        *shard_names,
    }
    assert all(len(name) == len("train-0123456789abcdef.h5") for name in shard_names)
    shown = CliRunner().invoke(cli, ["inspect", str(shards)]).output
    assert all(f"  {name}  [" in shown for name in NAMES)


@pytest.mark.parametrize("name", ["line\nbreak", "bell\a", "escape\x1b[31m", "not utf-8 \udcff"])
def test_a_name_that_cannot_be_shown_is_rejected(
    tmp_path: Path, name: str, tiny_teacher: Path
) -> None:
    rng = np.random.default_rng(0)
    for folder in ("good", "fine", name):
        (tmp_path / "corpus" / folder).mkdir(parents=True)
        for source in ("a", "b"):
            path = tmp_path / "corpus" / folder / f"{source}.wav"
            with path.open("wb") as file:
                soundfile.write(file, rng.uniform(-0.4, 0.4, (8000, 2)), RATE_HZ, format="WAV")
    arguments = ["run", str(tmp_path / "corpus"), str(tmp_path / "shards"), *OPTIONS]
    result = CliRunner().invoke(
        cli, [*arguments, "--teacher", str(tiny_teacher), "--workers", "0"], catch_exceptions=True
    )
    assert result.exit_code == 1
    assert name not in result.output
    assert "failed   1 tracks" in result.output
    assert len(Shards(tmp_path / "shards").index.tracks) == 2
