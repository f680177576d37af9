import os
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import soxr

from flsep.pipeline.corpus import media
from flsep.pipeline.corpus.media import AudioStream, MediaInfo, probe, probe_all
from flsep.pipeline.errors import MediaError

RATE_HZ = 44100


def decode(source: AudioStream, **options: int) -> np.ndarray:
    """Decode a whole stream: float32 [channel, sample]."""
    return np.concatenate(list(media.decode(source, **options)), axis=1)


def noise(num_samples: int, num_channels: int = 2, seed: int = 0) -> np.ndarray:
    """float32 [channel, sample], on the 16-bit grid, so that integer files hold it exactly."""
    rng = np.random.default_rng(seed)
    integers = rng.integers(-20000, 20000, (num_channels, num_samples))
    return (integers / 32768).astype(np.float32)


def write_sound(path: Path, waveform: np.ndarray, rate_hz: int = RATE_HZ, **options) -> AudioStream:
    soundfile.write(path, waveform.T, rate_hz, **options)
    return AudioStream(path)


def write_container(
    path: Path, waveform: np.ndarray, codec: str, rate_hz: int = RATE_HZ, **options
) -> AudioStream:
    layout = "mono" if len(waveform) == 1 else "stereo"
    with av.open(str(path), "w", **options) as container:
        stream = container.add_stream(codec, rate=rate_hz, layout=layout)
        frame = av.AudioFrame.from_ndarray(waveform, format="fltp", layout=layout)
        frame.sample_rate = rate_hz
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return AudioStream(path)


def cut(path: Path, fraction: float) -> AudioStream:
    data = path.read_bytes()
    shorter = path.with_name(f"cut-{path.name}")
    shorter.write_bytes(data[: int(fraction * len(data))])
    return AudioStream(shorter)


# --- the real thing -------------------------------------------------------------------------------


