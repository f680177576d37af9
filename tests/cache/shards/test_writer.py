import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flsep.cache import Layout, ShardFile, ShardWriter, TrackPlan, remove_leftovers
from flsep.cache.files import write_json
from flsep.cache.shards import track_writer
from flsep.cache.shards.track_writer import TrackWriter

PLAN = TrackPlan(name="x", split="train", num_samples=100, num_windows=5, with_audio=False)


def one_track(
    layout: Layout, folder: Path, action: Callable[[TrackWriter], None], with_audio: bool = False
) -> None:
    plan = replace(PLAN, with_audio=with_audio)
    with ShardWriter(folder / "a.h5", layout, [plan], config={}, packages={}) as shard:
        action(shard.tracks[0])


def test_the_same_content_gives_the_same_bytes(
    tmp_path: Path, write_shard: Callable[..., Path], track_arrays: Callable[..., dict[str, Any]]
) -> None:
    first = write_shard(tmp_path / "a.h5", {"x": ("test", track_arrays(1))})
    second = write_shard(tmp_path / "b.h5", {"x": ("test", track_arrays(1))})
    assert first.read_bytes() == second.read_bytes()


def test_an_exception_leaves_no_file(tmp_path: Path, layout: Layout) -> None:
    writer = ShardWriter(tmp_path / "a.h5", layout, [PLAN], config={}, packages={})
    with pytest.raises(RuntimeError, match="boom"), writer:
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rewrite_keeps_the_old_shard(
    tmp_path: Path,
    layout: Layout,
    write_shard: Callable[..., Path],
    track_arrays: Callable[..., dict[str, Any]],
) -> None:
    path = write_shard(tmp_path / "a.h5", {"x": ("train", track_arrays(1))})
    before = path.read_bytes()

    def omit_activity(track: Any) -> None:
        for entry in range(3):
            track.append("stft", entry, np.zeros((7, 2, 33, 2)))
            track.append("embedding", entry, np.zeros((5, 3)))

    with pytest.raises(ValueError, match=r"activity\[0\] has 0 of 5 rows"):
        one_track(layout, tmp_path, omit_activity)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_writer_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from flsep.cache import Layout, ShardWriter, TrackPlan
layout = Layout(sample_rate_hz=8000, num_channels=2, n_fft=64, hop_samples=16,
    stft_dtype="float16", sources=("x",), teacher="t", teacher_digest="", embedding_size=3,
    window_seconds=0.1, window_hop_seconds=0.1)
plan = TrackPlan(name="x", split="train", num_samples=10**6, num_windows=5, with_audio=False)
with ShardWriter(Path({str(tmp_path)!r}) / "a.h5", layout, [plan], config={{}}, packages={{}}):
    print("writing", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    leftovers = list(tmp_path.iterdir())
    assert len(leftovers) == 1
    assert leftovers[0].name.startswith(".a.h5.")
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda t: t.append("stft", 0, np.zeros((8, 2, 33, 2))), "does not fit"),
        (lambda t: t.append("stft", 0, np.zeros((7, 1, 33, 2))), "does not fit"),
        (lambda t: t.append("stft", 0, np.full((7, 2, 33, 2), np.nan)), "NaN or infinity"),
        (lambda t: t.append("embedding", 2, np.full((5, 3), np.inf)), "NaN or infinity"),
        (lambda t: None, "has 0 of"),
    ],
)
def test_wrong_content_is_refused(
    layout: Layout, tmp_path: Path, action: Callable[[Any], None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        one_track(layout, tmp_path, action)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"num_samples": 0}, {"num_windows": 0}, {"split": "exam"}])
def test_impossible_tracks_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"samples|split is 'exam'"):
        replace(PLAN, **change)


def test_a_full_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = replace(PLAN, num_samples=10**15)
    with (
        pytest.raises(OSError, match=r"No space left on device: .*a\.h5"),
        ShardWriter(tmp_path / "a.h5", layout, [huge], config={}, packages={}),
    ):
        pass
    assert list(tmp_path.iterdir()) == []

    def refuse(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match=r"No space left on device: .*a\.h5"):
        one_track(layout, tmp_path, lambda track: None)
    assert list(tmp_path.iterdir()) == []


def test_audio_beyond_full_scale_is_scaled_not_clipped(
    tmp_path: Path, write_shard: Callable[..., Path], track_arrays: Callable[..., dict[str, Any]]
) -> None:
    arrays = track_arrays(3)
    arrays["audio"][0] *= 10
    arrays["audio"][1] *= 0.1
    shard = ShardFile(write_shard(tmp_path / "a.h5", {"x": ("test", arrays)}))
    assert shard.tracks[0].audio_scale[1] == 1 / 32768
    loud = shard.read(0, "audio", 0, verify=True) * shard.tracks[0].audio_scale[0]
    np.testing.assert_allclose(loud, arrays["audio"][0], atol=15 / 32767)
    assert np.abs(loud).max() > 14


