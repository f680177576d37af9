import importlib.util
import os
import re
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from flsep.pipeline.corpus.media import AudioStream
from flsep.pipeline.corpus.tracks import (
    MUSDB_SOURCES,
    MUSDB_VALID_TRACKS,
    Corpus,
    Track,
    TrackInfo,
    check_track,
    find_corpus,
)
from flsep.pipeline.errors import MediaError

ALL = ("mixture", *MUSDB_SOURCES)


def write_sound(path: Path, num_samples=1000, rate_hz=44100, num_channels=2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros((num_samples, num_channels)), rate_hz)


def write_track(folder: Path, names=ALL, suffix=".wav", **options) -> Path:
    for name in names:
        write_sound(folder / f"{name}{suffix}", **options)
    return folder


def write_stems(path: Path, num_streams=5, num_samples=(4096,) * 5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        streams = [container.add_stream("aac", rate=44100) for _ in range(num_streams)]
        for stream, length in zip(streams, num_samples, strict=False):
            silence = np.zeros((2, length), np.float32)
            frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="stereo")
            frame.sample_rate = 44100
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                container.mux(packet)
    return path


def splits(corpus: Corpus) -> dict[str, list[str]]:
    result: dict[str, list[str]] = {}
    for track in corpus.tracks:
        result.setdefault(track.split, []).append(track.name)
    return result


# --- kinds of corpora -----------------------------------------------------------------------------


def test_recognises_musdb18(tmp_path, example_track):
    for place in ("train/A - a", "train/B.b", "train/Leaf - Summerghost", "test/Z"):
        path = tmp_path / f"{place}.stem.mp4"
        path.parent.mkdir(exist_ok=True)
        path.symlink_to(example_track)
    corpus = find_corpus(tmp_path)
    assert (corpus.root, corpus.kind) == (tmp_path, "musdb18")
    assert corpus.sources == ("drums", "bass", "other", "vocals")
    assert corpus.rejected == ()
    assert splits(corpus) == {
        "train": ["A - a", "B.b"],
        "valid": ["Leaf - Summerghost"],
        "test": ["Z"],
    }
    path = tmp_path / "train/A - a.stem.mp4"
    assert corpus.tracks[0] == Track(
        "A - a", "train", AudioStream(path, 0), tuple(AudioStream(path, k) for k in (1, 2, 3, 4))
    )
    assert check_track(corpus.tracks[0]) == TrackInfo(268288, 44100, 268288 / 44100)
    assert list(corpus.infos.values()) == 4 * [TrackInfo(268288, 44100, 268288 / 44100)]
    assert set(corpus.infos) == {track.name for track in corpus.tracks}


def test_recognises_musdb18_hq(tmp_path):
    for place in ("train/A", "train/Meaxic - Take A Step", "train/B", "test/C"):
        write_track(tmp_path / place)
    corpus = find_corpus(tmp_path)
    assert corpus.kind == "musdb18-hq"
    assert corpus.sources == MUSDB_SOURCES
    assert splits(corpus) == {
        "train": ["A", "B"],
        "valid": ["Meaxic - Take A Step"],
        "test": ["C"],
    }
    folder = tmp_path / "test/C"
    assert corpus.tracks[-1] == Track(
        "C",
        "test",
        AudioStream(folder / "mixture.wav"),
        tuple(AudioStream(folder / f"{name}.wav") for name in MUSDB_SOURCES),
    )
    assert check_track(corpus.tracks[-1]) == TrackInfo(1000, 44100, 1000 / 44100)


def test_recognises_a_flat_folder(tmp_path):
    names = ("bass", "drums", "piano")
    for index, suffix in enumerate([".wav", ".flac", ".ogg", ".FLAC", ".aiff"]):
        write_track(tmp_path / f"track {index}", names, suffix)
    write_sound(tmp_path / "track 1/mixture.flac")
    (tmp_path / "track 1/cover.jpg").touch()
    (tmp_path / "README").touch()
    (tmp_path / ".cache").mkdir()
    corpus = find_corpus(tmp_path, sources=["piano", "bass"], valid_fraction=0)
    assert corpus.kind == "folder"
    assert corpus.sources == ("piano", "bass")
    assert corpus.rejected == ()
    assert splits(corpus) == {"train": [f"track {k}" for k in range(5)]}
    first, second, *_ = corpus.tracks
    assert first.mixture is None
    assert second.mixture == AudioStream(tmp_path / "track 1/mixture.flac")
    assert [s.path.name for s in second.sources] == ["piano.flac", "bass.flac"]


