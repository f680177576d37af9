"""Turn the audio of one track into the datasets of a shard, block by block."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
from numpy.typing import NDArray

from flsep.cache.shards.track_writer import TrackWriter
from flsep.pipeline.corpus.media import AudioStream, decode
from flsep.pipeline.features import MagnitudeMoments, Pieces, Stft, pack
from flsep.pipeline.shards.plan import PlannedTrack
from flsep.pipeline.shards.settings import ShardSettings
from flsep.pipeline.stopwatch import Stopwatch
from flsep.pipeline.teachers.interface import Teacher
from flsep.pipeline.teachers.stream import EmbeddingStream

Blocks = Iterator[NDArray[np.float32]]  # each [channel, sample]
_SUMMED_SAMPLES = 1 << 16


class TrackBuilder:
    """Writes one track: each signal in one pass over its audio, in bounded memory.

    `seconds` takes the times of ``decode``, ``stft``, ``teacher`` and ``write``.
    """

    def __init__(
        self,
        planned: PlannedTrack,
        settings: ShardSettings,
        teacher: Teacher,
        writer: TrackWriter,
        seconds: Stopwatch,
    ) -> None:
        self._planned = planned
        self._settings = settings
        self._teacher = teacher
        self._writer = writer
        self._seconds = seconds
        self._moments = MagnitudeMoments(settings.layout.num_bins)

    def write(self) -> None:
        """Write all signals and the moments of the mixture's magnitude.

        MediaError, SignalError and TeacherError mean that this track cannot be stored.
        """
        track = self._planned.track
        sources = [partial(self._decode, source) for source in track.sources]
        if track.mixture is not None:
            mixture = partial(self._decode, track.mixture)
        else:
            # Without a mixture in the corpus, add up the sources, which are decoded once more.
            mixture = partial(_add, sources)
        for signal, read in enumerate([mixture, *sources]):
            self._write_signal(signal, read)
        self._writer.append("magnitude_moments", 0, self._moments.total)
        self._writer.append("magnitude_moments", 1, self._moments.total_squares)

    def _write_signal(self, signal: int, read: Callable[[], Blocks]) -> None:
        config = self._settings.config
        stft = Stft(n_fft=config.n_fft, hop=config.hop_samples)
        embeddings = EmbeddingStream(
            self._teacher,
            config.sample_rate_hz,
            self._settings.teacher_samples(self._planned.num_samples),
            self._seconds,
        )
        # Each block goes to spectra, audio and embeddings, so that the signal is decoded only once.
        for block in self._seconds.measure_each("decode", read()):
            self._write_spectra(signal, stft.add(block))
            self._write_audio(signal, block)
            embeddings.add(block)
        self._write_spectra(signal, stft.finish())
        embedding, activity_db = embeddings.finish()
        with self._seconds.measure("write"):
            self._writer.append_embedding(signal, embedding, activity_db)
        if self._writer.needs_audio_again(signal):
            # A block beyond full scale came after quieter ones, which have the wrong scale. The
            # writer knows the peak now: write the audio again.
            for block in self._seconds.measure_each("decode", read()):
                self._write_audio(signal, block)

    def _write_spectra(self, signal: int, spectra: Iterator[NDArray[np.complex64]]) -> None:
        for spectrum in self._seconds.measure_each("stft", spectra):
            with self._seconds.measure("stft"):
                if signal == 0:  # the mixture
                    self._moments.add(spectrum)
                packed = pack(spectrum, self._settings.config.stft_dtype)
            with self._seconds.measure("write"):
                self._writer.append("stft", signal, packed)

    def _write_audio(self, signal: int, block: NDArray[np.float32]) -> None:
        # Only the tracks of some splits store audio.
        if "audio" in self._writer.datasets:
            with self._seconds.measure("write"):
                self._writer.append_audio(signal, block)

    def _decode(self, source: AudioStream) -> Blocks:
        """Decode as many samples as planned: headers may declare a few more or fewer."""
        config, num_missing = self._settings.config, self._planned.num_samples
        for block in decode(
            source, sample_rate_hz=config.sample_rate_hz, num_channels=config.num_channels
        ):
            yield block[:, :num_missing]
            num_missing -= min(num_missing, block.shape[1])
        # The audio was shorter than its header declared: fill up with silence.
        if num_missing:
            yield np.zeros((config.num_channels, num_missing), np.float32)


def _add(signals: Iterable[Callable[[], Blocks]]) -> Blocks:
    """Add signals of one length, whose blocks may have different lengths."""
    for blocks in zip(*(_equal_blocks(read()) for read in signals), strict=True):
        # A block is the reused buffer of its `Pieces`, so add into a copy.
        total = blocks[0].copy()
        for block in blocks[1:]:
            total += block
        yield total


def _equal_blocks(blocks: Blocks) -> Blocks:
    pieces = Pieces(_SUMMED_SAMPLES, _SUMMED_SAMPLES)
    for block in blocks:
        yield from pieces.add(block)
    yield pieces.rest()
