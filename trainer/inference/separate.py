"""Separate audio of any length with a trained model, in overlapping chunks of bounded memory.

Shape suffixes: S sources, B batch, C channels, T samples, N frames, F bins, W windows,
E embedding dimensions.
"""

import importlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flsep.trainer.approaches.interface import find_needs
from flsep.trainer.errors import InferenceError
from flsep.trainer.inference.audio import AUDIO_SUFFIXES, WavWriters, read_blocks
from flsep.trainer.runs.checkpoint import load_checkpoint, load_model
from flsep.trainer.stft import analyse, synthesise
from flsep.trainer.teacher import TeacherWindows, held_windows

CHUNK_SECONDS = 30.0
OVERLAP_SECONDS = 4.0
_WIENER_FRAMES = 300


class TrackSeparator:
    """A trained model that separates waveforms.

    Neighbouring chunks overlap by `OVERLAP_SECONDS`. The first and the last second of a chunk are
    not used, since the network lacks context there; in between, neighbours are cross-faded.
    `wiener` refines the estimates by `filter_wiener`.

    Raises
    ------
    CheckpointError, InferenceError
        If the checkpoint cannot be used, chunks are too short, or norbert is missing.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: torch.device,
        wiener: bool = False,
        chunk_seconds: float = CHUNK_SECONDS,
    ) -> None:
        checkpoint = load_checkpoint(path)
        self.layout, self.config = checkpoint.layout, checkpoint.config
        self.needs_teacher = find_needs(self.config.approach).teacher_to_separate
        self._standard = checkpoint.standard
        self._model = load_model(checkpoint, str(path)).to(device)
        self._device = device
        self._wiener = wiener
        # A missing norbert shows now, not after the first chunk.
        if wiener:
            _import_norbert()
        # In a shorter chunk, the overlaps at both ends would run into each other.
        if not (2 * OVERLAP_SECONDS <= chunk_seconds < math.inf):
            raise InferenceError(
                f"chunks of {chunk_seconds:g} s: expected at least {2 * OVERLAP_SECONDS:g} s"
            )
        # Chunks start at whole hops, so that their frames are frames of one transform.
        self._chunk, self._overlap = (
            round(seconds * self.layout.sample_rate_hz / self.layout.hop_samples)
            * self.layout.hop_samples
            for seconds in (chunk_seconds, OVERLAP_SECONDS)
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in the order of the estimates."""
        return self.layout.sources

    def separate(
        self,
        blocks: Iterable[NDArray[np.float32]],
        embeddings: NDArray[np.float32] | None = None,
    ) -> Iterator[NDArray[np.float32]]:
        """Separate a waveform that comes in blocks of any lengths.

        `blocks`, float32 [channel, sample], have the model's rate. `embeddings`, float32
        [window, dim], are the teacher's for all windows of the waveform; a model that
        `needs_teacher` raises InferenceError if there are none.

        Yields
        ------
        ndarray
            Estimates, float32 [source, channel, sample]; together as long as the waveform.
        """
        if self.needs_teacher and (embeddings is None or not len(embeddings)):
            raise InferenceError(
                f"the model was trained with {self.config.approach.name} and needs the teacher's "
                "embeddings to separate; there are none (audio shorter than a teacher window?)"
            )
        step = self._chunk - self._overlap
        # 0 in the first quarter of the overlap, 1 in the last, linear in between.
        fade = np.clip(np.linspace(-0.5, 1.5, self._overlap, dtype=np.float32), 0, 1)
        tail: NDArray[np.float32] | None = None
        start = 0
        for chunk, is_last in self._cut(blocks, step):
            estimates_SCT = self._separate_chunk(chunk, start, embeddings)
            if tail is not None:
                estimates_SCT[..., : self._overlap] *= fade
                estimates_SCT[..., : self._overlap] += tail
            if is_last:
                yield estimates_SCT
                return
            # The overlap waits for the next chunk, of which it is the beginning.
            yield estimates_SCT[..., :step]
            tail = estimates_SCT[..., step:] * (1 - fade)
            start += step

    def _cut(
        self, blocks: Iterable[NDArray[np.float32]], step: int
    ) -> Iterator[tuple[NDArray[np.float32], bool]]:
        """Yield chunks, and whether each is the last; the last is 0.5 to 1.5 times as long."""
        buffer = np.zeros((self.layout.num_channels, 0), np.float32)
        pending: list[NDArray[np.float32]] = []
        num_pending = 0
        for block in blocks:
            pending.append(block)
            num_pending += block.shape[1]
            # Join blocks only when a chunk is due: they may be far shorter than a chunk.
            while buffer.shape[1] + num_pending > self._chunk + step // 2:
                buffer = np.concatenate([buffer, *pending], axis=1)
                pending, num_pending = [], 0
                yield buffer[:, : self._chunk], False
                buffer = buffer[:, step:]
        yield np.concatenate([buffer, *pending], axis=1), True

    @torch.inference_mode()
    def _separate_chunk(
        self, chunk: NDArray[np.float32], start: int, embeddings: NDArray[np.float32] | None
    ) -> NDArray[np.float32]:
        num_samples = chunk.shape[1]
        # The transform reflects half a window at both ends, which a short chunk does not have.
        padding = max(0, self.layout.n_fft - num_samples)
        waveform_BCT = torch.from_numpy(np.pad(chunk, ((0, 0), (0, padding))))[None]
        mixture_NBCF = analyse(
            waveform_BCT.to(self._device), self.layout.n_fft, self.layout.hop_samples
        )
        # Embeddings belong to the whole waveform: find those of this chunk's frames.
        windows = None
        if self.needs_teacher and embeddings is not None:
            windows = self._hold(embeddings, start // self.layout.hop_samples, len(mixture_NBCF))
        estimates_SNBCF = self._model(mixture_NBCF, windows).estimates_SNBCF
        if self._wiener:
            estimates_SNBCF = filter_wiener(estimates_SNBCF, mixture_NBCF)
        waveforms_SBCT = synthesise(estimates_SNBCF, self.layout.hop_samples, num_samples + padding)
        waveforms: NDArray[np.float32] = waveforms_SBCT[:, 0, :, :num_samples].cpu().numpy()
        return waveforms

    def _hold(
        self, embeddings: NDArray[np.float32], first_frame: int, num_frames: int
    ) -> TeacherWindows:
        assert self._standard is not None
        frames = np.arange(first_frame, first_frame + num_frames)
        held = held_windows(self.layout, frames, len(embeddings))
        shape = (1, len(embeddings))
        # Separating uses only `embeddings` and `held`: the rest is there for the shape.
        windows = TeacherWindows(
            embeddings=torch.from_numpy(self._standard(embeddings))[None],
            activity_db=torch.zeros(shape),
            bounds=torch.zeros(*shape, 2, dtype=torch.int64),
            inside=torch.zeros(shape, dtype=torch.bool),
            held=torch.from_numpy(held)[None],
        )
        return windows.to(self._device)


def filter_wiener(estimates_SNBCF: Tensor, mixture_NBCF: Tensor) -> Tensor:
    """Refine estimates by one EM iteration of the multichannel Wiener filter.

    Liutkus and Stoeter, "sigsep/norbert", 2019. The filter starts from the magnitudes of the
    estimates and the mixture's phase. All spectra are complex64.
    """
    norbert = _import_norbert()
    estimates, mixture = estimates_SNBCF.abs().cpu().numpy(), mixture_NBCF.cpu().numpy()
    spectra = np.empty(estimates.shape, np.complex64)
    # In blocks of frames, as open-unmix does, to bound the memory.
    for start in range(0, len(mixture), _WIENER_FRAMES):
        frames = slice(start, start + _WIENER_FRAMES)
        for item in range(mixture.shape[1]):
            # norbert wants frames first and sources last; it gets double precision.
            magnitudes_NFCS = estimates[:, frames, item].transpose(1, 3, 2, 0).astype(np.float64)
            mixture_NFC = mixture[frames, item].transpose(0, 2, 1).astype(np.complex128)
            filtered_NFCS = norbert.wiener(magnitudes_NFCS, mixture_NFC, iterations=1)
            spectra[:, frames, item] = filtered_NFCS.transpose(3, 0, 2, 1)
    return torch.from_numpy(spectra).to(mixture_NBCF.device)


def _import_norbert() -> Any:
    try:
        return importlib.import_module("norbert")
    except ImportError as error:
        raise InferenceError(
            f"--wiener needs norbert ({error}): run `pip install flsep[evaluate]`"
        ) from error


def list_audio(path: Path) -> list[Path]:
    """Return an audio file, or all those in a folder.

    Raises InferenceError if there is no audio file, or two would be written into one folder.
    """
    if not path.exists():
        raise InferenceError(f"{path}: no such file or folder")
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in AUDIO_SUFFIXES)
    if not files:
        raise InferenceError(f"{path}: holds no audio file ({', '.join(sorted(AUDIO_SUFFIXES))})")
    # The estimates of a file go to a folder with the file's name, less its suffix.
    names = [file.stem for file in files]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InferenceError(
            f"{path}: several files are named {twice[0]!r} and would be written into one folder; "
            "rename one"
        )
    return files