def test_mixes_kinds_and_honours_an_explicit_valid_folder(tmp_path, example_track):
    write_track(tmp_path / "train/A")
    write_track(tmp_path / "train/Leaf - Summerghost")
    write_track(tmp_path / "valid/B")
    write_track(tmp_path / "test/M")
    for name in ("G", "X"):
        (tmp_path / f"test/{name}.stem.mp4").symlink_to(example_track)
    corpus = find_corpus(tmp_path)
    assert corpus.kind == "folder"
    assert splits(corpus) == {
        "train": ["A", "Leaf - Summerghost"],
        "valid": ["B"],
        "test": ["G", "M", "X"],
    }
    picked = find_corpus(tmp_path, sources=["vocals", "drums"])
    assert [s.stream for s in picked.tracks[3].sources] == [4, 1]


def test_knows_the_validation_tracks_of_musdb():
    spec = importlib.util.find_spec("musdb")
    if spec is None:
        pytest.skip("musdb is not installed")
    text = (Path(spec.submodule_search_locations[0]) / "configs/mus.yaml").read_text()
    names = re.findall(r"^- '(.+)'$", text.split("validation_tracks:")[1], re.MULTILINE)
    assert len(names) == 14
    assert set(names) == MUSDB_VALID_TRACKS


# --- holding out ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    root = tmp_path_factory.mktemp("many")
    for index in range(60):
        write_track(root / f"song {index}", ["drums"], num_samples=10)
    return root


def held_out(root, **options) -> dict[str, set[str]]:
    found = splits(find_corpus(root, sources=["drums"], **options))
    return {split: set(found.get(split, ())) for split in ("train", "valid", "test")}


def test_holds_out_about_the_fractions(many):
    found = held_out(many, valid_fraction=0.3, test_fraction=0.2)
    assert 10 <= len(found["valid"]) <= 26
    assert 5 <= len(found["test"]) <= 20
    assert found == held_out(many, valid_fraction=0.3, test_fraction=0.2)
    assert found != held_out(many, valid_fraction=0.3, test_fraction=0.2, seed=1)


def test_a_tenth_is_held_out_by_default(many):
    found = held_out(many)
    assert 1 <= len(found["valid"]) <= 14
    assert not found["test"]
    assert found == held_out(many, valid_fraction=0.1)
    assert held_out(many, valid_fraction=0)["valid"] == set()


def test_tracks_keep_their_split_when_others_are_added(many, tmp_path):
    options = {"valid_fraction": 0.3, "test_fraction": 0.2}
    whole = held_out(many, **options)
    for index in range(0, 60, 2):
        (tmp_path / f"song {index}").symlink_to(many / f"song {index}")
    for split, names in held_out(tmp_path, **options).items():
        assert names <= whole[split]


@pytest.mark.parametrize("seed", range(8))
def test_each_split_gets_a_track(many, tmp_path, seed):
    for index in range(3):
        (tmp_path / f"song {index}").symlink_to(many / f"song {index}")
    for fraction in (0.01, 0.49):
        options = {"valid_fraction": fraction, "test_fraction": fraction, "seed": seed}
        assert {split: len(names) for split, names in held_out(tmp_path, **options).items()} == {
            "train": 1,
            "valid": 1,
            "test": 1,
        }


def test_a_fraction_goes_before_the_list_of_musdb(tmp_path):
    for name in ("A", "B", "C", "Leaf - Summerghost", "Meaxic - Take A Step"):
        write_track(tmp_path / "train" / name)
    assert held_out(tmp_path)["valid"] == {"Leaf - Summerghost", "Meaxic - Take A Step"}
    assert len(held_out(tmp_path, valid_fraction=0.01)["valid"]) == 1
    found = held_out(tmp_path, test_fraction=0.01)
    assert found["valid"] == {"Leaf - Summerghost", "Meaxic - Take A Step"}
    assert len(found["test"]) == 1


