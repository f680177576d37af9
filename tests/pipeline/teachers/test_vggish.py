import numpy as np
import pytest

from flsep.pipeline.teachers import vggish
from flsep.pipeline.teachers.export import SineCheck, check_vggish
from flsep.pipeline.teachers.loading import load_teacher
from flsep.pipeline.teachers.model_folder import import_tensorflow


@pytest.fixture(scope="module")
def teacher(vggish_teacher):
    return load_teacher(vggish_teacher)


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def test_log_mel_is_the_reference(vggish_numbers):
    found = vggish.log_mel(import_tensorflow(), vggish_numbers["waveform"]).numpy()
    assert found.shape == vggish_numbers["log_mel"].shape
    assert relative_error(found, vggish_numbers["log_mel"]) < 1e-3


def test_embedding_of_an_exported_checkpoint_is_the_reference(teacher, vggish_numbers):
    found = teacher(vggish_numbers["waveform"])
    assert found.shape == vggish_numbers["embedding"].shape
    assert relative_error(found, vggish_numbers["embedding"]) < 1e-3


def test_windows_are_found(teacher):
    # 96 frames of 25 ms every 10 ms, then the next 96
    assert (teacher.info.window_samples, teacher.info.hop_samples) == (95 * 160 + 400, 96 * 160)
    assert (teacher.info.dim, teacher.info.sample_rate_hz) == (128, 16000)


def test_random_weights_are_not_the_released_ones(vggish_teacher):
    check = check_vggish(vggish_teacher)
    assert np.isfinite([check.mean, check.standard_deviation]).all()
    assert not check.is_released


@pytest.mark.parametrize(
    ("mean", "standard_deviation", "is_released"),
    [
        (-0.0333, 0.380, True),
        (-0.0365, 0.345, True),
        (-0.0370, 0.380, False),
        (0.0333, 0.380, False),
        (-0.0333, 0.337, False),
        (float("nan"), 0.380, False),
    ],
)
def test_released_weights_are_known_by_a_sine(mean, standard_deviation, is_released):
    assert SineCheck(mean, standard_deviation).is_released is is_released


def test_several_waveforms_at_once(teacher):
    waveforms = np.random.default_rng(0).uniform(-0.5, 0.5, (3, 2 * 15360 + 500)).astype(np.float32)
    alone = np.stack([teacher(waveform) for waveform in waveforms])
    for batch_windows in (2, 4, 128):
        teacher.batch_windows = batch_windows
        found = teacher.embed_each(waveforms)
        assert found.shape == (3, 2, 128)
        assert relative_error(found, alone) < 1e-5
