"""The quick look at headers says what FFmpeg and libsndfile say, or leaves the file to them."""

import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from flsep.pipeline.corpus import media
from flsep.pipeline.corpus.headers import read_header
from flsep.pipeline.corpus.media import AudioStream, probe, probe_all
from flsep.pipeline.corpus.tracks import find_corpus
from flsep.pipeline.errors import MediaError


def write_container(
    path: Path,
    num_samples: int = 5000,
    *,
    codec: str = "aac",
    rate_hz: int = 44100,
    layout: str = "stereo",
    num_streams: int = 1,
    with_video: bool = False,
    **options: str,
) -> Path:
    rng = np.random.default_rng(num_samples)
    with av.open(str(path), "w", options=options) as container:
        if with_video:
            video = container.add_stream("mpeg4", rate=10)
            video.width = video.height = 32
            picture = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        streams = [
            container.add_stream(codec, rate=rate_hz, layout=layout) for _ in range(num_streams)
        ]
        if with_video:
            container.mux([*video.encode(picture), *video.encode(None)])
        for stream in streams:
            channels = stream.codec_context.channels
            noise = rng.uniform(-0.1, 0.1, (channels, num_samples)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout=layout)
            frame.sample_rate = rate_hz
            frames = av.AudioResampler(format=stream.codec_context.format).resample(frame)
            for encoded in [*frames, None]:
                container.mux(stream.encode(encoded))
    return path


@pytest.fixture
def by_library(monkeypatch: pytest.MonkeyPatch) -> Callable[[AudioStream], object]:
    """Probe with the decoder's library alone; return what it says, or its error's text."""

    def run(source: AudioStream) -> object:
        with monkeypatch.context() as patch:
            patch.setattr(media, "read_header", lambda path: None)
            return outcome(source)

    return run


def outcome(source: AudioStream) -> object:
    try:
        return probe(source)
    except MediaError as error:
        return str(error)


@pytest.mark.parametrize("num_samples", [1, 1024, 5000, 44100, 200000])
@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}], ids=["end", "start"])
@pytest.mark.parametrize(("layout", "rate_hz"), [("stereo", 44100), ("mono", 48000)])
def test_says_what_ffmpeg_says(
    tmp_path: Path,
    num_samples: int,
    options: dict[str, str],
    layout: str,
    rate_hz: int,
    by_library: Callable[[AudioStream], object],
) -> None:
    path = write_container(
        tmp_path / "x.m4a", num_samples, layout=layout, rate_hz=rate_hz, num_streams=2, **options
    )
    headers = read_header(path)
    assert headers is not None
    assert len(headers) == 2
    for stream in range(2):
        source = AudioStream(path, stream)
        assert probe(source) == by_library(source)


def test_says_what_ffmpeg_says_of_the_real_track(
    example_track: Path, by_library: Callable[[AudioStream], object]
) -> None:
    assert read_header(example_track) == 5 * ((44100, 2, 268288),)
    for stream in range(6):  # there is no sixth
        source = AudioStream(example_track, stream)
        assert outcome(source) == by_library(source)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fragments.mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("low rate.m4a", {"rate_hz": 22050}),
        ("surround.m4a", {"layout": "5.1"}),
        ("lossless.m4a", {"codec": "alac"}),
        ("x.mp3", {"codec": "libmp3lame"}),
        ("x.wav", {"codec": "pcm_alaw"}),
        ("x.flac", {"codec": "flac"}),
    ],
)
def test_leaves_other_forms_to_the_libraries(
    tmp_path: Path, name: str, options: dict[str, str], by_library: Callable[[AudioStream], object]
) -> None:
    path = write_container(tmp_path / name, **options)  # type: ignore[arg-type]
    assert read_header(path) is None
    assert probe(AudioStream(path)) == by_library(AudioStream(path))


def test_counts_audio_streams_only(
    tmp_path: Path, by_library: Callable[[AudioStream], object]
) -> None:
    path = write_container(tmp_path / "x.mp4", with_video=True)
    assert read_header(path) is not None
    assert probe(AudioStream(path)) == by_library(AudioStream(path))


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("form", ["WAV", "WAVEX", "RF64"])
@pytest.mark.parametrize("num_channels", [1, 2, 3])
def test_says_what_libsndfile_says(
    tmp_path: Path,
    subtype: str,
    form: str,
    num_channels: int,
    by_library: Callable[[AudioStream], object],
) -> None:
    path = tmp_path / "x.wav"
    soundfile.write(path, np.zeros((333, num_channels)), 32000, subtype, format=form)
    assert (read_header(path) is None) == (form == "RF64")
    assert probe(AudioStream(path)) == by_library(AudioStream(path))
    data = path.read_bytes()
    tagged = data[:12] + b"LIST\x05\x00\x00\x00INFO!\0" + data[12:]
    path.write_bytes(tagged[:4] + (len(tagged) - 8).to_bytes(4, "little") + tagged[8:])
    assert outcome(AudioStream(path)) == by_library(AudioStream(path))


@pytest.mark.parametrize("name", ["x.wav", "x.m4a", "late.m4a", "silent.wav"])
def test_cut_files_are_refused_in_the_libraries_words(
    tmp_path: Path, name: str, by_library: Callable[[AudioStream], object]
) -> None:
    path = tmp_path / name
    if name.endswith("wav"):
        soundfile.write(path, np.zeros((0 if name == "silent.wav" else 3000, 2)), 44100)
    else:
        write_container(path, 30000, **({} if name == "x.m4a" else {"movflags": "faststart"}))
    whole = path.read_bytes()
    for stop in [*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1, len(whole)]:
        path.write_bytes(whole[:stop])
        assert outcome(AudioStream(path)) == by_library(AudioStream(path)), stop


@pytest.mark.parametrize("name", ["x.wav", "x.m4a"])
def test_altered_headers_never_raise_anything_else(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "x.wav":
        soundfile.write(path, np.zeros((30, 2)), 44100)
    else:
        write_container(path, 3000, movflags="faststart")
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(2000):
        data = bytearray(whole)
        for place in rng.integers(min(len(whole), 1200), size=rng.integers(1, 4)):
            data[place] = rng.choice([0, 1, 127, 128, 255, rng.integers(256)])
        path.write_bytes(data)
        headers = read_header(path)
        assert headers is None or all(min(header) >= 0 for header in headers)


def test_a_file_that_vanishes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.wav"
    with pytest.raises(MediaError, match=r"x\.wav: no such file"):
        probe(AudioStream(path))
    soundfile.write(path, np.zeros((30, 2)), 44100)

    def vanish(path: Path) -> None:
        path.unlink()
        raise FileNotFoundError(2, "No such file or directory", str(path))

    monkeypatch.setattr(media, "read_header", vanish)
    with pytest.raises(MediaError, match=r"x\.wav: cannot be decoded \(No such file"):
        probe(AudioStream(path))


def test_a_thousand_tracks_are_listed_in_a_moment(tmp_path: Path, example_track: Path) -> None:
    (tmp_path / "train").mkdir()
    for number in range(1000):
        (tmp_path / "train" / f"{number}.stem.mp4").symlink_to(example_track)
    start = time.process_time()
    corpus = find_corpus(tmp_path)
    assert len(corpus.tracks) == 1000
    assert time.process_time() - start < 3  # FFmpeg takes 7


def test_a_file_is_looked_at_once(example_track: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(media, "read_header", lambda path: seen.append(path) or read_header(path))
    probe_all([AudioStream(example_track, stream) for stream in range(5)])
    assert seen == [example_track]
