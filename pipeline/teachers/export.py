"""Build teachers for machines that cannot reach TensorFlow Hub."""

from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flsep.pipeline.errors import TeacherError
from flsep.pipeline.teachers import musicnn, vggish
from flsep.pipeline.teachers.interface import Teacher, TeacherInfo
from flsep.pipeline.teachers.loading import load_teacher
from flsep.pipeline.teachers.model_folder import (
    content_digest,
    import_tensorflow,
    one_line,
    published_folder,
)
from flsep.pipeline.teachers.savedmodel import EACH

MUSICNN_REQUIREMENT = "musicnn==0.1.0"
MUSICNN_SHA256 = "f38a4890c648c1ddbb141c5d96d2b0a8cfcd36746002d896989f7b88beb65cfa"

_MUSICNN_MODEL = "MTT_vgg"
_MUSICNN_LICENCE = "musicnn-0.1.0.dist-info/LICENSE.md"
_PIP_SECONDS = 600.0
_SINE_TOLERANCE = 0.1


@dataclass(frozen=True, slots=True)
class SineCheck:
    """Embeddings of a 3 s, 1 kHz sine of amplitude 1, compared with Google's released weights.

    Mean and standard deviation are taken over all windows and dimensions.
    """

    mean: float
    standard_deviation: float

    RELEASED_MEAN = -0.0333
    RELEASED_STANDARD_DEVIATION = 0.380

    @property
    def is_released(self) -> bool:
        """Whether both numbers are within 10 % of the released weights'."""
        return bool(
            np.isclose(self.mean, self.RELEASED_MEAN, rtol=_SINE_TOLERANCE, atol=0)
            and np.isclose(
                self.standard_deviation,
                self.RELEASED_STANDARD_DEVIATION,
                rtol=_SINE_TOLERANCE,
                atol=0,
            )
        )


def export_vggish(checkpoint: Path, out: Path) -> TeacherInfo:
    """Build google/vggish/1 from Google's released checkpoint and save it in `out`.

    `checkpoint` is ``vggish_model.ckpt``, or the prefix of a checkpoint in several files.
    TeacherError means that it cannot be read or lacks a variable, or that `out` holds another
    model.
    """
    tf = import_tensorflow()
    variables = _read_checkpoint(tf, checkpoint, vggish.SHAPES, str(checkpoint))
    return _export(tf, out, variables, {"__call__": vggish.embed, EACH: vggish.embed})


def check_vggish(folder: Path) -> SineCheck:
    """Embed the sine that tells whether a VGGish has Google's released weights."""
    times = np.arange(3 * vggish.SAMPLE_RATE_HZ) / vggish.SAMPLE_RATE_HZ
    embedding = load_teacher(folder)(np.sin(2 * np.pi * 1000 * times).astype(np.float32))
    return SineCheck(float(embedding.mean()), float(embedding.std()))


def export_musicnn(out: Path, *, wheel: Path | None = None) -> TeacherInfo:
    """Build a teacher from the checkpoint that the package musicnn 0.1.0 carries.

    `out` receives the SavedModel and the package's licence. Without `wheel`, pip downloads the
    package. TeacherError means that the wheel cannot be downloaded or is another one, or that `out`
    holds another model.
    """
    tf = import_tensorflow()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        archive = _unpack_musicnn(wheel or _download_musicnn(folder), folder)
        prefix = folder / "musicnn" / _MUSICNN_MODEL / "model"
        variables = _read_checkpoint(tf, prefix, musicnn.SHAPES, str(archive))
        licence = (folder / _MUSICNN_LICENCE).read_bytes()
    functions = {"__call__": musicnn.embed, EACH: musicnn.embed, "tags": musicnn.tag}
    return _export(tf, out, variables, functions, {"LICENSE.md": licence})


def musicnn_tags(folder: Path, waveform: NDArray[np.float32]) -> list[tuple[str, float]]:
    """Tag a waveform with a teacher that `export_musicnn` made.

    Parameters
    ----------
    waveform : float32 [sample]
        Mono, 16 kHz, at least one window long.

    Returns
    -------
    list of (str, float)
        Tags and their likelihoods, averaged over windows; the most likely first.
    """
    tf = import_tensorflow()
    model = tf.saved_model.load(str(folder))
    if not hasattr(model, "tags"):
        raise TeacherError(f"teacher {folder}: has no tags, expected one of `export musicnn`")
    likelihoods = model.tags(tf.constant(waveform)).numpy().mean(axis=0)
    return sorted(
        zip(musicnn.TAGS, map(float, likelihoods), strict=True), key=lambda item: -item[1]
    )


