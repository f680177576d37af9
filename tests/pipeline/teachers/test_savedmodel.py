import shutil
import subprocess
import sys

import numpy as np
import pytest

from flsep.pipeline.errors import TeacherError
from flsep.pipeline.teachers import savedmodel
from flsep.pipeline.teachers.interface import TeacherInfo
from flsep.pipeline.teachers.loading import load_teacher
from flsep.pipeline.teachers.model_folder import content_digest, import_tensorflow


def noise(num_samples: int, seed: int = 1) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(num_samples, dtype=np.float32)


@pytest.fixture(scope="module")
def tiny(tiny_teacher):
    return load_teacher(tiny_teacher)


# --- what a teacher says about itself -------------------------------------------------------------


def test_info(tiny, tiny_teacher):
    assert tiny.info == TeacherInfo(
        handle=str(tiny_teacher),
        digest=content_digest(tiny_teacher),
        sample_rate_hz=16000,
        dim=8,
        window_samples=1600,
        hop_samples=1600,
    )


@pytest.mark.parametrize(
    ("window", "hop"), [(2000, 700), (1000, 1500), (400, 160), (40000, 100), (1, 20000)]
)
def test_windowing_is_found(build_tiny_teacher, tmp_path, window, hop):
    info = load_teacher(build_tiny_teacher(tmp_path / "teacher", 2, window, hop)).info
    assert (info.window_samples, info.hop_samples, info.dim) == (window, hop, 2)


# --- embedding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_windows", [1, 3, 7, 128])
def test_chunks_give_what_single_windows_give(build_tiny_teacher, tmp_path, batch_windows):
    window, hop = 2000, 700
    folder = build_tiny_teacher(tmp_path / "teacher", 8, window, hop)
    teacher = load_teacher(folder, batch_windows=batch_windows)
    model = import_tensorflow().saved_model.load(str(folder))
    waveform = noise(window + 6 * hop)
    expected = np.concatenate(
        [model(waveform[start : start + window]).numpy() for start in range(0, 6 * hop + 1, hop)]
    )
    assert expected.shape == (7, 8)
    np.testing.assert_allclose(teacher(waveform), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("num_samples", "num_windows"), [(1600, 1), (3199, 1), (3200, 2), (160_001, 100)]
)
def test_windows_that_lie_inside_count(tiny, num_samples, num_windows):
    embedding = tiny(noise(num_samples))
    assert embedding.shape == (num_windows, 8)
    assert embedding.dtype == np.float32


def test_the_model_never_sees_more_than_a_batch(tiny_teacher, monkeypatch):
    seen = []
    teacher = load_teacher(tiny_teacher, batch_windows=4)
    call = savedmodel._Function.__call__
    monkeypatch.setattr(
        savedmodel._Function, "__call__", lambda f, x: seen.append(len(x)) or call(f, x)
    )
    teacher(noise(10 * 1600 + 5))
    assert seen == [4 * 1600, 4 * 1600, 2 * 1600]


def test_quiet_and_loud_audio_differ(tiny):
    assert not np.allclose(tiny(noise(1600)), tiny(2 * noise(1600)))


@pytest.mark.parametrize(
    ("waveform", "match"),
    [
        (noise(1599), r"1599 samples, expected at least one window of 1600 at 16000 Hz"),
        (np.zeros(1600), r"waveform float64 \[1600\], expected float32 \[sample\]"),
        (noise(1600)[None], r"waveform float32 \[1, 1600\], expected float32 \[sample\]"),
    ],
)
def test_waveform_that_cannot_be_embedded(tiny, waveform, match):
    with pytest.raises(ValueError, match=match):
        tiny(waveform)


def test_nan_in_is_not_nan_out(tiny):
    waveform = noise(3200)
    waveform[7] = np.nan
    with pytest.raises(TeacherError, match="not finite"):
        tiny(waveform)


# --- what is no teacher ---------------------------------------------------------------------------


def frames(waveform):
    return import_tensorflow().signal.frame(waveform, 1600, 1600)


IMPOSTORS = {
    "vector": (lambda x: x, r"returns float32 \[16000\] for float32 \[16000\]"),
    "double": (lambda x: import_tensorflow().cast(frames(x), "float64"), r"returns float64 \["),
    "pair": (lambda x: (x, x), r"returns a tuple, expected one tensor"),
    "named": (lambda x: {"embedding": frames(x)}, r"returns a \w+, expected one tensor"),
    "infinite": (lambda x: frames(x) / 0.0, r"not finite"),
    "clip": (
        lambda x: import_tensorflow().reduce_mean(frames(x), axis=0, keepdims=True),
        r"gives 1 windows for 1024000 samples, expected 2 or more",
    ),
    "normalised": (
        lambda x: frames(x / import_tensorflow().reduce_max(x[-1600:])),
        r"is not shift-invariant, chunks",
    ),
    "padded": (
        lambda x: import_tensorflow().signal.frame(x, 1600, 800, pad_end=True),
        r"is not shift-invariant, chunks",
    ),
    "capped": (
        lambda x: frames(x)[:3],
        r"gives 3 windows for 9599 samples, expected 5 of 1600 samples, one every 1600",
    ),
}


