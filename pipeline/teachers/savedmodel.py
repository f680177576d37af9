"""Load and call teachers: SavedModels that map a mono waveform to one embedding a window.

A model does not declare its windows: they are found by calling the model as a black box. Long
waveforms are fed in chunks of whole windows, which bounds the memory.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from flsep.pipeline.errors import TeacherError
from flsep.pipeline.teachers.interface import Teacher, TeacherInfo
from flsep.pipeline.teachers.model_folder import (
    content_digest,
    import_tensorflow,
    one_line,
)

SAMPLE_RATE_HZ = 16000
_SHORTEST_PROBE_SAMPLES = SAMPLE_RATE_HZ
_LONGEST_PROBE_SAMPLES = 64 * SAMPLE_RATE_HZ  # two windows must fit
_NUM_CHECKED_WINDOWS = 5
_CHUNK_TOLERANCE = 1e-3  # relative to the largest embedding value

EACH = "each"
"""Name of an optional function of the model: float32 [waveform, sample] -> [window, dim]."""


class SavedModelTeacher(Teacher):
    """A teacher that is a SavedModel; `SavedModelTeacher.load` makes one."""

    def __init__(self, model: _Function, info: TeacherInfo, *, batch_windows: int) -> None:
        self._model = model
        self.info = info
        self.batch_windows = batch_windows

    @classmethod
    def load(
        cls,
        name: str,
        folder: Path,
        *,
        batch_windows: int,
        num_threads: int | None,
        info: TeacherInfo | None,
    ) -> Self:
        """Load the SavedModel in a folder; `load_teacher` documents the parameters."""
        if batch_windows < 1:
            raise ValueError(f"batch_windows is {batch_windows}, expected 1 or more")
        tf = import_tensorflow()
        _configure(tf, num_threads)
        import tensorflow_hub

        try:
            model = tensorflow_hub.load(str(folder))
        except Exception as error:  # a damaged file may make the loader raise anything
            raise TeacherError(
                f"teacher {name}: {folder} cannot be loaded as a SavedModel ({one_line(error)}); "
                "delete that folder and make or download it again"
            ) from error
        function = _Function(name, model)
        digest = content_digest(folder)
        # The search for windows takes many calls of the model: skip it if its result is known.
        if info is not None:
            return cls(function, replace(info, digest=digest), batch_windows=batch_windows)
        window_samples, hop_samples, dim = _find_windows(function)
        info = TeacherInfo(
            handle=name,
            digest=digest,
            sample_rate_hz=SAMPLE_RATE_HZ,
            dim=dim,
            window_samples=window_samples,
            hop_samples=hop_samples,
        )
        _check_chunks(function, info)
        return cls(function, info, batch_windows=batch_windows)

    def __call__(self, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embed a waveform in chunks of whole windows, float32 [sample] to [window, dim]."""
        if waveform.ndim != 1 or waveform.dtype != np.float32:
            raise ValueError(
                f"teacher {self.info.handle}: found a waveform {waveform.dtype} "
                f"{list(waveform.shape)}, expected float32 [sample]"
            )
        if len(waveform) < self.info.window_samples:
            raise ValueError(
                f"teacher {self.info.handle}: found a waveform of {len(waveform)} samples, "
                f"expected at least one window of {self.info.window_samples} "
                f"at {self.info.sample_rate_hz} Hz"
            )
        return _embed_in_chunks(self._model, self.info, waveform, self.batch_windows)

    def embed_each(self, waveforms: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embed short waveforms of one length, in large batches if the model has `EACH`."""
        info = self.info
        num_windows = 1 + (waveforms.shape[1] - info.window_samples) // info.hop_samples
        if not self._model.has_each or num_windows < 1:
            return np.stack([self(waveform) for waveform in waveforms])
        # Memory depends on the number of windows in a call, whichever waveforms they come from.
        at_once = max(1, self.batch_windows // num_windows)
        parts = [
            self._model.embed_each(waveforms[first : first + at_once])
            for first in range(0, len(waveforms), at_once)
        ]
        return np.concatenate(parts).reshape(len(waveforms), num_windows, info.dim)


class _Function:
    """The model's function; checks the result of every call."""

    def __init__(self, name: str, model: Any) -> None:
        if not callable(model):
            signatures = ", ".join(getattr(model, "signatures", {})) or "none"
            raise TeacherError(
                f"teacher {name}: the SavedModel is not callable (its signatures: {signatures}), "
                "expected a function of float32 [sample]"
            )
        self.name = name
        self._model = model
        self._tf = import_tensorflow()

    @property
    def has_each(self) -> bool:
        """Whether the model takes several waveforms in one call."""
        return callable(getattr(self._model, EACH, None))

    def embed_each(self, waveforms: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return float32 [window, dim]: all windows of the first waveform, then of the next."""
        return self._check(getattr(self._model, EACH)(self._tf.constant(waveforms)), waveforms)

    def __call__(self, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        return self._check(self._model(self._tf.constant(waveform)), waveform)

    def _check(self, result: Any, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        if not self._tf.is_tensor(result):
            raise TeacherError(
                f"teacher {self.name}: returns a {type(result).__name__}, "
                "expected one tensor float32 [window, dim]"
            )
        if result.dtype != self._tf.float32 or len(result.shape) != 2:
            raise TeacherError(
                f"teacher {self.name}: returns {result.dtype.name} {result.shape.as_list()} for "
                f"float32 {list(waveform.shape)}, expected float32 [window, dim]"
            )
        embedding: NDArray[np.float32] = result.numpy()
        if not np.isfinite(embedding).all():
            raise TeacherError(
                f"teacher {self.name}: returns values that are not finite "
                f"for {waveform.size} samples of audio"
            )
        return embedding

    def count_windows(self, waveform: NDArray[np.float32]) -> int:
        """Count the windows of a probe; 0 if the model refuses it as too short."""
        try:
            return len(self(waveform))
        # The model took the input and returned something wrong, so the length is not the problem.
        except TeacherError:
            raise
        except Exception:  # every model refuses short input in its own way
            return 0

    def describe_input(self) -> str:
        """Describe the input signatures of the SavedModel's function."""
        functions = getattr(self._model.__call__, "concrete_functions", [])
        inputs = {str(spec) for f in functions for spec in f.structured_input_signature[0]}
        return " or ".join(sorted(inputs)) or "nothing known"


def _configure(tf: Any, num_threads: int | None) -> None:
    """Set threads and GPU memory growth, which is possible only before TensorFlow starts."""
    threading = tf.config.threading
    # 0 means TensorFlow's default: every core in the process's CPU affinity, whatever its cgroup.
    running = threading.get_intra_op_parallelism_threads() or len(os.sched_getaffinity(0))
    try:
        for gpu in tf.config.list_physical_devices("GPU"):
            if not tf.config.experimental.get_memory_growth(gpu):
                tf.config.experimental.set_memory_growth(gpu, True)
        # A running TensorFlow refuses every change, so ask for none if the value is right already.
        if num_threads is not None and num_threads != running:
            threading.set_intra_op_parallelism_threads(num_threads)
            threading.set_inter_op_parallelism_threads(1)
    except RuntimeError as error:
        raise TeacherError(
            f"num_threads={num_threads} or GPU memory growth cannot take effect, TensorFlow runs "
            f"already in this process with {running} threads; load the teacher before anything "
            "else uses TensorFlow, or in a process of its own"
        ) from error


def _find_windows(function: _Function) -> tuple[int, int, int]:
    """Find window, hop (both in samples) and dimension by calling the model on noise."""
    noise = _noise(_LONGEST_PROBE_SAMPLES)
    # Double the probe until it holds two windows, which is as much as the hop needs.
    long = _SHORTEST_PROBE_SAMPLES
    while function.count_windows(noise[:long]) < 2:
        long *= 2
        if long > _LONGEST_PROBE_SAMPLES:
            raise _refusal(function, noise)
    # The shortest input with one window is a window long; with two, it is a hop longer.
    window_samples = _fewest_samples(function, noise[:long], 1)
    two_windows = _fewest_samples(function, noise[:long], 2, more_than=window_samples)
    dim = function(noise[:window_samples]).shape[1]
    return window_samples, two_windows - window_samples, dim


def _fewest_samples(
    function: _Function, noise: NDArray[np.float32], num_windows: int, more_than: int = 0
) -> int:
    """Find by bisection the shortest beginning of `noise` that gives `num_windows`."""
    # Invariant: `low` samples hold too few windows, `high` samples hold enough.
    low, high = more_than, len(noise)
    while high - low > 1:
        middle = (low + high) // 2
        if function.count_windows(noise[:middle]) >= num_windows:
            high = middle
        else:
            low = middle
    return high


def _refusal(function: _Function, noise: NDArray[np.float32]) -> TeacherError:
    """Return the error for a model that gives fewer than two windows for the longest probe."""
    try:
        found = f"gives {len(function(noise))} windows for {len(noise)} samples, expected 2 or more"
        cause = None
    except Exception as error:
        found = (
            f"takes {function.describe_input()}, expected float32 [sample] "
            f"(calling it with that: {one_line(error)})"
        )
        cause = error
    refusal = TeacherError(f"teacher {function.name}: {found}")
    refusal.__cause__ = cause
    return refusal


def _check_chunks(function: _Function, info: TeacherInfo) -> None:
    """Raise TeacherError unless chunks of two windows give what the whole gives."""
    # One sample less than a further window needs: the number of windows is checked at its edge.
    num_samples = info.window_samples + _NUM_CHECKED_WINDOWS * info.hop_samples - 1
    waveform = _noise(num_samples)
    whole = function(waveform)
    if len(whole) != _NUM_CHECKED_WINDOWS:
        raise TeacherError(
            f"teacher {info.handle}: gives {len(whole)} windows for {num_samples} samples, "
            f"expected {_NUM_CHECKED_WINDOWS} of {info.window_samples} samples, one every "
            f"{info.hop_samples}"
        )
    difference = np.abs(whole - _embed_in_chunks(function, info, waveform, 2)).max()
    largest = np.abs(whole).max()
    if function.has_each:
        # The second waveform differs, so that a wrong order of the windows shows.
        each = function.embed_each(np.stack([waveform, -waveform]))[:_NUM_CHECKED_WINDOWS]
        if each.shape != whole.shape or np.abs(each - whole).max() > _CHUNK_TOLERANCE * largest:
            raise TeacherError(
                f"teacher {info.handle}: its function {EACH!r} gives other embeddings than the "
                "teacher itself; expected those of the first waveform, then those of the next"
            )
    if difference > _CHUNK_TOLERANCE * largest:
        raise TeacherError(
            f"teacher {info.handle}: is not shift-invariant, chunks of audio give embeddings that "
            f"differ by {difference:.3g} of {largest:.3g}; expected windows that depend on their "
            f"own {info.window_samples} samples alone"
        )


def _embed_in_chunks(
    function: _Function, info: TeacherInfo, waveform: NDArray[np.float32], batch_windows: int
) -> NDArray[np.float32]:
    window_samples, hop_samples = info.window_samples, info.hop_samples
    num_windows = 1 + (len(waveform) - window_samples) // hop_samples
    embedding = np.empty((num_windows, info.dim), np.float32)
    for first in range(0, num_windows, batch_windows):
        stop = min(first + batch_windows, num_windows)
        # From the first sample of the first window to the last sample of the last one.
        chunk = waveform[first * hop_samples : (stop - 1) * hop_samples + window_samples]
        part = function(chunk)
        if part.shape != (stop - first, info.dim):
            raise TeacherError(
                f"teacher {info.handle}: returns {list(part.shape)} for {len(chunk)} samples, "
                f"expected {[stop - first, info.dim]}"
            )
        embedding[first:stop] = part
    return embedding


def _noise(num_samples: int) -> NDArray[np.float32]:
    return 0.1 * np.random.default_rng(0).standard_normal(num_samples, dtype=np.float32)