@pytest.mark.parametrize("size", [1, 7, 100])
def test_audio_in_blocks_gives_the_same_bytes(
    tmp_path: Path,
    layout: Layout,
    write_shard: Callable[..., Path],
    track_arrays: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    size: int,
) -> None:
    arrays = track_arrays(1)
    arrays["audio"] /= 2
    arrays["audio"][0, :, -1] = 3.0
    arrays["audio"][1, :, 0] = 2.0
    whole = write_shard(tmp_path / "a.h5", {"x": ("test", arrays)})
    append = TrackWriter.append_audio
    passes = []

    def in_blocks(track: TrackWriter, signal: int, waveform: Any) -> None:
        passes.append(signal)
        for start in range(0, waveform.shape[1], size):
            append(track, signal, np.asfortranarray(waveform[:, start : start + size]))
        append(track, signal, waveform[:, :0])
        if track.needs_audio_again(signal):
            in_blocks(track, signal, waveform)

    monkeypatch.setattr(TrackWriter, "append_audio", in_blocks)
    monkeypatch.setattr(track_writer, "_BYTES_AT_ONCE", 33)
    blocks = write_shard(tmp_path / "b.h5", {"x": ("test", arrays)})
    assert blocks.read_bytes() == whole.read_bytes()
    assert sorted(tmp_path.iterdir()) == [whole, blocks]
    assert passes == [0, 0, 1, 2]  # only the signal whose peak comes late takes two passes


def test_audio_beyond_full_scale_is_stored_as_by_hand(
    tmp_path: Path, write_shard: Callable[..., Path], track_arrays: Callable[..., dict[str, Any]]
) -> None:
    arrays = track_arrays(3)
    arrays["audio"][0] *= 10
    shard = ShardFile(write_shard(tmp_path / "a.h5", {"x": ("test", arrays)}))
    scale = float(np.abs(arrays["audio"][0]).max()) / 32767
    assert shard.tracks[0].audio_scale[0] == scale
    expected = np.round(arrays["audio"][0] / np.float32(scale)).astype(np.int16)
    np.testing.assert_array_equal(shard.read(0, "audio", 0, verify=True), expected)


def test_audio_that_was_not_appended_again_is_missed(tmp_path: Path, layout: Layout) -> None:
    def append(track: TrackWriter) -> None:
        for entry in range(3):
            track.append("stft", entry, np.zeros((7, 2, 33, 2)))
            track.append_embedding(entry, np.zeros((5, 3), "f4"), np.zeros(5, "f4"))
            assert not track.needs_audio_again(entry)
            for level in (0.5, 1.5):
                track.append_audio(entry, np.full((2, 50), level, np.float32))
            assert track.needs_audio_again(entry)
        for entry in range(2):
            track.append("magnitude_moments", entry, np.zeros(33))

    with pytest.raises(ValueError, match=r"audio\[0\] has 0 of 2 rows"):
        one_track(layout, tmp_path, append, with_audio=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 60), (2, 60)], r"\(2, 60\) at sample 60 of audio\[1\] does not fit \(3, 2, 100\)"),
        ([(1, 60)], r"block \(1, 60\) at sample 0 of audio\[1\] does not fit"),
    ],
)
def test_audio_that_does_not_fit_is_refused(
    tmp_path: Path, layout: Layout, shapes: list[tuple[int, int]], message: str
) -> None:
    def append(track: TrackWriter) -> None:
        for shape in shapes:
            track.append_audio(1, np.zeros(shape, np.float32))

    with pytest.raises(ValueError, match=message):
        one_track(layout, tmp_path, append, with_audio=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_not_finite_is_refused_in_any_precision(
    tmp_path: Path, layout: Layout, value: float, dtype: type
) -> None:
    block = np.full((7, 2, 33, 2), np.finfo(np.float16).min, dtype)
    layout = replace(layout, stft_dtype=np.dtype(dtype).name)
    block[6, 1, 32, 1] = value
    with pytest.raises(ValueError, match=r"stft\[2\] would hold NaN or infinity from row 0"):
        one_track(layout, tmp_path, lambda track: track.append("stft", 2, block))


def test_16_bit_audio_is_kept_exactly(
    tmp_path: Path, write_shard: Callable[..., Path], track_arrays: Callable[..., dict[str, Any]]
) -> None:
    arrays = track_arrays(3)
    samples = np.random.default_rng(0).integers(-32767, 32768, arrays["audio"].shape)
    arrays["audio"] = (samples / 32768).astype(np.float32)
    shard = ShardFile(write_shard(tmp_path / "a.h5", {"x": ("test", arrays)}))
    np.testing.assert_array_equal(shard.read(0, "audio", 2, verify=True), samples[2])


def test_json_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"ü": 1})
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert path.read_text(encoding="utf-8") == '{\n "ü": 1\n}\n'
    assert list(tmp_path.iterdir()) == [path]
