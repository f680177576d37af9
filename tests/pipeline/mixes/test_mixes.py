"""Rendered mixes for real: a small corpus at twice the teacher's rate, a small teacher."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import librosa
import numpy as np
import psutil
import pytest
import soundfile
import soxr
import torch
from click.testing import CliRunner, Result

from flsep.cache import Grid, Mixes, MixesFile, Shards
from flsep.cache.mixes import file as mixes
from flsep.pipeline.cli import cli
from flsep.pipeline.execution.stage import TaskReport
from flsep.pipeline.teachers.loading import load_teacher
from flsep.trainer.config import DataConfig
from flsep.trainer.data.batch import assemble
from flsep.trainer.data.excerpts import draw_excerpts
from flsep.trainer.data.loader import load_batches
from flsep.trainer.data.reader import Reader

RATE_HZ = 32000
OPTIONS = ["--sample-rate", str(RATE_HZ), "--n-fft", "1024", "--hop", "256", "--sources", "a,b"]
SMALL = ["--epochs", "2", "--seconds", "0.55", "--excerpts-per-track", "5", "--workers", "0"]

PROGRAM = "from flsep.pipeline.cli import main; main()"


@pytest.fixture(scope="module")
def shards(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mixed")
    for number, seconds in enumerate((1.5, 1.1, 2.0)):
        folder = root / "corpus" / "train" / f"t{number}"
        folder.mkdir(parents=True)
        rng = np.random.default_rng(number)
        for name in ("a", "b", "mixture"):
            waveform = rng.uniform(-0.4, 0.4, (int(seconds * RATE_HZ), 2))
            soundfile.write(folder / f"{name}.wav", waveform, RATE_HZ)
    arguments = ["run", str(root / "corpus"), str(root / "shards"), "--teacher", str(tiny_teacher)]
    options = [*OPTIONS, "--workers", "0", "--shard-size", "1M", "--valid-fraction", "0"]
    result = CliRunner().invoke(cli, [*arguments, *options])
    assert result.exit_code == 0, result.output
    return root / "shards"


@pytest.fixture
def render(shards: Path) -> Callable[..., Result]:
    """Run ``flsep-precompute mixes`` in this process; later options beat earlier ones."""

    def run(out: Path, *options: str, of: Path = shards) -> Result:
        return CliRunner().invoke(cli, ["mixes", str(of), str(out), *SMALL, *options])

    return run


def refused(result: Result) -> str:
    assert result.exit_code == 1
    return " ".join(result.output.split())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


@pytest.mark.parametrize("options", [(), ("--stems", "--embedding-dtype", "float16")])
def test_the_teacher_hears_what_the_trainer_mixes(
    shards: Path,
    tmp_path: Path,
    render: Callable[..., Result],
    tiny_teacher: Path,
    options: tuple[str, ...],
) -> None:
    result = render(tmp_path / "mixes", *options)
    assert result.exit_code == 0, result.output
    assert "2 epochs of 15, 0.1 minutes each: 2 sources from 3 tracks (train)" in result.output
    assert "rendered 30 mixes" in result.output
    opened, teacher = Shards(shards), load_teacher(str(tiny_teacher))
    excerpts = Mixes(tmp_path / "mixes").of(opened)
    reader = Reader(opened, Grid(opened.layout, 0.55), None)
    (batch,) = load_batches(reader, excerpts, epoch=1, batch_size=15, num_workers=0)
    example = assemble(batch, torch.device("cpu"), opened.layout.hop_samples)
    tolerance = 2e-3 if options else 1e-3
    for index in range(15):
        heard = excerpts.draw(1, index).heard
        assert heard is not None
        signals = [example.mixture_BCT, *example.references_SBCT][: len(heard.embedding)]
        assert len(signals) == (3 if options else 1)
        for stored, level, waveform_BCT in zip(
            heard.embedding, heard.activity_db, signals, strict=True
        ):
            mono = waveform_BCT[index].mean(0).numpy()
            resampled = soxr.resample(mono, RATE_HZ, 16000, quality="HQ")
            embedding = teacher(resampled)
            assert embedding.shape == stored.shape == (5, 8)
            assert np.abs(embedding - stored).max() < tolerance * np.abs(embedding).max()
            window = resampled[: teacher.info.window_samples].astype(np.float64)
            assert level[0] == pytest.approx(10 * np.log10((window**2).mean()), abs=1e-3)


def test_recipes_are_those_of_random_mixing(
    shards: Path, tmp_path: Path, render: Callable[..., Result]
) -> None:
    render(tmp_path / "mixes", "--seed", "7", "--max-gain", "2")
    opened = Shards(shards)
    grid = Grid(opened.layout, 0.55)
    config = DataConfig(mixing="random", excerpts_per_track=5, max_gain=2.0)
    mixed = draw_excerpts(grid, opened.tracks("train"), config, 7)
    rendered = Mixes(tmp_path / "mixes").of(opened)
    assert len(mixed) == len(rendered) == 15
    for epoch in range(2):
        for index in range(15):
            one, other = mixed.draw(epoch, index), rendered.draw(epoch, index)
            assert (one.places, one.swaps) == (other.places, other.swaps)
            assert np.array_equal(np.float32(one.gains), np.float32(other.gains))


def test_statistics_of_the_recipes(
    shards: Path, tmp_path: Path, render: Callable[..., Result]
) -> None:
    """Tracks, gains and swaps are uniform and independent; starts cover the tracks."""
    render(tmp_path / "mixes", "--excerpts-per-track", "340", "--epochs", "1")
    (name,) = Mixes(tmp_path / "mixes").num_bytes
    arrays = MixesFile.read(tmp_path / "mixes" / name).arrays
    assert len(arrays["track"]) == 1020
    share = np.bincount(arrays["track"].ravel(), minlength=3) / 2040
    assert np.abs(share - 1 / 3).max() < 4 * np.sqrt(2 / 9 / 2040)
    gains = arrays["gain"].astype(np.float64)
    assert gains.min() > 0.25
    assert gains.max() < 1.25
    assert abs(gains.mean() - 0.75) < 4 * np.sqrt(1 / 12 / 2040)
    assert abs(gains.var() - 1 / 12) < 0.01
    assert abs(arrays["swap"].mean() - 0.5) < 4 * np.sqrt(1 / 4 / 2040)
    pairs = [(arrays[k][:, 0], arrays[k][:, 1]) for k in ("track", "gain", "swap")]
    assert all(abs(np.corrcoef(*pair)[0, 1]) < 4 / np.sqrt(1020) for pair in pairs)
    grid = Grid(Shards(shards).layout, 0.55)
    for number, track in enumerate(Shards(shards).tracks("train")):
        starts = set(arrays["frame"][arrays["track"] == number].tolist())
        assert starts == {grid.first_frame(window) for window in grid.starts(track)}


@pytest.mark.heavy
def test_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path, render: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mixes, "MIXES_PER_FILE", 1024)
    options = ("--excerpts-per-track", "700")
    for workers in ("0", "1", "3"):
        result = render(tmp_path / workers, *options, "--workers", workers)
        assert result.exit_code == 0, result.output
    expected = contents(tmp_path / "1")
    assert len([name for name in expected if name.startswith("epoch-")]) == 6
    assert contents(tmp_path / "3") == expected
    # Without workers TensorFlow has all cores: the last bits may differ.
    for name in expected.keys() - {"mixes.json", "config.json"}:
        one, other = (MixesFile.read(tmp_path / k / name).arrays for k in ("0", "1"))
        for key, values in one.items():
            np.testing.assert_allclose(values, other[key], rtol=1e-4, atol=1e-5)


def test_a_stopped_run_goes_on(
    tmp_path: Path, render: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mixes"
    render(out)
    complete = contents(out)
    (out / "mixes.json").unlink()
    for command in ("verify", "inspect"):
        message = refused(CliRunner().invoke(cli, [command, str(out)]))
        assert "no index; if flsep-precompute mixes was stopped, run it again" in message
    first, second = sorted(out.glob("epoch-*.h5"))
    second.unlink()
    (out / f".{second.name}.1-ab.part").touch()
    before = first.stat().st_mtime_ns
    result = render(out)
    assert "30 mixes" in result.output
    assert "(15 were there already)" in result.output
    assert contents(out) == complete
    assert first.stat().st_mtime_ns == before


def test_more_epochs_can_come(tmp_path: Path, render: Callable[..., Result]) -> None:
    out = tmp_path / "mixes"
    render(out, "--epochs", "1")
    first = contents(out)
    assert "(15 were there already)" in render(out, "--epochs", "3").output
    assert Mixes(out).num_epochs == 3
    render(tmp_path / "other", "--epochs", "3")
    assert contents(out) == contents(tmp_path / "other")
    assert contents(out)["epoch-000000-0000000.h5"] == first["epoch-000000-0000000.h5"]


def test_parts(tmp_path: Path, render: Callable[..., Result]) -> None:
    for part in ("1/2", "2/2"):
        result = render(tmp_path / "parts", "--part", part)
        assert f"part     {part[0]} of 2: 1 files" in result.output
        assert not (tmp_path / "parts" / "mixes.json").exists()
    assert "(30 were there already)" in render(tmp_path / "parts").output
    render(tmp_path / "whole")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_damaged_file_is_made_again(tmp_path: Path, render: Callable[..., Result]) -> None:
    out = tmp_path / "mixes"
    render(out)
    complete = contents(out)
    path = out / "epoch-000001-0000000.h5"
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    result = CliRunner().invoke(cli, ["verify", str(out)])
    assert result.exit_code == 1
    assert "2 files, 2 epochs of mixes" in result.output
    assert f"{path}: not readable as mixes (its content does not have the digest" in result.output
    assert "renewed" in render(out).output
    assert contents(out) == complete
    assert "all intact" in CliRunner().invoke(cli, ["verify", str(out)]).output


def test_inspect(tmp_path: Path, render: Callable[..., Result]) -> None:
    render(tmp_path / "mixes", "--stems")
    output = CliRunner().invoke(cli, ["inspect", str(tmp_path / "mixes")]).output
    assert "2 sources from 3 tracks (train), 0.55 s, seed 0" in output
    assert "5 windows of the mixture and each scaled stem, 8 dimensions, float32" in output


def test_dry_run_writes_nothing(tmp_path: Path, render: Callable[..., Result]) -> None:
    result = render(tmp_path / "mixes", "--dry-run")
    assert result.exit_code == 0
    assert "an epoch" in result.output
    assert not (tmp_path / "mixes").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--seconds", "3"), "no track of the split 'train' can hold an excerpt of 3 s"),
        (("--seconds", "0.05"), "--seconds 0.05: an excerpt holds no window of the teacher, 0.1 s"),
        (("--seconds", "0"), "--seconds 0: expected more than 0"),
        (("--split", "valid"), "no track in the split 'valid'"),
        (("--min-gain", "2"), "gains from 2.0 to 1.25: expected 0 <= least <= most"),
        (("--swap-probability", "2"), "swap_probability is 2.0; expected one in [0, 1]"),
        (("--part", "3/2"), "--part 3/2: expected a part from 1 to 2"),
        (("--teacher", "nowhere/at/all"), "nowhere/at/all"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, render: Callable[..., Result], options: tuple[str, ...], message: str
) -> None:
    assert message in refused(render(tmp_path / "mixes", *options))
    assert not (tmp_path / "mixes").exists()


def test_too_few_tracks(
    shards: Path, tmp_path: Path, render: Callable[..., Result], tiny_teacher: Path
) -> None:
    folder = tmp_path / "corpus" / "train"
    shutil.copytree(shards.parent / "corpus" / "train" / "t0", folder / "t0")
    arguments = ["run", str(tmp_path / "corpus"), str(tmp_path / "one"), "--workers", "0"]
    options = [*OPTIONS, "--teacher", str(tiny_teacher), "--valid-fraction", "0"]
    assert CliRunner().invoke(cli, [*arguments, *options]).exit_code == 0
    result = render(tmp_path / "mixes", of=tmp_path / "one")
    assert "1 tracks of the split 'train' can be mixed, fewer than the 2 sources" in refused(result)


def test_other_settings_teachers_and_folders_are_refused(
    shards: Path,
    tmp_path: Path,
    render: Callable[..., Result],
    build_tiny_teacher: Callable[..., Path],
) -> None:
    out = tmp_path / "mixes"
    render(out)
    before = contents(out)
    assert "seed was 0, now 1" in refused(render(out, "--seed", "1"))
    other = build_tiny_teacher(tmp_path / "other", dim=4)
    assert "has the digest" in refused(render(out, "--teacher", str(other)))
    assert "no such folder" in refused(render(out, of=tmp_path / "none"))
    assert "another configuration" in refused(render(shards))
    assert contents(out) == before


def test_damaged_shards_are_named(
    shards: Path, tmp_path: Path, render: Callable[..., Result]
) -> None:
    copy = shutil.copytree(shards, tmp_path / "shards")
    path = sorted(copy.glob("train-*.h5"))[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    message = refused(render(tmp_path / "mixes", of=copy))
    assert str(path) in message
    assert "does not have its digest" in message
    path.write_bytes(content[:1000])
    assert "1000 bytes, the index says" in refused(render(tmp_path / "mixes", of=copy))


def test_a_full_disk_is_one_line_and_loses_nothing(
    tmp_path: Path, render: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mixes"
    fsync = os.fsync
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:  # configuration and folder, the first file: then none is left
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = render(out)
    assert result.exit_code == 1
    assert f"the disk is full ({out}" in result.output
    assert not list(out.glob(".*.part"))
    assert not (out / "mixes.json").exists()
    assert "rendered 30 mixes" in render(out).output


def test_a_killed_run_loses_one_file(
    shards: Path, tmp_path: Path, render: Callable[..., Result]
) -> None:
    out = tmp_path / "mixes"
    options = [*SMALL, "--epochs", "400"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "mixes", str(shards), str(out), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while len(list(out.glob("epoch-*.h5"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = sorted(out.glob("epoch-*.h5"))
    assert all(MixesFile.read(path) for path in kept)
    result = render(out, "--epochs", str(len(kept) + 1))
    assert f"({15 * len(kept)} were there already)" in result.output
    assert Mixes(out).num_epochs == len(kept) + 1


def test_a_report_says_where_the_time_went() -> None:
    report = TaskReport("x.h5", 3)
    with report.seconds.measure("mix"):
        pass
    assert json.dumps(report.seconds).startswith('{"mix": ')


def test_inverse_is_librosas() -> None:
    from flsep.pipeline.features import inverse_stft

    waveform = np.random.default_rng(0).standard_normal(20_000, dtype=np.float32)
    for n_fft, hop in ((1024, 256), (1024, 400), (64, 32)):
        spectrum = librosa.stft(waveform, n_fft=n_fft, hop_length=hop)
        num_samples = (spectrum.shape[1] - 1) * hop
        expected = librosa.istft(spectrum, n_fft=n_fft, hop_length=hop, length=num_samples)
        found = inverse_stft(np.ascontiguousarray(spectrum.T), n_fft=n_fft, hop=hop)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        np.testing.assert_allclose(found, waveform[:num_samples], atol=1e-5)


@pytest.mark.heavy
def test_a_killed_worker_costs_its_file_only(
    shards: Path, tmp_path: Path, render: Callable[..., Result]
) -> None:
    options = [*SMALL, "--excerpts-per-track", "60", "--epochs", "8", "--workers"]
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            PROGRAM,
            "mixes",
            str(shards),
            str(tmp_path / "a"),
            *SMALL,
            *options,
            "2",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not list((tmp_path / "a").glob("epoch-*.h5")):
        assert process.poll() is None
        time.sleep(0.01)
    workers = [
        child
        for child in psutil.Process(process.pid).children()
        if "spawn_main" in " ".join(child.cmdline())
    ]
    workers[0].kill()
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    assert "rendered 1440 mixes" in output
    assert render(tmp_path / "b", *options, "1").exit_code == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
