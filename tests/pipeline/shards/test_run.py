"""The offline stage for real: small corpora of wav files, a small teacher, inline and on Dask."""

import fcntl
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import librosa
import numpy as np
import pytest
import soundfile
import soxr
from click.testing import CliRunner, Result

from flsep.cache import Shards, verify_shards
from flsep.pipeline.cli import cli
from flsep.pipeline.execution.cluster import ClusterSettings, start_cluster
from flsep.pipeline.execution.runners import run_inline
from flsep.pipeline.shards import track as track_module
from flsep.pipeline.teachers.loading import load_teacher

RATE_HZ = 16000
OPTIONS = ["--sample-rate", str(RATE_HZ), "--n-fft", "512", "--hop", "128", "--sources", "a,b"]


def write_track(folder: Path, seed: int, seconds: float = 1.5, mixture: bool = True) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    sources = rng.uniform(-0.4, 0.4, (2, int(seconds * RATE_HZ), 2)).astype(np.float32)
    for name, source in zip("ab", sources, strict=True):
        soundfile.write(folder / f"{name}.wav", source, RATE_HZ, "FLOAT")
    if mixture:
        soundfile.write(folder / "mixture.wav", 0.9 * sources.sum(axis=0), RATE_HZ, "FLOAT")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    write_track(root / "train" / "one", 1)
    write_track(root / "train" / "two", 2, mixture=False)
    write_track(root / "train" / "three", 3, seconds=2.5)
    write_track(root / "valid" / "four", 4)
    write_track(root / "test" / 'Größe "5\'" ..', 5)
    return root


@pytest.fixture
def run(tiny_teacher: Path) -> Callable[..., Result]:
    """Run ``flsep-precompute run`` in this process, without Dask unless told otherwise."""

    def run(corpus: Path, shards: Path, *options: str) -> Result:
        arguments = ["run", str(corpus), str(shards), "--teacher", str(tiny_teacher), *OPTIONS]
        if not {"--workers", "--scheduler"} & set(options):
            arguments += ["--workers", "0"]
        return CliRunner().invoke(cli, [*arguments, *options])

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_shards_hold_what_librosa_and_the_teacher_give(
    corpus: Path, tmp_path: Path, run: Callable[..., Result], tiny_teacher: Path
) -> None:
    result = run(corpus, tmp_path / "shards", "--stft-dtype", "float32")
    assert result.exit_code == 0, result.output
    shards = Shards(tmp_path / "shards")
    teacher = load_teacher(str(tiny_teacher))
    for split, names in {"train": ["one", "three", "two"], "valid": ["four"]}.items():
        assert [track.name for track in shards.tracks(split)] == names
    for track in (*shards.tracks("train"), *shards.tracks("test")):
        folder = corpus / track.split / track.name
        a, b = (soundfile.read(folder / f"{name}.wav", dtype="float32")[0].T for name in "ab")
        path = folder / "mixture.wav"
        mixture = soundfile.read(path, dtype="float32")[0].T if path.exists() else a + b
        for signal_number, waveform in enumerate((mixture, a, b)):
            plain = librosa.stft(waveform, n_fft=512, hop_length=128, pad_mode="reflect")
            stored = shards.read(track, "stft", signal_number)
            spectrum = stored[..., 0] + 1j * stored[..., 1]  # [frame, channel, bin]
            np.testing.assert_allclose(spectrum, plain.transpose(2, 0, 1), atol=2e-5)
            mono = soxr.resample(waveform.mean(axis=0), RATE_HZ, 16000, quality="HQ")
            embedding = shards.read(track, "embedding", signal_number)
            np.testing.assert_allclose(embedding, teacher(mono), atol=1e-6)
            level = shards.read(track, "activity", signal_number)[0]
            window = mono[: teacher.info.window_samples].astype(np.float64)
            assert level == pytest.approx(10 * np.log10((window**2).mean()), abs=1e-3)
            if track.has_audio:
                audio = shards.read_audio(track, signal_number)
                np.testing.assert_allclose(audio, waveform, atol=1 / 32767)
    assert not shards.tracks("train")[0].has_audio
    statistics = shards.index.statistics
    assert statistics is not None
    magnitudes = [
        np.hypot(*np.moveaxis(shards.read(track, "stft", 0), -1, 0)).mean(axis=1)
        for track in shards.tracks("train")
    ]
    frames = np.concatenate(magnitudes).astype(np.float64)
    np.testing.assert_allclose(statistics.magnitude_mean, frames.mean(axis=0), rtol=1e-4)
    np.testing.assert_allclose(statistics.magnitude_std, frames.std(axis=0), rtol=1e-3)


