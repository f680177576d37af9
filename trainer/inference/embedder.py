"""The teacher's embeddings of an audio file, for models that need them to separate.

This is the only place where the trainer calls the pipeline, and only if it is installed.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flsep.trainer.errors import InferenceError
from flsep.trainer.inference.audio import read_blocks
from flsep.trainer.inference.separate import TrackSeparator

_WINDOWS_AT_A_TIME = 64

Embed = Callable[[Path], NDArray[np.float32]]
"""Audio file -> the teacher's embedding of each window, float32 [window, dim]."""


def load_embedder(separator: TrackSeparator, teacher: str | None) -> Embed | None:
    """Return a function that embeds a file if the model needs it, else None.

    `teacher` is a handle; None stands for the handle that the shards were made with. Raises
    InferenceError if the pipeline is not installed, the teacher is another one, or one is given
    and the model needs none.
    """
    layout = separator.layout
    if not separator.needs_teacher:
        if teacher is not None:
            raise InferenceError(
                f"--teacher: a model trained with {separator.config.approach.name} separates "
                "without it; leave it out"
            )
        return None
    try:
        pipeline = importlib.import_module("flsep.pipeline.teachers.loading")
        # The pipeline is a part of flsep and imports without its extra, which brings this package.
        importlib.metadata.version("tensorflow-hub")
    except ImportError as error:
        raise InferenceError(
            f"a model trained with {separator.config.approach.name} needs its teacher to separate, "
            f"and {error.name} is not installed: run `pip install flsep[pipeline]`"
        ) from error
    loaded = pipeline.load_teacher(teacher or layout.teacher)
    # Another teacher's embeddings may have the same shape, but mean something else.
    if loaded.info.digest != layout.teacher_digest:
        raise InferenceError(
            f"the teacher {loaded.info.handle} has the digest {loaded.info.digest[:12]}..., the "
            f"model was trained with {layout.teacher} of {layout.teacher_digest[:12]}...: "
            "give that one with --teacher"
        )

    def embed(path: Path) -> NDArray[np.float32]:
        info = loaded.info
        blocks = read_blocks(
            path, sample_rate_hz=info.sample_rate_hz, num_channels=layout.num_channels
        )
        return embed_blocks(loaded, blocks, info.window_samples, info.hop_samples)

    return embed


def embed_blocks(
    teacher: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    blocks: Iterable[NDArray[np.float32]],
    window_samples: int,
    hop_samples: int,
) -> NDArray[np.float32]:
    """Embed the mono downmix of a waveform that comes in blocks, a few windows at a time.

    `teacher` maps float32 [sample] to float32 [window, dim]; `blocks` are float32 [channel, sample]
    at its rate. Returns the embedding of every window that lies inside the waveform, float32
    [window, dim].
    """
    # So many samples hold the first windows; the next ones begin `step` samples later.
    step = _WINDOWS_AT_A_TIME * hop_samples
    enough = step - hop_samples + window_samples
    embeddings = []
    buffer = np.zeros(0, np.float32)
    for block in blocks:
        buffer = np.concatenate([buffer, block.mean(axis=0, dtype=np.float32)])
        while len(buffer) >= enough:
            embeddings.append(teacher(buffer[:enough]))
            buffer = buffer[step:]
    # The buffer starts at the first window that is not embedded yet.
    if len(buffer) >= window_samples:
        embeddings.append(teacher(buffer))
    return np.concatenate(embeddings) if embeddings else np.zeros((0, 0), np.float32)
