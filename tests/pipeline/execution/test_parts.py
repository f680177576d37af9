"""Parts of a run, their index, and what a rerun does about tracks that failed."""

import fcntl
import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result

from flsep.cache import Shards
from flsep.pipeline.cli import cli
from flsep.pipeline.config import FeatureConfig
from flsep.pipeline.corpus.tracks import find_corpus
from flsep.pipeline.execution.parts import tasks_of_part
from flsep.pipeline.execution.stage import run_stage
from flsep.pipeline.shards import track as track_module
from flsep.pipeline.shards.plan import ShardTask, plan_shards
from flsep.pipeline.shards.run import shards_stage
from flsep.pipeline.shards.settings import ShardSettings
from flsep.pipeline.teachers.loading import load_teacher

RATE_HZ = 16000
OPTIONS = ["--sample-rate", str(RATE_HZ), "--n-fft", "512", "--hop", "128", "--sources", "a,b"]


def write_track(folder: Path, seed: int, seconds: float = 3.0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for name in ("a", "b", "mixture"):
        waveform = rng.uniform(-0.4, 0.4, (int(seconds * RATE_HZ), 2))
        soundfile.write(folder / f"{name}.wav", waveform, RATE_HZ)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for number in range(6):
        write_track(tmp_path / "corpus" / "train" / f"t{number}", number, 3 + number / 10)
    return tmp_path / "corpus"


@pytest.fixture
def run(tiny_teacher: Path) -> Callable[..., Result]:
    """Run ``flsep-precompute run`` in this process; a shard a track."""

    def run(corpus: Path, shards: Path, *options: str) -> Result:
        arguments = ["run", str(corpus), str(shards), "--teacher", str(tiny_teacher), *OPTIONS]
        arguments += ["--workers", "0", "--shard-size", "1M", *options]
        return CliRunner().invoke(cli, arguments)

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.h5")}


def test_parts_by_hand() -> None:
    tasks = [ShardTask(f"{size}", (), size) for size in (9, 7, 6, 5, 4, 1)]
    # each to the one with least: 9 | 7 | 7+6=13 | 9+5=14 | 13+4=17 | 14+1=15
    shares = [[task.num_bytes for task in tasks_of_part(tasks, part, 2)] for part in (1, 2)]
    assert shares == [[9, 5, 1], [7, 6, 4]]
    assert tasks_of_part(tasks, 1, 1) == tuple(tasks)
    assert tasks_of_part(tasks[:1], 2, 2) == ()
    for part in (0, 3):
        with pytest.raises(ValueError, match=rf"--part {part}/2: expected a part from 1 to 2"):
            tasks_of_part(tasks, part, 2)


def test_parts_make_what_one_run_makes(
    corpus: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    assert run(corpus, tmp_path / "whole").exit_code == 0
    folder = tmp_path / "parts"
    for part in (2, 3):
        result = run(corpus, folder, "--part", f"{part}/3")
        assert result.exit_code == 0, result.output
        assert f"part     {part} of 3: 2 shards" in result.output
        assert "--finalise" in result.output
    assert not (folder / "index.json").exists()
    missing = run(corpus, folder, "--finalise")
    assert missing.exit_code == 1
    message = missing.output
    assert "2 of 6 shards are not there" in message
    whole = Shards(tmp_path / "whole").index
    absent = [track for track in whole.tracks if not (folder / track.shard).exists()]
    assert len(absent) == 2
    for track in absent:
        assert track.shard in message
        assert repr(track.name) in message
    assert not (folder / "index.json").exists()
    (folder / ".x.h5.123-ab.part").write_bytes(b"left by a killed worker")
    assert run(corpus, folder, "--part", "1/3").exit_code == 0
    assert (folder / ".x.h5.123-ab.part").exists()  # it might be another part's
    assert run(corpus, folder, "--finalise").exit_code == 0
    assert contents(folder) == contents(tmp_path / "whole")


def test_finalise_wants_shards_that_hold(
    corpus: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    folder = tmp_path / "s"
    assert "no part has run here" in run(corpus, folder, "--finalise").output
    assert run(corpus, folder, "--part", "1/1").exit_code == 0
    path = sorted(folder.glob("*.h5"))[0]
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: " in run(corpus, folder, "--finalise").output
    result = run(corpus, folder, "--finalise", "--hop", "64")
    assert "another configuration" in result.output
    assert "leave out --part" in run(corpus, folder, "--finalise", "--repair").output


def test_parts_run_at_once_but_not_beside_a_whole_run(
    corpus: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as a part does
        assert run(corpus, folder, "--part", "1/2").exit_code == 0
        for options in ([], ["--finalise"], ["--repair"]):
            refused = run(corpus, folder, *options)
            assert "another run is writing into it" in refused.output
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = run(corpus, folder, "--part", "2/2")
        assert "another run is writing into it" in refused.output


def test_a_file_system_without_locks_is_named(
    corpus: Path, tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    result = run(corpus, tmp_path / "s")
    assert "its file system cannot lock files (Operation not supported)" in result.output


def test_the_same_part_twice_at_once_corrupts_nothing(
    corpus: Path,
    tmp_path: Path,
    run: Callable[..., Result],
    tiny_teacher: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a file system whose locks do not reach other machines."""
    assert run(corpus, tmp_path / "whole").exit_code == 0
    folder = tmp_path / "s"
    meet = threading.Barrier(2)
    decode = track_module.decode

    def meeting(source, **options):  # both begin each signal together
        meet.wait(30)
        return decode(source, **options)

    monkeypatch.setattr(track_module, "decode", meeting)
    config = FeatureConfig(sample_rate_hz=RATE_HZ, n_fft=512, hop_samples=128)
    found = find_corpus(corpus, sources=["a", "b"])
    plan = plan_shards(found, config, shard_bytes=1 << 20)
    settings = ShardSettings(
        folder=folder,
        config=config,
        sources=found.sources,
        teacher=load_teacher(tiny_teacher).info,
        teacher_folder=tiny_teacher,
        num_threads=None,
    )
    stage = shards_stage(plan, settings)
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(run_stage, stage, plan.tasks, is_part=True) for _ in range(2)]
    summaries = [run.result() for run in runs]
    assert [summary.num_made for summary in summaries] == [6, 6]
    monkeypatch.undo()
    assert run(corpus, folder, "--finalise").exit_code == 0
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_failed_track_is_tried_again_when_its_files_change(
    corpus: Path, tmp_path: Path, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = corpus / "train" / "t2" / "b.wav"
    shutil.copytree(corpus, tmp_path / "whole corpus")
    waveform, _ = soundfile.read(bad)
    waveform[100] = np.nan
    soundfile.write(bad, waveform, RATE_HZ, "FLOAT")
    folder = tmp_path / "s"
    tried = []
    decode = track_module.decode
    monkeypatch.setattr(
        track_module,
        "decode",
        lambda source, **options: tried.append(source) or decode(source, **options),
    )
    first = run(corpus, folder, "--shard-size", "1G")
    assert first.exit_code == 1
    assert "t2: " in first.output
    before, made = contents(folder), times(folder)
    assert len(made) == 2  # train and valid
    tried.clear()
    for options in ([], ["--part", "1/1"], ["--finalise"]):
        again = run(corpus, folder, "--shard-size", "1G", *options)
        assert again.exit_code == 1
        assert "NaN" in again.output
        assert times(folder) == made
        assert contents(folder) == before
    assert tried == []
    repaired = run(corpus, folder, "--shard-size", "1G", "--repair")
    assert repaired.exit_code == 1
    assert str(bad) in map(str, tried)
    assert contents(folder) == before
    soundfile.write(bad, np.nan_to_num(waveform), RATE_HZ, "FLOAT")
    mended = run(corpus, folder, "--shard-size", "1G")
    assert mended.exit_code == 0, mended.output
    assert "renewed" in mended.output
    assert len(Shards(folder).index.tracks) == 6
    assert not list(folder.glob("*.failed.json"))


def test_finalise_counts_tracks_that_failed_alone_in_their_shard(
    corpus: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    waveform = np.full((3 * RATE_HZ, 2), np.inf)
    for name in ("a", "b", "mixture"):
        soundfile.write(corpus / "train" / "t0" / f"{name}.wav", waveform, RATE_HZ, "FLOAT")
    folder = tmp_path / "s"
    codes = [run(corpus, folder, "--part", f"{part}/2").exit_code for part in (1, 2)]
    assert sorted(codes) == [0, 1]
    result = run(corpus, folder, "--finalise")
    assert result.exit_code == 1
    assert "failed   1 tracks" in result.output
    assert [track.name for track in Shards(folder).index.tracks if track.name == "t0"] == []
    record = next(folder.glob("*.failed.json"))
    for text in ("{", json.dumps({"t0": 1}), "[]"):
        record.write_text(text)
        assert f"{record}: not readable" in run(corpus, folder, "--finalise").output
        assert f"{record}: not readable" in run(corpus, folder).output


def test_repair_makes_damaged_shards_again_and_says_so(
    corpus: Path, tmp_path: Path, run: Callable[..., Result]
) -> None:
    folder = tmp_path / "s"
    assert run(corpus, folder).exit_code == 0
    before, made = contents(folder), times(folder)
    path = sorted(folder.glob("*.h5"))[2]
    data = bytearray(before[path.name])
    data[-1] ^= 1
    path.write_bytes(data)
    result = run(corpus, folder, "--repair")
    assert result.exit_code == 0, result.output
    assert f"renewed  {path}: " in result.output
    assert "does not have its digest" in result.output
    assert contents(folder) == before
    assert {name for name, time in times(folder).items() if time != made[name]} == {path.name}
