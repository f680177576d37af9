import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from flsep.trainer.errors import AudioError
from flsep.trainer.inference.audio import WavWriters, read_blocks


def tones(rate_hz: int, num_samples: int, num_channels: int = 2) -> np.ndarray:
    time = np.arange(num_samples) / rate_hz
    frequencies = np.array([440.0, 1000.0])[:num_channels, None]
    return (0.5 * np.sin(2 * np.pi * frequencies * time)).astype(np.float32)


def read(path: Path, rate_hz: int = 8000, num_channels: int = 2) -> np.ndarray:
    blocks = list(read_blocks(path, sample_rate_hz=rate_hz, num_channels=num_channels))
    assert all(block.dtype == np.float32 for block in blocks)
    return np.concatenate(blocks, axis=1)


@pytest.mark.parametrize(
    ("name", "subtype", "tolerance"),
    [
        ("a.wav", "FLOAT", 0),
        ("a.wav", "PCM_16", 4e-5),
        ("a.flac", "PCM_24", 2e-7),
        ("a.aiff", "PCM_24", 2e-7),
        ("a.ogg", "VORBIS", 0.1),
    ],
)
def test_formats(tmp_path: Path, name: str, subtype: str, tolerance: float) -> None:
    waveform = tones(8000, 12345)
    soundfile.write(tmp_path / name, waveform.T, 8000, subtype=subtype)
    found = read(tmp_path / name)
    assert found.shape == waveform.shape
    np.testing.assert_allclose(found, waveform, atol=tolerance, rtol=0)


@pytest.mark.parametrize("rate_hz", [44100, 6000])
def test_other_rates_are_resampled_in_place(tmp_path: Path, rate_hz: int) -> None:
    soundfile.write(tmp_path / "a.wav", tones(rate_hz, 2 * rate_hz + 7).T, rate_hz, "FLOAT")
    found = read(tmp_path / "a.wav")
    assert abs(found.shape[1] - 16000) <= 16
    expected = tones(8000, found.shape[1])
    np.testing.assert_allclose(found[:, 100:-100], expected[:, 100:-100], atol=1e-4)


def test_mono_is_duplicated(tmp_path: Path) -> None:
    waveform = tones(8000, 5000, 1)
    soundfile.write(tmp_path / "a.wav", waveform.T, 8000, "FLOAT")
    assert (read(tmp_path / "a.wav") == np.repeat(waveform, 2, axis=0)).all()
    assert read(tmp_path / "a.wav", num_channels=1).shape == (1, 5000)


def test_other_channels_are_refused(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros((800, 3)), 8000)
    with pytest.raises(AudioError, match=r"has 3 channels, the separator takes 2 or mono; mix it"):
        read(tmp_path / "a.wav")
    soundfile.write(tmp_path / "b.wav", np.zeros((800, 2)), 8000)
    with pytest.raises(AudioError, match="has 2 channels, the separator takes 1 or mono"):
        read(tmp_path / "b.wav", num_channels=1)


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "text.wav").write_text("hello " * 100)
    (tmp_path / "empty.wav").touch()
    soundfile.write(tmp_path / "cut.wav", tones(8000, 40000).T, 8000)
    os.truncate(tmp_path / "cut.wav", 80000)
    soundfile.write(tmp_path / "cut.flac", tones(8000, 40000).T, 8000)
    os.truncate(tmp_path / "cut.flac", (tmp_path / "cut.flac").stat().st_size // 2)
    soundfile.write(tmp_path / "nothing.wav", np.zeros((0, 2)), 8000)
    soundfile.write(tmp_path / "nan.wav", np.full((100, 2), np.nan), 8000, "FLOAT")
    stereo, mono = tones(8000, 8000), tones(8000, 8000)[:1]
    for name, waveform in ("stereo", stereo), ("mono", mono):
        soundfile.write(tmp_path / f"{name}.flac", waveform.T, 8000)
    both = (tmp_path / "stereo.flac").read_bytes() + (tmp_path / "mono.flac").read_bytes()
    (tmp_path / "both.flac").write_bytes(both)
    for name, message in {
        "both.flac": "changes from .*'stereo'.* to .*'mono'.* in the middle",
        "text.wav": "cannot be decoded",
        "empty.wav": "cannot be decoded",
        "gone.wav": "cannot be decoded .No such file",
        "cut.wav": "holds 79992 of the 160036 bytes that it declares; cut short",
        "cut.flac": "cannot be decoded",
        "nothing.wav": "has no samples",
        "nan.wav": "holds NaN or infinity",
    }.items():
        with pytest.raises(AudioError, match=f"{name}: .*({message})") as caught:
            read(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_wavs_hold_what_exceeds_full_scale(tmp_path: Path) -> None:
    estimates = np.stack([tones(8000, 3000), 3 * tones(8000, 3000)])
    with WavWriters(
        tmp_path / "out", ["bass", "voice"], sample_rate_hz=8000, num_channels=2
    ) as writers:
        writers.write(estimates[..., :1000])
        writers.write(estimates[..., 1000:])
        assert list((tmp_path / "out").glob("*.wav")) == []  # not before all is there
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bass.wav", "voice.wav"]
    for name, estimate in zip(("bass", "voice"), estimates, strict=True):
        found, rate_hz = soundfile.read(tmp_path / "out" / f"{name}.wav", dtype="float32")
        assert rate_hz == 8000
        assert (estimate == found.T).all()


def test_a_failure_keeps_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "bass.wav").write_text("old")

    def fail(folder: Path) -> None:
        with WavWriters(folder, ["bass"], sample_rate_hz=8000, num_channels=1) as writers:
            writers.write(np.zeros((1, 1, 10), np.float32))
            raise RuntimeError("in between")

    for folder in (out, tmp_path / "new"):
        with pytest.raises(RuntimeError, match="in between"):
            fail(folder)
    assert [path.name for path in out.iterdir()] == ["bass.wav"]
    assert (out / "bass.wav").read_text() == "old"
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(AudioError, match=r"cannot write into .*file"):
        WavWriters(tmp_path / "file", ["bass"], sample_rate_hz=8000, num_channels=1)