@pytest.mark.usefixtures("ffmpeg_on_path")
def test_decodes_the_samples_that_stempeg_reads(example_track):
    import stempeg

    expected, rate_hz = stempeg.read_stems(str(example_track))
    assert rate_hz == RATE_HZ
    for index in range(5):
        waveform = decode(AudioStream(example_track, index))
        assert waveform.dtype == np.float32
        np.testing.assert_allclose(waveform, expected[index].T, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("ffmpeg_on_path")
@pytest.mark.parametrize(
    ("name", "codec", "num_samples"),
    [
        ("a.m4a", "aac", 50000),
        ("a.m4a", "aac", 200),
        ("a.m4a", "alac", 50000),
        ("a.mp3", "libmp3lame", 50000),
    ],
)
def test_trims_priming_as_the_ffmpeg_program_does(tmp_path, name, codec, num_samples):
    source = write_container(tmp_path / name, 0.5 * noise(num_samples), codec)
    command = ["ffmpeg", "-v", "error", "-i", str(source.path), "-f", "f32le", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    expected = np.frombuffer(raw, np.float32).reshape(-1, 2).T
    waveform = decode(source)
    np.testing.assert_allclose(waveform, expected, rtol=0, atol=1e-6)
    declared = probe(source)
    assert (declared.sample_rate_hz, declared.num_channels, declared.num_streams) == (RATE_HZ, 2, 1)
    assert abs(declared.num_samples - waveform.shape[1]) <= 2048


def test_probes_the_example_track(example_track):
    expected = MediaInfo(RATE_HZ, 2, 268288, 5)
    assert probe_all([AudioStream(example_track, k) for k in (4, 0)]) == [expected, expected]
    assert probe(AudioStream(example_track)) == expected


def test_holds_a_block_at_a_time(tmp_path, example_track):
    path = tmp_path / "ten-minutes.mp4"
    with av.open(str(example_track)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.audio[1])
        packets = [bytes(p) for p in source.demux(source.streams.audio[1]) if p.size]
        for index in range(100 * len(packets)):
            packet = av.Packet(packets[index % len(packets)])
            packet.stream, packet.time_base = stream, Fraction(1, RATE_HZ)
            packet.pts = packet.dts = 1024 * index
            packet.duration = 1024
            target.mux(packet)
    tracemalloc.start()
    try:
        blocks = [block.shape for block in media.decode(AudioStream(path))]
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(num_samples for _, num_samples in blocks) == 26_828_800  # 608 s
    block_bytes = max(num_channels * num_samples * 4 for num_channels, num_samples in blocks)
    assert block_bytes == 2 * 65536 * 4
    assert peak_bytes < 8 * block_bytes


# --- plain sound files ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.wav", "a.FLAC", "a.aiff"])
def test_reads_plain_files_exactly(tmp_path, name):
    waveform = noise(100_001)
    source = write_sound(tmp_path / name, waveform)
    assert probe(source) == MediaInfo(RATE_HZ, 2, 100_001, 1)
    np.testing.assert_array_equal(decode(source), waveform)


def test_reads_ogg(tmp_path):
    time = np.arange(RATE_HZ) / RATE_HZ
    sine = np.tile(0.5 * np.sin(2 * np.pi * 440 * time), (2, 1)).astype(np.float32)
    waveform = decode(write_sound(tmp_path / "a.ogg", sine))
    assert waveform.shape == sine.shape
    assert np.abs(waveform - sine).max() < 0.05


def test_duplicates_mono(tmp_path):
    mono = noise(5000, num_channels=1)
    for source in (
        write_sound(tmp_path / "a.wav", mono),
        write_container(tmp_path / "a.m4a", mono, "alac"),
    ):
        waveform = decode(source)
        np.testing.assert_array_equal(waveform, np.repeat(mono, 2, axis=0))
        np.testing.assert_array_equal(decode(source, num_channels=1), mono)


@pytest.mark.parametrize(
    ("rate_hz", "num_samples"), [(48000, 150_000), (22050, 70_000), (96000, 7)]
)
def test_resamples_in_blocks_as_soxr_does_at_once(tmp_path, rate_hz, num_samples):
    waveform = noise(num_samples)
    source = write_sound(tmp_path / "a.wav", waveform, rate_hz)
    expected = soxr.resample(waveform.T, rate_hz, RATE_HZ, quality="HQ").T
    np.testing.assert_array_equal(decode(source), expected)
    assert expected.shape[1] == int(num_samples * RATE_HZ / rate_hz + 0.5)
    np.testing.assert_array_equal(decode(source, sample_rate_hz=rate_hz), waveform)


def test_resamples_a_sine_to_that_sine(tmp_path):
    time = np.arange(48000) / 48000
    sine = (0.5 * np.sin(2 * np.pi * 997 * time)).astype(np.float32)
    source = write_sound(tmp_path / "a.wav", sine[None], 48000, subtype="FLOAT")
    expected = 0.5 * np.sin(2 * np.pi * 997 * np.arange(RATE_HZ) / RATE_HZ)
    inner = slice(500, -500)
    waveform = decode(source, num_channels=1)
    np.testing.assert_allclose(waveform[0, inner], expected[inner], rtol=0, atol=1e-4)


# --- bad input ------------------------------------------------------------------------------------


def test_refuses_a_missing_file(tmp_path):
    for name in ("a.wav", "a.mp4"):
        with pytest.raises(MediaError, match=rf"{name}: no such file"):
            probe(AudioStream(tmp_path / name))


@pytest.mark.parametrize("name", ["a.wav", "a.stem.mp4"])
def test_refuses_an_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(MediaError, match=rf"{name}: is an empty file"):
        probe(AudioStream(tmp_path / name))


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp4", "a.mp3"])
def test_refuses_what_is_no_audio(tmp_path, name, capfd):
    (tmp_path / name).write_bytes(b"not audio at all" * 100)
    with pytest.raises(MediaError, match=rf"{name}: cannot be decoded \(.+\); damaged or no audio"):
        decode(AudioStream(tmp_path / name))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fraction", [0.02, 0.3, 0.5, 0.9])
def test_refuses_a_cut_stem_file(tmp_path, example_track, fraction, capfd):
    (tmp_path / "whole.mp4").write_bytes(example_track.read_bytes())
    source = cut(tmp_path / "whole.mp4", fraction)
    for attempt in (probe, decode):
        with pytest.raises(MediaError, match=r"cut-whole.mp4: (holds .* cut short|cannot be dec)"):
            attempt(source)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp3", "libmp3lame", {}),
        ("a.mkv", "aac", {}),
        ("a.mp4", "aac", {"options": {"movflags": "frag_keyframe", "frag_duration": "100000"}}),
    ],
)
def test_refuses_other_cut_containers(tmp_path, name, codec, options, capfd):
    waveform = 0.5 * noise(5 * RATE_HZ)
    source = write_container(tmp_path / name, waveform, codec, **options)
    assert abs(decode(source).shape[1] - 5 * RATE_HZ) <= 2048
    with pytest.raises(MediaError, match=r"(only \d+ of the \d+ samples|its index reaches)"):
        decode(cut(source.path, 0.5))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["a.wav", "a.aiff"])