def test_a_single_track_trains(tmp_path):
    write_track(tmp_path / "A")
    assert splits(find_corpus(tmp_path)) == {"train": ["A"]}
    for options in ({"valid_fraction": 0.1}, {"test_fraction": 0.1}):
        with pytest.raises(ValueError, match=r"has 1 usable training tracks, expected more than 1"):
            find_corpus(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"valid_fraction": -0.1}, r"--valid-fraction -0.1 .*expected fractions from 0"),
        ({"valid_fraction": 0.6, "test_fraction": 0.4}, r"--test-fraction 0.4: expected"),
        ({"test_fraction": float("nan")}, r"--test-fraction nan: expected"),
        ({"valid_fraction": 0.0}, r"--valid-fraction 0.0: .* has a folder valid; leave out"),
        ({"test_fraction": 0.2}, r"--test-fraction 0.2: .* has a folder test; leave out"),
    ],
)
def test_refuses_fractions(tmp_path, options, message):
    for place in ("train/A", "train/B", "valid/C", "test/D"):
        write_track(tmp_path / place)
    with pytest.raises(ValueError, match=message):
        find_corpus(tmp_path, **options)


# --- what is no corpus ----------------------------------------------------------------------------


def test_refuses_what_is_no_corpus(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        find_corpus(tmp_path / "nowhere")
    (tmp_path / ".hidden").touch()
    with pytest.raises(ValueError, match=r"is an empty folder; expected a corpus"):
        find_corpus(tmp_path)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"is no corpus; expected \*\.stem\.mp4 files or a folder"):
        find_corpus(tmp_path)
    with pytest.raises(ValueError, match=r"notes.txt: no such folder"):
        find_corpus(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"is no corpus"):
        find_corpus(write_track(tmp_path / "track"))


def test_names_the_sources_found(tmp_path):
    write_track(tmp_path / "A", ["mixture", "bass", "piano"])
    write_track(tmp_path / "B", ["drums"])
    with pytest.raises(ValueError, match=r"\(found bass, drums, piano\); name .* with --sources"):
        find_corpus(tmp_path)
    with pytest.raises(ValueError, match=r"no track has a source violin \(found bass, drums, pian"):
        find_corpus(tmp_path, sources=["bass", "violin"])
    for sources in ([], ["bass", "bass"], ["bass", "mixture"]):
        with pytest.raises(ValueError, match=r"--sources .*: expected different names"):
            find_corpus(tmp_path, sources=sources)


def test_refuses_names_that_occur_twice(tmp_path, example_track):
    for place in ("train/A", "train/B", "test/B", "test/C"):
        write_track(tmp_path / place)
    (tmp_path / "test/A.stem.mp4").symlink_to(example_track)
    with pytest.raises(ValueError, match=r"more than one track named 'A', 'B'; rename them"):
        find_corpus(tmp_path)


@pytest.mark.parametrize("place", ["validation/C", "C"])
def test_refuses_tracks_beside_the_splits(tmp_path, place):
    write_track(tmp_path / "train/A")
    write_track(tmp_path / place)
    (tmp_path / "documents/more").mkdir(parents=True)
    top = place.split("/")[0]
    with pytest.raises(ValueError, match=rf"{top}: holds sound files beside train; move them"):
        find_corpus(tmp_path)


# --- bad tracks among good ones -------------------------------------------------------------------


def reject(root: Path, **options) -> str:
    """Add a good track, expect that it stays, and return why the bad one did not."""
    write_track(root / "good")
    corpus = find_corpus(root, **options)
    assert [track.name for track in corpus.tracks] == ["good"]
    ((name, reason),) = corpus.rejected
    assert name.startswith("bad")
    assert "\n" not in reason
    return reason


def test_rejects_a_missing_source(tmp_path):
    write_track(tmp_path / "bad", ["mixture", "bass", "other"])
    assert re.search(r"bad: has no file for drums, vocals \(found bass, mixtu", reject(tmp_path))


def test_rejects_two_files_for_a_source(tmp_path):
    write_track(tmp_path / "bad")
    write_sound(tmp_path / "bad/bass.flac")
    assert re.search(r"bad: has bass.flac, bass.wav; expected one", reject(tmp_path))


def test_rejects_a_folder_without_sound(tmp_path):
    (tmp_path / "bad").mkdir()
    assert re.search(r"bad: holds no sound files", reject(tmp_path))