@pytest.mark.parametrize("name", IMPOSTORS)
def test_function_that_is_no_teacher(save_function, tmp_path, name):
    function, match = IMPOSTORS[name]
    folder = save_function(tmp_path / name, function)
    with pytest.raises(TeacherError, match=f"^teacher {folder}: .*{match}") as error:
        load_teacher(folder)
    assert "\n" not in str(error.value)


def test_function_of_something_else(save_function, tmp_path):
    tf = import_tensorflow()
    spec = tf.TensorSpec([None, 3], tf.int32, name="image")
    folder = save_function(tmp_path / "image", lambda image: image, spec)
    match = (
        r"takes TensorSpec\(shape=\(None, 3\), dtype=tf\.int32, name='image'\), expected float32"
    )
    with pytest.raises(TeacherError, match=match) as error:
        load_teacher(folder)
    assert "\n" not in str(error.value)


def test_model_that_is_not_callable(tmp_path):
    tf = import_tensorflow()
    module = tf.Module()
    function = tf.function(lambda x: {"y": x}, input_signature=[tf.TensorSpec([None], tf.float32)])
    tf.saved_model.save(module, str(tmp_path / "model"), signatures={"serving_default": function})
    match = r"not callable \(its signatures: serving_default\)"
    with pytest.raises(TeacherError, match=match) as error:
        load_teacher(tmp_path / "model")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("saved_model.pb", lambda content: content[: len(content) // 2]),
        ("saved_model.pb", lambda content: b"<html>"),
        ("saved_model.pb", lambda content: b""),
        ("variables/variables.index", lambda content: content[:-1]),
    ],
)
def test_damaged_folder(tiny_teacher, tmp_path, file, harm):
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, folder)
    (folder / file).write_bytes(harm((folder / file).read_bytes()))
    match = f"^teacher {folder}: {folder} cannot be loaded as a SavedModel .*; delete that folder"
    with pytest.raises(TeacherError, match=match) as error:
        load_teacher(folder)
    assert "\n" not in str(error.value)


def test_batch_of_nothing(tiny_teacher):
    with pytest.raises(ValueError, match="batch_windows is 0, expected 1 or more"):
        load_teacher(tiny_teacher, batch_windows=0)


# --- processes ------------------------------------------------------------------------------------

EMBED = """
import sys
import numpy as np
from flsep.pipeline.teachers.loading import load_teacher
teacher = load_teacher(sys.argv[1], num_threads=1)
embedding = teacher(np.load(sys.argv[2]))
np.save(sys.argv[3], embedding)
"""


@pytest.fixture(scope="module")
def other_process(musicnn_teacher, tmp_path_factory):
    """Embed 9 s of noise with a real network in another process, on one thread."""
    folder = tmp_path_factory.mktemp("process")
    waveform = noise(9 * 16000)
    np.save(folder / "waveform.npy", waveform)
    paths = [musicnn_teacher, folder / "waveform.npy", folder / "embedding.npy"]
    command = [sys.executable, "-W", "error", "-c", EMBED, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done, waveform, np.load(folder / "embedding.npy")


def test_processes_and_threads_agree_to_the_bit(other_process, musicnn):
    _, waveform, embedding = other_process
    np.testing.assert_array_equal(musicnn(waveform), embedding)


def test_loading_prints_nothing(other_process):
    done, *_ = other_process
    assert (done.stdout, done.stderr) == ("", "")


def test_threads_cannot_be_set_once_tensorflow_runs(tiny_teacher):
    match = r"num_threads=63 or GPU .*with \d+ threads; load the teacher before"
    with pytest.raises(ValueError, match=match) as error:
        load_teacher(tiny_teacher, num_threads=63)
    assert "\n" not in str(error.value)


def test_tensorflow_is_imported_when_needed_only():
    modules = "flsep.pipeline.teachers.loading, flsep.pipeline.teachers.export, sys"
    code = f"import {modules}; sys.exit('tensorflow' in sys.modules or 'librosa' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_several_waveforms_of_a_teacher_that_takes_one(tiny):
    waveforms = np.random.default_rng(0).uniform(-0.5, 0.5, (3, 4000)).astype(np.float32)
    found = tiny.embed_each(waveforms)
    assert found.shape == (3, 2, 8)
    assert np.array_equal(found, np.stack([tiny(waveform) for waveform in waveforms]))
    with pytest.raises(ValueError, match="expected at least one window"):
        tiny.embed_each(waveforms[:, :100])


def test_a_function_for_several_waveforms_must_agree(tmp_path):
    tf = import_tensorflow()
    module = tf.Module()

    def embed(waveform):
        return tf.signal.frame(waveform, 800, 800)[:, :4]

    module.__call__ = tf.function(embed, input_signature=[tf.TensorSpec([None], tf.float32)])
    module.each = tf.function(
        lambda waveforms: 2 * tf.reshape(tf.signal.frame(waveforms, 800, 800)[..., :4], [-1, 4]),
        input_signature=[tf.TensorSpec([None, None], tf.float32)],
    )
    tf.saved_model.save(module, str(tmp_path / "teacher"))
    with pytest.raises(TeacherError, match="its function 'each' gives other embeddings"):
        load_teacher(tmp_path / "teacher")