def choose_targets(sources: Sequence[str], targets: str | None) -> tuple[str, ...]:
    """Return the sources named in a comma-separated list; all without a list.

    Raises InferenceError if the model does not have a source.
    """
    chosen = tuple(sources) if targets is None else tuple(targets.replace(" ", "").split(","))
    if unknown := [name for name in chosen if name not in sources]:
        raise InferenceError(
            f"--targets: the model has no source {unknown[0]!r}; it has {', '.join(sources)}"
        )
    # A source that is named twice is written once.
    return tuple(dict.fromkeys(chosen))


def separate_file(
    separator: TrackSeparator,
    path: Path,
    folder: Path,
    *,
    targets: Sequence[str],
    embeddings: NDArray[np.float32] | None,
) -> float:
    """Separate a file into ``folder/<source>.wav`` and return its length in seconds.

    Nothing appears in the folder unless all succeeds. `embeddings` are those of the teacher for
    this file, as for `TrackSeparator.separate`. Raises AudioError or InferenceError if the file
    cannot be read or separated, or the folder cannot be written.
    """
    layout = separator.layout
    rate_hz, num_channels = layout.sample_rate_hz, layout.num_channels
    rows = [separator.sources.index(name) for name in targets]
    blocks = read_blocks(path, sample_rate_hz=rate_hz, num_channels=num_channels)
    num_samples = 0
    with WavWriters(folder, targets, sample_rate_hz=rate_hz, num_channels=num_channels) as writers:
        for estimates_SCT in separator.separate(blocks, embeddings):
            writers.write(estimates_SCT[rows])
            num_samples += estimates_SCT.shape[-1]
    return num_samples / rate_hz
