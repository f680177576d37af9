"""What all tasks of a run over a corpus share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flsep.cache import Layout
from flsep.pipeline.config import FeatureConfig
from flsep.pipeline.teachers.interface import TeacherInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSettings:
    """What all tasks of a run share; small, and sent to every worker.

    Workers load the teacher from `teacher_folder`, and run it with `num_threads` threads; None
    leaves the number to TensorFlow. The last bits of an embedding depend on it, so it must not
    depend on the number of workers.
    """

    folder: Path
    config: FeatureConfig
    sources: tuple[str, ...]
    teacher: TeacherInfo
    teacher_folder: Path
    num_threads: int | None

    @property
    def layout(self) -> Layout:
        """What the shards will hold."""
        return Layout(
            sample_rate_hz=self.config.sample_rate_hz,
            num_channels=self.config.num_channels,
            n_fft=self.config.n_fft,
            hop_samples=self.config.hop_samples,
            stft_dtype=self.config.stft_dtype,
            sources=self.sources,
            teacher=self.teacher.handle,
            teacher_digest=self.teacher.digest,
            embedding_size=self.teacher.dim,
            window_seconds=self.teacher.window_samples / self.teacher.sample_rate_hz,
            window_hop_seconds=self.teacher.hop_samples / self.teacher.sample_rate_hz,
        )

    def fingerprinted(self) -> dict[str, Any]:
        """Return the configuration whose fingerprint ties shards together."""
        # The identity holds the teacher's digest, but not the address that the teacher came from.
        return {**self.config.to_json(), "layout": self.layout.identity()}

    def teacher_samples(self, num_samples: int) -> int:
        """Convert a length in samples of the shards into samples of the teacher."""
        return num_samples * self.teacher.sample_rate_hz // self.config.sample_rate_hz