def test_refuses_a_cut_sound_file(tmp_path, name):
    source = cut(write_sound(tmp_path / name, noise(5000)).path, 0.5)
    with pytest.raises(MediaError, match=r"holds \d+ of the \d+ bytes that its header declares"):
        probe(source)


def test_refuses_a_cut_flac(tmp_path):
    with pytest.raises(MediaError, match=r"cut-a.flac: (cannot be decoded|holds only)"):
        decode(cut(write_sound(tmp_path / "a.flac", noise(50000)).path, 0.5))


def test_reads_a_wav_of_unknown_size_as_pipes_write_it(tmp_path):
    waveform = noise(500)
    source = write_sound(tmp_path / "a.wav", waveform)
    data = bytearray(source.path.read_bytes())
    data[4:8] = data[40:44] = b"\xff" * 4  # RIFF and data sizes
    source.path.write_bytes(data)
    np.testing.assert_array_equal(decode(source), waveform)


def test_refuses_too_few_streams(example_track, tmp_path):
    with pytest.raises(MediaError, match=r"has 5 audio streams, expected at least 6"):
        decode(AudioStream(example_track, 5))
    write_sound(tmp_path / "a.wav", noise(100))
    with pytest.raises(MediaError, match=r"a.wav: has 1 audio streams, expected at least 2"):
        probe(AudioStream(tmp_path / "a.wav", 1))


def test_refuses_zero_samples(tmp_path):
    with pytest.raises(MediaError, match=r"a.wav: has no samples"):
        probe(write_sound(tmp_path / "a.wav", noise(0)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 99_999])
def test_refuses_samples_that_are_not_finite(tmp_path, bad, place):
    waveform = noise(100_000)
    waveform[1, place] = bad
    source = write_sound(tmp_path / "a.wav", waveform, subtype="FLOAT")
    with pytest.raises(MediaError, match=r"a.wav: holds NaN or infinite samples"):
        decode(source)


def test_refuses_other_channel_counts(tmp_path):
    source = write_sound(tmp_path / "a.wav", noise(100, num_channels=3))
    with pytest.raises(MediaError, match=r"a.wav: has 3 channels, expected 2 or 1"):
        decode(source)
    assert decode(source, num_channels=3).shape == (3, 100)
    with pytest.raises(MediaError, match=r"has 3 channels, expected 1"):
        decode(source, num_channels=1)


def test_refuses_a_header_that_declares_the_moon(tmp_path):
    source = write_sound(tmp_path / "a.flac", noise(5000))
    data = bytearray(source.path.read_bytes())
    data[21] |= 0x0F  # the 36-bit number of samples in STREAMINFO
    data[22:26] = b"\xff" * 4
    source.path.write_bytes(data)
    with pytest.raises(MediaError, match=r"a.flac: (declares|holds only|cannot be decoded)"):
        decode(source)


def test_keeps_libav_quiet_in_a_process_of_its_own(tmp_path, example_track):
    data = bytearray(example_track.read_bytes())
    data[400_000:400_400] = bytes(400)  # damaged frames in the middle
    (tmp_path / "damaged.mp4").write_bytes(data)
    program = (
        "import sys; from pathlib import Path; from flsep.pipeline.corpus.media import *\n"
        "for k in range(5):\n"
        "    try: list(decode(AudioStream(Path(sys.argv[1]), k)))\n"
        "    except MediaError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "damaged.mp4")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=True)
    assert done.stderr == ""
    assert "damaged.mp4: cannot be decoded" in done.stdout


def test_a_file_is_opened_once_for_all_its_streams(
    example_track: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    library_open = av.open
    monkeypatch.setattr(
        av, "open", lambda *args, **options: opened.append(args) or library_open(*args, **options)
    )
    infos = media.probe_all([AudioStream(example_track, stream) for stream in range(5)])
    assert {info.num_samples for info in infos} == {268288}
    assert opened == [(str(example_track),)]
