import hashlib
from pathlib import Path

import numpy as np
import pytest

from flsep.pipeline.errors import TeacherError
from flsep.pipeline.teachers import export, vggish
from flsep.pipeline.teachers.export import export_musicnn, export_vggish
from flsep.pipeline.teachers.model_folder import content_digest, import_tensorflow


def save_checkpoint(prefix: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    tf = import_tensorflow()
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        variables = [tf.compat.v1.Variable(tf.zeros(shape), name=n) for n, shape in shapes.items()]
        session.run([variable.initializer for variable in variables])
        tf.compat.v1.train.Saver().save(session, str(prefix), write_meta_graph=False)
    return prefix


def refused(call, match: str) -> None:
    with pytest.raises(TeacherError, match=match) as error:
        call()
    assert "\n" not in str(error.value)


# --- VGGish ---------------------------------------------------------------------------------------


def test_names_of_the_release():
    assert next(iter(vggish.SHAPES)) == "vggish/conv1/weights"
    assert list(vggish.SHAPES)[-1] == "vggish/fc2/biases"
    assert sum(np.prod(shape) for shape in vggish.SHAPES.values()) == 72_141_184


@pytest.mark.parametrize(
    ("shapes", "match"),
    [
        ({"conv1/weights": (3, 3, 1, 64)}, "no variable vggish/conv1/weights"),
        (
            {"vggish/conv1/weights": (3, 3, 1, 32)},
            r"vggish/conv1/weights is \[3, 3, 1, 32\], expected \[3, 3, 1, 64\]",
        ),
    ],
)
def test_checkpoint_of_another_network(tmp_path, shapes, match):
    checkpoint = save_checkpoint(tmp_path / "model.ckpt", shapes)
    refused(lambda: export_vggish(checkpoint, tmp_path / "out"), f"^{checkpoint}: .*{match}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [None, b"", b"no checkpoint" * 100])
def test_file_that_is_no_checkpoint(tmp_path, content):
    checkpoint = tmp_path / "vggish_model.ckpt"
    if content is not None:
        checkpoint.write_bytes(content)
    refused(
        lambda: export_vggish(checkpoint, tmp_path / "out"),
        f"^{checkpoint}: cannot be read as a TensorFlow checkpoint",
    )


def test_damaged_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(vggish, "SHAPES", {"vggish/fc2/biases": (4096,)})
    checkpoint = save_checkpoint(tmp_path / "model.ckpt", vggish.SHAPES)
    data = tmp_path / "model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-1])
    refused(lambda: export_vggish(checkpoint, tmp_path / "out"), f"^{checkpoint}: .*damaged")


# --- musicnn --------------------------------------------------------------------------------------


def test_export_carries_licence_and_identity(musicnn_teacher):
    assert "ISC" in (musicnn_teacher / "LICENSE.md").read_text()


def test_the_same_export_is_left_as_it_is(musicnn_teacher, musicnn_wheel):
    before = content_digest(musicnn_teacher), musicnn_teacher.stat().st_mtime_ns
    info = export_musicnn(musicnn_teacher, wheel=musicnn_wheel)
    assert (info.digest, musicnn_teacher.stat().st_mtime_ns) == before
    assert info.handle == str(musicnn_teacher)
    assert [path.name for path in musicnn_teacher.parent.iterdir()] == [musicnn_teacher.name]


def test_another_teacher_is_not_replaced(tiny_teacher, musicnn_wheel):
    before = content_digest(tiny_teacher)
    refused(
        lambda: export_musicnn(tiny_teacher, wheel=musicnn_wheel),
        f"^{tiny_teacher}: the folder holds another SavedModel",
    )
    assert content_digest(tiny_teacher) == before


def test_wrong_wheel(tmp_path):
    wheel = tmp_path / "musicnn-0.1.0-py3-none-any.whl"
    wheel.write_bytes(b"another")
    digest = hashlib.sha256(b"another").hexdigest()
    refused(
        lambda: export_musicnn(tmp_path / "out", wheel=wheel),
        f"^{wheel}: is not the wheel .*its sha256 is {digest}, expected {export.MUSICNN_SHA256}",
    )
    assert not (tmp_path / "out").exists()


def test_missing_wheel(tmp_path):
    refused(
        lambda: export_musicnn(tmp_path / "out", wheel=tmp_path / "none.whl"),
        "none.whl: cannot be read",
    )


def test_pip_without_an_index(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    refused(
        lambda: export_musicnn(tmp_path / "out"),
        r"pip cannot download it \(.*musicnn==0\.1\.0.*\); give pip a way .* and name the wheel$",
    )
    assert not (tmp_path / "out").exists()


def test_pip_that_hangs(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_PIP_SECONDS", 0.01)
    refused(lambda: export_musicnn(tmp_path / "out"), "pip gave up after 0 s; try again")


def test_python_without_pip(tmp_path, monkeypatch):
    monkeypatch.setattr(export.sys, "executable", "false")
    refused(lambda: export_musicnn(tmp_path / "out"), "pip cannot download it")
