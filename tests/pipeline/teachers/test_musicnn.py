import librosa
import numpy as np
import pytest

from flsep.pipeline.corpus.media import AudioStream, decode
from flsep.pipeline.errors import TeacherError
from flsep.pipeline.teachers import musicnn as network
from flsep.pipeline.teachers.export import musicnn_tags
from flsep.pipeline.teachers.model_folder import import_tensorflow

STREAMS = ("mixture", "drums", "bass", "other", "vocals")


@pytest.fixture(scope="module")
def tags(musicnn_teacher, example_track):
    """Likelihood by tag, the likeliest first, of each stream of the real track."""
    found = {}
    for index, name in enumerate(STREAMS):
        blocks = decode(AudioStream(example_track, index), sample_rate_hz=16000)
        mono = np.concatenate([block.mean(axis=0) for block in blocks])
        # the package's frames are centred: its first one starts half an FFT before the audio
        found[name] = dict(musicnn_tags(musicnn_teacher, np.pad(mono, 256)))
    return found


def test_drums_are_heard(tags):
    assert list(tags["drums"])[:2] == ["drums", "beat"]
    assert tags["drums"]["drums"] == pytest.approx(0.48, abs=0.005)
    assert tags["drums"]["beat"] == pytest.approx(0.42, abs=0.005)


def test_vocals_are_heard(tags):
    assert list(tags["vocals"])[:2] == ["male", "male vocal"]


def test_rock_is_heard(tags):
    assert next(iter(tags["mixture"])) == "rock"
    assert tags["mixture"]["rock"] == pytest.approx(0.45, abs=0.005)


def test_log_mel_is_that_of_librosa():
    waveform = 0.1 * np.random.default_rng(0).standard_normal(48128, dtype=np.float32)
    power = librosa.feature.melspectrogram(
        y=waveform, sr=16000, n_fft=512, hop_length=256, n_mels=96, center=False
    )
    (found,) = network.log_mel(import_tensorflow(), waveform).numpy()
    np.testing.assert_allclose(found, np.log10(1 + 10000 * power).T, rtol=1e-4, atol=1e-5)


def test_windows_are_found(musicnn):
    assert musicnn.info.window_samples == 186 * 256 + 512
    assert musicnn.info.hop_samples == 187 * 256
    assert musicnn.info.dim == 256


def test_groups_of_patches_change_nothing(musicnn):
    num_windows = network._PATCHES_AT_ONCE + 2
    num_samples = musicnn.info.window_samples + (num_windows - 1) * musicnn.info.hop_samples
    waveform = 0.1 * np.random.default_rng(0).standard_normal(num_samples, dtype=np.float32)
    together = musicnn(waveform)
    assert together.shape == (num_windows, 256)
    for window in (0, num_windows - 3, num_windows - 2, num_windows - 1):
        start = window * musicnn.info.hop_samples
        (alone,) = musicnn(waveform[start : start + musicnn.info.window_samples])
        np.testing.assert_allclose(together[window], alone, atol=1e-4)


def test_another_teacher_has_no_tags(tiny_teacher):
    with pytest.raises(TeacherError, match="has no tags"):
        musicnn_tags(tiny_teacher, np.zeros(1600, np.float32))


def test_several_waveforms_at_once(musicnn):
    waveforms = np.random.default_rng(0).uniform(-0.5, 0.5, (3, 48128 + 47872)).astype(np.float32)
    alone = np.stack([musicnn(waveform) for waveform in waveforms])
    found = musicnn.embed_each(waveforms)
    assert found.shape == (3, 2, 256)
    assert np.abs(found - alone).max() < 1e-5 * np.abs(alone).max()
