"""What makes the estimates that are scored."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flsep.cache import Shards, TrackRecord
from flsep.cache.format import fingerprint

Audio = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Estimator:
    """What makes the estimates.

    Attributes
    ----------
    kind : {'run', 'floor', 'oracle'}
        A trained model, the mixture as every estimate, or the ideal ratio mask.
    checkpoint : Path or None
        Of a run.
    wiener : bool
        Refine a run's estimates with a Wiener filter.
    """

    kind: Literal["run", "floor", "oracle"]
    checkpoint: Path | None = None
    wiener: bool = False

    def identity(self) -> str:
        """Identify the estimates: by the content of the checkpoint, not by its place."""
        digest = None
        if self.checkpoint is not None:
            with open(self.checkpoint, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        return fingerprint([self.kind, digest, self.wiener])


@dataclass(frozen=True, slots=True)
class LoadTrack:
    """Read a track's audio from the shards and estimate its sources; called where it is scored."""

    estimator: Estimator
    shards: Shards
    track: TrackRecord

    def __call__(self) -> Audio:
        """Return references and estimates, float32 [source, sample, channel]."""
        shards = self.shards
        mixture, *sources = (
            shards.read_audio(self.track, signal).T for signal in range(len(shards.layout.signals))
        )
        references = np.stack(sources)
        if self.estimator.kind == "floor":
            return references, np.broadcast_to(mixture, references.shape)
        if self.estimator.kind == "oracle":
            from flsep.trainer.scoring.references import oracle_irm

            layout = shards.layout
            return references, oracle_irm(
                references, mixture, n_fft=layout.n_fft, hop=layout.hop_samples
            )
        return references, self._separate(shards, mixture)

    def _separate(self, shards: Shards, mixture: NDArray[np.float32]) -> NDArray[np.float32]:
        import torch

        from flsep.trainer.inference.separate import TrackSeparator

        assert self.estimator.checkpoint is not None
        torch.set_num_threads(1)
        separator = TrackSeparator(
            self.estimator.checkpoint, device=torch.device("cpu"), wiener=self.estimator.wiener
        )
        embeddings = shards.read(self.track, "embedding", 0) if separator.needs_teacher else None
        blocks = list(separator.separate([mixture.T], embeddings))
        return np.concatenate(blocks, axis=2).transpose(0, 2, 1)