def _export(
    tf: Any,
    out: Path,
    variables: Mapping[str, NDArray[np.float32]],
    functions: Mapping[str, Callable[[Any, Mapping[str, Any], Any], Any]],
    companions: Mapping[str, bytes] | None = None,
) -> TeacherInfo:
    """Save functions of (tf, variables, waveform) as one SavedModel, and load it as a teacher."""
    with published_folder(out, lambda _, old: _embed_the_same(teacher, old)) as staging:
        module = tf.Module()
        # TensorFlow saves what is attached to the module, and refuses functions that use other
        # variables.
        module.parameters = {
            name.replace("/", "."): tf.Variable(value, trainable=False, name=name)
            for name, value in variables.items()
        }
        by_name = dict(zip(variables, module.parameters.values(), strict=True))
        for name, function in functions.items():
            # The signature leaves lengths open: each function is traced once and takes any audio.
            shape = [None, None] if name == EACH else [None]
            signature = [tf.TensorSpec(shape, tf.float32, name="waveform")]
            bound = functools.partial(function, tf, by_name)
            setattr(module, name, tf.function(bound, input_signature=signature))
        try:
            tf.saved_model.save(module, str(staging))
        except tf.errors.OpError as error:
            raise TeacherError(f"{out}: cannot be written ({one_line(error)})") from error
        for name, content in (companions or {}).items():
            (staging / name).write_bytes(content)
        # Loading checks the windows. It comes before the folder is renamed, so that `out` never
        # holds a model that is no teacher.
        teacher = load_teacher(staging)
    # The staging folder is gone by now. If `out` held an equal export before, it has stayed, with a
    # digest of its own.
    return replace(teacher.info, handle=str(out), digest=content_digest(out))


def _embed_the_same(new: Teacher, folder: Path) -> bool:
    """Compare embeddings of noise: equal exports may differ in the names of their graphs."""
    try:
        old = load_teacher(folder)
    except TeacherError:
        return False
    # Handle and digest may differ between equal exports; rate, windows and dimension may not.
    if replace(new.info, handle="", digest="") != replace(old.info, handle="", digest=""):
        return False
    num_samples = new.info.window_samples + new.info.hop_samples
    noise = np.random.default_rng(0).standard_normal(num_samples, dtype=np.float32)
    return np.array_equal(new(noise), old(noise))


def _read_checkpoint(
    tf: Any, prefix: Path, shapes: Mapping[str, tuple[int, ...]], origin: str
) -> dict[str, NDArray[np.float32]]:
    """Read the named variables of a TensorFlow 1 checkpoint; `origin` names it in errors."""
    try:
        reader = tf.train.load_checkpoint(str(prefix))
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise TeacherError(
            f"{origin}: cannot be read as a TensorFlow checkpoint ({one_line(error)})"
        ) from error
    # Compare all shapes before any value is read, to tell another model's checkpoint from a damaged
    # one.
    found = reader.get_variable_to_shape_map()
    for name, shape in shapes.items():
        if name not in found:
            raise TeacherError(f"{origin}: the checkpoint has no variable {name}")
        if tuple(found[name]) != shape:
            raise TeacherError(
                f"{origin}: the checkpoint's {name} is {list(found[name])}, expected {list(shape)}"
            )
    try:
        return {name: reader.get_tensor(name) for name in shapes}
    except (tf.errors.OpError, ValueError, RuntimeError, IndexError) as error:
        raise TeacherError(f"{origin}: the checkpoint is damaged ({one_line(error)})") from error


def _download_musicnn(folder: Path) -> Path:
    """Download the package's wheel into `folder` with pip, without its outdated dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", "--quiet", "--retries", "1"]
    command += ["--dest", str(folder), MUSICNN_REQUIREMENT]
    remedy = f"or run `pip download --no-deps {MUSICNN_REQUIREMENT}` elsewhere and name the wheel"
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise TeacherError(
            f"{MUSICNN_REQUIREMENT}: pip gave up after {_PIP_SECONDS:.0f} s; try again, {remedy}"
        ) from error
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        # pip may print warnings too: report its first error, or else its last line.
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("ERROR:")), (lines or [""])[-1])
        raise TeacherError(
            f"{MUSICNN_REQUIREMENT}: pip cannot download it "
            f"({one_line(reason.removeprefix('ERROR:'))}); give pip a way to an index, {remedy}"
        )
    return wheels[0]


def _unpack_musicnn(wheel: Path, folder: Path) -> Path:
    """Check a wheel's hash, unpack checkpoint and licence under `folder`; return the wheel."""
    try:
        content = wheel.read_bytes()
    except OSError as error:
        raise TeacherError(f"{wheel}: cannot be read ({error.strerror})") from error
    # Nothing is unpacked from a file before its hash is known to be right.
    digest = hashlib.sha256(content).hexdigest()
    if digest != MUSICNN_SHA256:
        raise TeacherError(
            f"{wheel}: is not the wheel of {MUSICNN_REQUIREMENT}, its sha256 is {digest}, "
            f"expected {MUSICNN_SHA256}"
        )
    model = f"musicnn/{_MUSICNN_MODEL}"
    with zipfile.ZipFile(wheel) as package:
        package.extract(_MUSICNN_LICENCE, folder)
        # The names of the checkpoint's files are bare suffixes, which its reader does not accept.
        for ending in (".index", ".data-00000-of-00001"):
            package.extract(f"{model}/{ending}", folder)
            (folder / model / ending).rename(folder / model / f"model{ending}")
    return wheel