def test_dask_gives_the_same_bytes_as_inline(
    corpus: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    assert run(corpus, tmp_path / "inline", "--shard-size", "1M").exit_code == 0
    result = run(corpus, tmp_path / "dask", "--shard-size", "1M", "--workers", "2")
    assert result.exit_code == 0, result.output
    assert "dashboard http://127.0.0.1" in result.output
    inline, dask = contents(tmp_path / "inline"), contents(tmp_path / "dask")
    assert inline.keys() == dask.keys()
    assert len([name for name in inline if name.endswith(".h5")]) >= 4
    for name, data in inline.items():
        assert dask[name] == data, name


def test_a_rerun_keeps_what_is_intact_and_renews_the_rest(
    corpus: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    folder = tmp_path / "shards"
    assert run(corpus, folder, "--shard-size", "1M").exit_code == 0
    before = contents(folder)
    paths = sorted(folder.glob("*.h5"))
    times = {path: path.stat().st_mtime_ns for path in paths}
    data = bytearray(before[paths[0].name])
    data[-1] ^= 1
    paths[0].write_bytes(data)
    paths[1].write_bytes(before[paths[1].name][:5000])
    paths[2].unlink()
    (folder / "index.json").unlink()
    (folder / ".x.h5.123-ab.part").write_bytes(b"left by a killed worker")
    result = run(corpus, folder, "--shard-size", "1M")
    assert result.exit_code == 0, result.output
    assert contents(folder) == before
    assert "were there already" in result.output
    assert [path for path in paths if path.stat().st_mtime_ns == times[path]] == paths[3:]


def test_another_configuration_over_the_same_folder_is_refused(
    corpus: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    assert run(corpus, tmp_path / "shards").exit_code == 0
    before = contents(tmp_path / "shards")
    result = run(corpus, tmp_path / "shards", "--hop", "256")
    assert result.exit_code == 1
    assert re.search(r"another configuration .*hop_samples was 128, now 256", result.output)
    assert contents(tmp_path / "shards") == before


def test_bad_tracks_are_named_and_the_others_go_on(
    corpus: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    write_track(corpus / "train" / "nan", 6)
    waveform = np.zeros((24000, 2), np.float32)
    waveform[12000] = np.nan
    soundfile.write(corpus / "train" / "nan" / "b.wav", waveform, RATE_HZ, "FLOAT")
    write_track(corpus / "train" / "loud", 6)
    soundfile.write(
        corpus / "train" / "loud" / "a.wav", np.full_like(waveform, 1e4), RATE_HZ, "FLOAT"
    )
    write_track(corpus / "train" / "short", 7, seconds=0.05)
    write_track(corpus / "train" / "uneven", 8)
    soundfile.write(corpus / "train" / "uneven" / "a.wav", waveform[:9000], RATE_HZ, "FLOAT")
    write_track(corpus / "train" / "stemless", 9)
    (corpus / "train" / "stemless" / "a.wav").unlink()
    write_track(corpus / "train" / "cut", 10)
    cut = corpus / "train" / "cut" / "a.wav"
    cut.write_bytes(cut.read_bytes()[:1000])
    result = run(corpus, tmp_path / "shards")
    assert result.exit_code == 1
    for expected in (
        "nan: .*b.wav.*(NaN|nan)",
        "loud: .*--stft-dtype float32",
        "short: .*0.05 s long, the teacher needs",
        "uneven: .*differ in length",
        "stemless: .*no file for a",
        "cut: .*a.wav",
    ):
        assert any(re.search(expected, line) for line in result.output.splitlines()), (
            f"{expected} not in {result.output}"
        )
    assert "failed   6 tracks" in result.output
    shards = Shards(tmp_path / "shards")
    assert [track.name for track in shards.tracks("train")] == ["one", "three", "two"]
    assert all(verdict.problem is None for verdict in verify_shards(tmp_path / "shards"))
    # mended, they join the others
    for name in ("nan", "loud", "cut"):
        shutil.rmtree(corpus / "train" / name)
        write_track(corpus / "train" / name, 11)
    assert run(corpus, tmp_path / "shards").exit_code == 1
    assert len(Shards(tmp_path / "shards").tracks("train")) == 6


@pytest.mark.parametrize("mixture", [True, False])
def test_audio_whose_peak_comes_late_is_decoded_twice(
    tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, mixture: bool
) -> None:
    """A test track of several blocks, beyond full scale at the end of one source."""
    folder = tmp_path / "corpus" / "test" / "loud"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    sources = rng.uniform(-0.4, 0.4, (2, 12 * RATE_HZ, 2)).astype(np.float32)
    sources[0, -RATE_HZ:] *= 10
    signals = dict(zip("ab", sources, strict=True))
    if mixture:
        signals["mixture"] = sources.sum(axis=0)
    for name, waveform in signals.items():
        soundfile.write(folder / f"{name}.wav", waveform, RATE_HZ, "FLOAT")
    for name in ("one", "two"):
        write_track(tmp_path / "corpus" / "train" / name, 1)
    decoded = []
    decode = track_module.decode
    monkeypatch.setattr(
        track_module,
        "decode",
        lambda source, **options: decoded.append(source.path) or decode(source, **options),
    )
    result = run(tmp_path / "corpus", tmp_path / "shards")
    assert result.exit_code == 0, result.output
    names = Counter(path.stem for path in decoded if path.parent.name == "loud")
    assert names == ({"mixture": 2, "a": 2, "b": 1} if mixture else {"a": 4, "b": 3})
    shards = Shards(tmp_path / "shards")
    (track,) = shards.tracks("test")
    for number, expected in enumerate((sources.sum(axis=0), *sources)):
        peak = float(np.abs(expected).max())
        scale = 1 / 32768 if peak <= 32767 / 32768 else peak / 32767
        stored = np.round(expected.T / np.float32(scale)).astype(np.int16)
        np.testing.assert_array_equal(shards.read(track, "audio", number), stored)
    assert all(verdict.problem is None for verdict in verify_shards(tmp_path / "shards"))


def test_a_second_run_over_one_folder_is_refused(
    corpus: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    (tmp_path / "shards").mkdir()
    with open(tmp_path / "shards" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run(corpus, tmp_path / "shards")
    assert "another run is writing into it" in result.output
    assert run(corpus, tmp_path / "shards").exit_code == 0


def test_shards_of_an_earlier_corpus_are_pointed_out(
    corpus: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    assert run(corpus, tmp_path / "shards").exit_code == 0
    (corpus / "valid" / "four").rename(corpus / "valid" / "renamed")
    result = run(corpus, tmp_path / "shards")
    assert result.exit_code == 0
    assert "belongs to no track of this corpus" in result.output
    assert [track.name for track in Shards(tmp_path / "shards").tracks("valid")] == ["renamed"]


def test_folders_of_others_are_refused(
    corpus: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.h5").write_bytes(b"")
    assert "holds *.h5 files but no config.json" in run(corpus, tmp_path / "other").output
    (tmp_path / "file").write_text("")
    assert "is a file; choose a folder" in run(corpus, tmp_path / "file").output


def command(corpus: Path, shards: Path, teacher: Path, *options: str) -> list[str]:
    program = [sys.executable, "-c", "from flsep.pipeline.cli import main; main()"]
    arguments = ["run", str(corpus), str(shards), "--teacher", str(teacher)]
    return [*program, *arguments, *OPTIONS, *options]


def one_line(process: "subprocess.CompletedProcess[str]") -> str:
    lines = [line for line in process.stderr.splitlines() if line.startswith("Error: ")]
    assert "Traceback" not in process.stderr
    assert len(lines) == 1, process.stderr
    return lines[0]


def test_a_write_that_fails_is_one_line_and_keeps_what_is_finished(
    corpus: Path, tmp_path: Path, tiny_teacher: Path, run: Callable[..., Result]
) -> None:
    write_track(corpus / "train" / "long", 12, seconds=20)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 20, 5 << 20))

    process = subprocess.run(
        command(corpus, tmp_path / "s", tiny_teacher, "--workers", "0", "--shard-size", "1M"),
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    assert "File too large" in one_line(process)
    assert list((tmp_path / "s").glob(".*.part")) == []
    assert not (tmp_path / "s" / "index.json").exists()
    assert run(corpus, tmp_path / "s", "--shard-size", "1M").exit_code == 0


def test_interrupted_runs_go_on(
    corpus: Path, tmp_path: Path, tiny_teacher: Path, run: Callable[..., Result]
) -> None:
    for number in range(12):
        write_track(corpus / "train" / f"more {number}", 20 + number, seconds=20)
    shards = tmp_path / "s"
    process = subprocess.Popen(
        command(corpus, shards, tiny_teacher, "--workers", "1", "--shard-size", "1M"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not list(shards.glob("*.h5")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does with Ctrl-C
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped; run the same command again to go on" in errors
    assert "Traceback" not in errors
    finished = {path: path.stat().st_mtime_ns for path in shards.glob("*.h5")}
    assert 1 <= len(finished) < 17
    assert not (shards / "index.json").exists()
    result = run(corpus, shards, "--shard-size", "1M")
    assert result.exit_code == 0, result.output
    assert f"({len(finished)} were there already)" in result.output
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def test_a_killed_worker_costs_its_task_only(
    corpus: Path, tmp_path: Path, tiny_teacher: Path, run: Callable[..., Result]
) -> None:
    for number in range(4):
        write_track(corpus / "train" / f"more {number}", 20 + number, seconds=20)
    shards = tmp_path / "s"
    process = subprocess.Popen(
        command(corpus, shards, tiny_teacher, "--workers", "1", "--shard-size", "1M"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not list(shards.glob(".*.h5.*.part")) and time.monotonic() < deadline:
        time.sleep(0.001)
    part, *_ = shards.glob(".*.h5.*.part")
    os.kill(int(part.name.split(".h5.")[1].split("-")[0]), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert run(corpus, tmp_path / "undisturbed", "--shard-size", "1M").exit_code == 0
    assert contents(tmp_path / "undisturbed").items() <= contents(shards).items()


def test_a_running_scheduler_is_used(
    corpus: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    settings = ClusterSettings(
        kind="local", min_workers=1, max_workers=1, worker_bytes=0, folder=tmp_path
    )
    with start_cluster(settings) as client:
        address = client.scheduler.address
        result = run(corpus, tmp_path / "s", "--scheduler", address)
    assert result.exit_code == 0, result.output
    assert f"1 at {address}" in result.output
    result = run(corpus, tmp_path / "t", "--scheduler", "tcp://127.0.0.1:1")
    assert "no Dask scheduler answers" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing", "out"], "nothing: no such folder"),
        (["plan", "nothing"], "nothing: no such folder"),
        (["run", ".", "out"], "empty folder"),
        (["verify", "."], "no index"),
        (["inspect", "."], "no index"),
        (["inspect", "nothing"], "no such shard"),
    ],
)
def test_nonsense_is_one_line(
    tmp_path: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    program = [sys.executable, "-c", "from flsep.pipeline.cli import main; main()"]
    process = subprocess.run([*program, *arguments], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert message in one_line(process)


def test_verify_inspect_and_plan_describe(
    corpus: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    assert run(corpus, tmp_path / "s").exit_code == 0
    runner = CliRunner()
    planned = runner.invoke(cli, ["plan", str(corpus), *OPTIONS])
    assert "tracks   5 (3 train, 1 valid, 1 test)" in planned.output
    result = runner.invoke(cli, ["verify", str(tmp_path / "s")])
    assert result.exit_code == 0
    assert "3 shards, 5 tracks" in result.output
    assert "all intact" in result.output
    path = next((tmp_path / "s").glob("test-*.h5"))
    for target in (path, tmp_path / "s"):
        shown = runner.invoke(cli, ["inspect", str(target)]).output
        assert 'Größe "5\'" ..' in shown
        assert "16000 Hz, 2 channels; STFT 512, hop 128, float16" in shown
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = runner.invoke(cli, ["verify", str(tmp_path / "s")])
    assert result.exit_code == 1
    assert str(path) in result.output
    assert "1 damaged" in result.output


def test_inline_execution_reports_errors_and_goes_on() -> None:
    def halve(number: int) -> int:
        if number % 2:
            raise ValueError(f"{number} is odd")
        return number // 2

    outcomes: list[Any] = list(run_inline(halve, [2, 3, 4]))
    assert [outcome.result for outcome in outcomes] == [1, None, 2]
    assert str(outcomes[1].error) == "3 is odd"
