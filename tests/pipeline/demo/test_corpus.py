import hashlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from flsep.pipeline.demo import corpus as demo_corpus
from flsep.pipeline.demo.composition import compose
from flsep.pipeline.demo.corpus import (
    MANIFEST,
    RATE_HZ,
    STEMS,
    active_rms,
    render_corpus,
    render_song,
    split_names,
)
from flsep.pipeline.errors import CorpusError

SECONDS = 4.0


def digests(corpus: Path) -> dict[str, str]:
    return {
        str(path.relative_to(corpus)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(corpus.rglob("*"))
        if path.is_file()
    }


def read(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: soundfile.read(folder / f"{name}.wav", dtype="int16")[0]
        for name in ("mixture", *STEMS)
    }


def in_another_process(out: Path, **arguments: object) -> None:
    program = (
        "from pathlib import Path; from flsep.pipeline.demo.corpus import render_corpus; "
        f"render_corpus(Path({str(out)!r}), **{arguments!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONHASHSEED": "12"})


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, told) -> Path:
    out = tmp_path_factory.mktemp("demo") / "corpora" / "small"
    render_corpus(out, num_tracks=3, seconds=SECONDS, seed=0, progress=told.append)
    return out


@pytest.fixture(scope="module")
def second_corpus(tmp_path_factory) -> Path:
    """Another seed, without the example, into an empty folder named relative to the current one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("second"))
        out = Path("empty")
        out.mkdir()
        render_corpus(out, num_tracks=3, seconds=SECONDS, seed=1, example=False)
        return out.absolute()


@pytest.fixture(scope="module")
def tracks(corpus) -> dict[str, dict[str, np.ndarray]]:
    return {folder.name: read(folder) for folder in sorted(corpus.glob("*/*/"))}


@pytest.fixture(scope="module")
def long_track() -> dict[str, np.ndarray]:
    soundfont = Path(importlib.util.find_spec("pretty_midi").origin).parent / "TimGM6mb.sf2"
    song = compose(0, 1, 20.0)
    return render_song(song, 20.0, soundfont.read_bytes(), np.random.default_rng(0))


def test_the_corpus_has_the_shape_of_musdb_hq(corpus, tracks):
    assert sorted(path.name for path in corpus.iterdir()) == [MANIFEST, "test", "train", "valid"]
    assert len(tracks) == 3
    for path in corpus.rglob("*.wav"):
        header = soundfile.info(path)
        assert (header.samplerate, header.channels, header.subtype, header.format) == (
            RATE_HZ, 2, "PCM_16", "WAV",
        )  # fmt: skip
        assert header.frames == SECONDS * RATE_HZ


def test_the_mixture_is_the_exact_sum_of_the_stems(tracks):
    for name, signals in tracks.items():
        total = sum(signals[stem].astype(np.int64) for stem in STEMS)
        np.testing.assert_array_equal(total, signals["mixture"], err_msg=name)
        loudest = max(np.abs(signal.astype(int)).max() for signal in signals.values())
        assert loudest == pytest.approx(0.9 * 32767, abs=4)


def test_another_process_renders_the_same_bytes(corpus, tmp_path):
    in_another_process(tmp_path / "again", num_tracks=3, seconds=SECONDS, seed=0)
    assert digests(tmp_path / "again") == digests(corpus)


def test_a_track_is_the_same_in_a_larger_corpus(corpus, tmp_path):
    # Of four tracks two are for training, so that the second and third are in other splits here.
    render_corpus(tmp_path / "four", num_tracks=4, seconds=SECONDS, seed=0, example=False)

    def by_track(root):
        return {path.split("/", 1)[-1]: digest for path, digest in digests(root).items()}

    small = {path: digest for path, digest in by_track(corpus).items() if path.endswith(".wav")}
    assert len(small) == 15
    assert small.items() <= by_track(tmp_path / "four").items()


def test_another_seed_gives_other_songs(corpus, second_corpus):
    wavs = {d for path, d in digests(second_corpus).items() if path.endswith(".wav")}
    assert len(wavs) == 15
    assert not wavs & set(digests(corpus).values())


def test_stems_sound_and_channels_differ(tracks):
    for name, signals in tracks.items():
        for stem in STEMS:
            signal = signals[stem] / 32768
            assert active_rms(signal) > 0.01, (name, stem)
            assert not np.array_equal(signal[:, 0], signal[:, 1]), (name, stem)


def test_levels_are_those_of_a_pop_mix(long_track):
    signals = {name: signal / 32768 for name, signal in long_track.items()}
    levels_db = {stem: 20 * np.log10(active_rms(signals[stem])) for stem in STEMS}
    assert np.ptp(list(levels_db.values())) < 12
    for stem in STEMS:  # the mixture as an estimate of the stem
        error = np.sum((signals["mixture"] - signals[stem]) ** 2)
        sdr_db = 10 * np.log10(np.sum(signals[stem] ** 2) / error)
        assert -12 < sdr_db < 1, (stem, sdr_db)


def test_each_stem_has_the_spectrum_of_its_kind(long_track):
    def centroid_hz(stem):
        power = np.abs(np.fft.rfft(long_track[stem].mean(axis=1))) ** 2
        return np.sum(power * np.fft.rfftfreq(len(long_track[stem]), 1 / RATE_HZ)) / power.sum()

    def share_above(stem, hz):
        power = np.abs(np.fft.rfft(long_track[stem].mean(axis=1))) ** 2
        return power[np.fft.rfftfreq(len(long_track[stem]), 1 / RATE_HZ) > hz].sum() / power.sum()

    assert centroid_hz("bass") < 300 < centroid_hz("vocals")
    assert share_above("drums", 5000) > 10 * share_above("bass", 5000)
    assert share_above("bass", 1000) < 0.1


def test_vocals_are_silent_in_the_intro(tracks, corpus):
    described = json.loads((corpus / MANIFEST).read_text())["tracks"]
    for name, signals in tracks.items():
        bar_samples = round(240 / described[name]["tempo_bpm"] * RATE_HZ)
        assert described[name]["form"][0] == "intro 1"
        before_breath = bar_samples - round(0.5 * RATE_HZ)
        assert not signals["vocals"][:before_breath].any()
        assert signals["vocals"][bar_samples:].any()
        assert signals["other"][:bar_samples].any()


@pytest.mark.parametrize(
    ("num_tracks", "train", "valid", "test"),
    [(3, 1, 1, 1), (4, 2, 1, 1), (5, 3, 1, 1), (10, 8, 1, 1), (16, 12, 2, 2), (100, 76, 12, 12)],
)
def test_splits(num_tracks, train, valid, test):
    names = split_names(num_tracks)
    assert len(names) == num_tracks
    assert [names.count(split) for split in ("train", "valid", "test")] == [train, valid, test]


def test_the_real_track_is_copied_on_request(corpus, second_corpus, told):
    (source,) = (Path(importlib.util.find_spec("stempeg").origin).parent / "data").glob("*.mp4")
    (copied,) = corpus.rglob("*.stem.mp4")
    assert copied == corpus / "test" / source.name
    assert copied.read_bytes() == source.read_bytes()
    assert told[-1].startswith(f"test/{source.name}")
    assert [line.split()[0] for line in told[:3]] == ["1/3", "2/3", "3/3"]
    assert not list(second_corpus.rglob("*.stem.mp4"))


def test_the_same_corpus_is_kept(corpus):
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    said: list[str] = []
    render_corpus(corpus, num_tracks=3, seconds=4, seed=0, progress=said.append)
    assert said == [f"{corpus}: kept, it was rendered with the same arguments"]
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == before


def test_another_corpus_is_not_overwritten(corpus):
    with pytest.raises(ValueError, match=r"small: holds .* seed 0 instead of 5; remove it or"):
        render_corpus(corpus, num_tracks=3, seconds=SECONDS, seed=5)
    with pytest.raises(ValueError, match=r"num_tracks 3 instead of 14, seconds 4\.0 instead of 24"):
        render_corpus(corpus)


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"exists and is no demo corpus .*choose another"):
        render_corpus(tmp_path, num_tracks=3, seconds=SECONDS)
    with pytest.raises(ValueError, match="exists and is no demo corpus"):
        render_corpus(tmp_path / "thesis.txt", num_tracks=3, seconds=SECONDS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"arguments": {"seed": 0}}', "null"])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ValueError, match="is no manifest of a demo corpus; remove"):
        render_corpus(tmp_path, num_tracks=3, seconds=SECONDS)


def test_an_empty_folder_is_used(second_corpus):
    assert len(list(second_corpus.rglob("mixture.wav"))) == 3
    assert list(second_corpus.parent.iterdir()) == [second_corpus], "nothing temporary is left"
    mode = second_corpus.stat().st_mode & 0o777
    assert mode == (second_corpus / "train").stat().st_mode & 0o777, "as mkdir makes it"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file/corpus: cannot be created \(.*\); choose another"):
        render_corpus(tmp_path / "file" / "corpus", num_tracks=3, seconds=SECONDS)


def test_a_disk_that_gets_full_is_named(tmp_path, monkeypatch):
    def fail_like_libsndfile(path, *args, **options):
        raise soundfile.LibsndfileError(2)  # its "System error."

    monkeypatch.setattr(soundfile, "write", fail_like_libsndfile)
    with pytest.raises(CorpusError, match=r"mixture.wav: cannot be written .*is the disk full"):
        render_corpus(tmp_path / "corpus", num_tracks=3, seconds=SECONDS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_an_interrupted_run_leaves_nothing(tmp_path, failure):
    def interrupt(line):
        raise failure

    with pytest.raises(failure):
        render_corpus(tmp_path / "corpus", num_tracks=3, seconds=SECONDS, progress=interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tracks": 2}, "--tracks 2: expected at least 3"),
        ({"seconds": 3.9}, "--seconds 3.9: expected at least 4"),
        ({"seconds": float("nan")}, "--seconds nan: expected at least 4"),
        ({"seconds": float("inf")}, "--seconds inf: expected at least 4"),
        ({"seed": -1}, "--seed -1: expected 0 or more"),
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        render_corpus(tmp_path / "corpus", **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["pretty_midi", "midirenderer", "stempeg"])
def test_a_missing_package_is_named_before_anything_is_rendered(tmp_path, monkeypatch, package):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        demo_corpus.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == package else real(name, *rest),
    )
    with pytest.raises(ValueError, match=rf"package {package} is missing.*flsep\[demo\]"):
        render_corpus(tmp_path / "corpus", num_tracks=3, seconds=SECONDS)
    assert not list(tmp_path.iterdir())


def test_active_rms_leaves_silence_out():
    signal = np.zeros((RATE_HZ, 2))
    signal[: RATE_HZ // 2, 0] = 0.3
    signal[: RATE_HZ // 2, 1] = 0.4
    assert active_rms(signal) == pytest.approx(np.sqrt((0.09 + 0.16) / 2))


def test_importing_loads_no_synthesiser():
    program = (
        "import sys, flsep.pipeline.demo.corpus; "
        "print({'pretty_midi', 'midirenderer', 'stempeg', 'soundfile', 'soxr', 'scipy', "
        "'tensorflow'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "set()"
