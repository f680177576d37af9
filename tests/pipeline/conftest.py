import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flsep.pipeline.errors import TeacherError
from flsep.pipeline.teachers import export, vggish
from flsep.pipeline.teachers.interface import Teacher
from flsep.pipeline.teachers.loading import load_teacher
from flsep.pipeline.teachers.model_folder import import_tensorflow


@pytest.fixture(scope="session")
def vggish_numbers() -> dict[str, np.ndarray]:
    """Waveform, log mel and embeddings of a public VGGish with seeded weights."""
    with np.load(Path(__file__).parents[1] / "data" / "vggish.npz") as file:
        return dict(file)


@pytest.fixture(scope="session")
def vggish_checkpoint(
    vggish_numbers: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The seeded weights as Google released theirs: one file, version 1 of the format."""
    tf = import_tensorflow()
    rng = np.random.default_rng(int(vggish_numbers["weight_seed"]))
    folder = tmp_path_factory.mktemp("checkpoint")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        for name, shape in vggish.SHAPES.items():
            value = rng.standard_normal(shape, dtype=np.float32)
            value *= 0.01 if name.endswith("biases") else np.sqrt(2 / np.prod(shape[:-1]))
            # loaded, not initialised: a constant that large does not fit into a graph
            placeholder = tf.compat.v1.placeholder(tf.float32, shape)
            variable = tf.compat.v1.Variable(placeholder, name=name, use_resource=False)
            session.run(variable.initializer, {placeholder: value})
        saver = tf.compat.v1.train.Saver(write_version=tf.compat.v1.train.SaverDef.V1)
        saver.save(session, str(folder / "vggish_model.ckpt"), write_meta_graph=False)
    yield folder / "vggish_model.ckpt"
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def vggish_teacher(
    vggish_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """VGGish with the seeded weights, exported."""
    folder = tmp_path_factory.mktemp("teacher")
    export.export_vggish(vggish_checkpoint, folder / "vggish")
    yield folder / "vggish"
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def musicnn_wheel(request: pytest.FixtureRequest) -> Path:
    """The wheel of musicnn, which pip downloads once; pytest's cache keeps it."""
    cache = Path(request.config.cache.mkdir("musicnn"))
    kept = list(cache.glob("*.whl"))
    if not kept:
        try:
            kept = [export._download_musicnn(cache)]
        except TeacherError as error:
            pytest.skip(f"needs the package's file: {error}")
    return kept[0]


@pytest.fixture(scope="session")
def musicnn_teacher(musicnn_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's teacher: a real pretrained network."""
    out = tmp_path_factory.mktemp("teacher") / "musicnn"
    export.export_musicnn(out, wheel=musicnn_wheel)
    return out


@pytest.fixture(scope="session")
def musicnn(musicnn_teacher: Path) -> Teacher:
    """The demo's teacher, loaded once."""
    return load_teacher(musicnn_teacher)


@pytest.fixture
def tfhub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of TensorFlow Hub."""
    monkeypatch.setenv("TFHUB_CACHE_DIR", os.fspath(tmp_path / "tfhub"))
    return tmp_path / "tfhub"