def test_rejects_a_lone_sound_file(tmp_path):
    write_sound(tmp_path / "bad.wav")
    assert re.search(r"bad.wav: is a lone sound file, expected a folder", reject(tmp_path))


@pytest.mark.parametrize("name", [b"bad\n", b"bad\x1b[31m", b"bad \xff"])
def test_rejects_names_that_cannot_be_printed(tmp_path, name):
    write_track(tmp_path / "whole").rename(tmp_path / os.fsdecode(name))
    write_track(tmp_path / "good")
    corpus = find_corpus(tmp_path)
    assert [track.name for track in corpus.tracks] == ["good"]
    ((shown, reason),) = corpus.rejected
    assert shown.isprintable()
    assert shown.startswith("'bad")
    assert reason == "its name is not printable; rename it"


def test_rejects_other_lengths(tmp_path):
    write_track(tmp_path / "bad")
    write_sound(tmp_path / "bad/other.wav", 1001)
    assert re.search(r"differ in length: .*bass.wav 1000, other.wav 1001, v", reject(tmp_path))


def test_rejects_other_rates(tmp_path):
    write_track(tmp_path / "bad")
    write_sound(tmp_path / "bad/other.wav", rate_hz=48000)
    assert re.search(r"sample rate: .*bass.wav 44100, other.wav 48000, v", reject(tmp_path))


def test_rejects_other_channel_counts(tmp_path):
    write_track(tmp_path / "bad", num_channels=3)
    assert re.search(r"mixture.wav: has 3 channels, expected 2 or 1", reject(tmp_path))


def test_rejects_a_zero_length_file(tmp_path):
    write_track(tmp_path / "bad", num_samples=0)
    assert re.search(r"mixture.wav: has no samples", reject(tmp_path))


@pytest.mark.parametrize("num_streams", [1, 4, 6])
def test_rejects_another_number_of_streams(tmp_path, num_streams):
    write_stems(tmp_path / "bad.stem.mp4", num_streams, (4096,) * num_streams)
    message = rf"has {num_streams} audio streams, expected (the 5 of a MUSDB stem|at least)"
    assert re.search(message, reject(tmp_path))


def test_rejects_a_cut_stem_file(tmp_path, example_track):
    data = example_track.read_bytes()
    (tmp_path / "bad.stem.mp4").write_bytes(data[: len(data) // 2])
    assert re.search(r"bad.stem.mp4: holds \d+ bytes, .*cut short", reject(tmp_path))


def test_rejects_a_stem_file_without_the_sources_asked_for(tmp_path, example_track):
    (tmp_path / "bad.stem.mp4").symlink_to(example_track)
    write_sound(tmp_path / "good/piano.wav")
    reason = reject(tmp_path, sources=["bass", "piano"])
    assert re.search(r"a MUSDB stem file has no piano", reason)


def test_tolerates_a_codec_frame_in_containers_only(tmp_path):
    near = write_stems(tmp_path / "near.stem.mp4", 5, (20480, 20480, 20480, 20480, 19456))
    far = write_stems(tmp_path / "far.stem.mp4", 5, (20480, 20480, 20480, 20480, 16384))

    def track(path: Path) -> Track:
        mixture, *sources = (AudioStream(path, k) for k in range(5))
        return Track("a", "train", mixture, tuple(sources))

    assert check_track(track(near)).num_samples == 20480  # 20 codec frames beside 21
    with pytest.raises(MediaError, match=r"differ in length: .*stream 4 17408 samples; .*2048"):
        check_track(track(far))


def test_all_tracks_rejected_is_a_corpus_of_none(tmp_path):
    write_track(tmp_path / "A", num_samples=0)
    for options in ({}, {"valid_fraction": 0.1}):
        corpus = find_corpus(tmp_path, **options)
        assert corpus.tracks == ()
        assert [name for name, _ in corpus.rejected] == ["A"]


def test_follows_the_channels_asked_for(tmp_path):
    write_track(tmp_path / "A", num_channels=1)
    write_track(tmp_path / "B", num_channels=6)
    assert find_corpus(tmp_path, num_channels=6).rejected == ()
    corpus = find_corpus(tmp_path)
    assert set(corpus.infos) == {"A"}
    assert [name for name, _ in corpus.rejected] == ["B"]
