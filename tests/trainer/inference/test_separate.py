import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from flsep.cache import Layout, Shards
from flsep.trainer.approaches.informed import build_model
from flsep.trainer.config import TrainConfig
from flsep.trainer.errors import CheckpointError, InferenceError
from flsep.trainer.inference.separate import (
    TrackSeparator,
    choose_targets,
    filter_wiener,
    list_audio,
    separate_file,
)
from flsep.trainer.runs.checkpoint import Checkpoint, save_checkpoint
from flsep.trainer.stft import analyse, synthesise
from flsep.trainer.teacher import Standard

CPU = torch.device("cpu")
# norbert 0.2.1 takes a function from where SciPy no longer wants it.
old_scipy_name = pytest.mark.filterwarnings("ignore:Please import `gaussian_filter1d`")


@pytest.fixture(scope="module")
def save(
    tiny: Callable[..., TrainConfig],
    layout: Layout,
    shards: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:
    """Save an untrained model whose masks differ from frame to frame."""
    statistics = Shards(shards).index.statistics

    def make(*settings: str, **changes: object) -> Path:
        config = tiny("separator.hidden_size=16", *settings)
        changed = replace(layout, **changes)  # type: ignore[arg-type]
        model = build_model(config, changed, statistics)
        path = tmp_path_factory.mktemp("model") / "best.safetensors"
        checkpoint = Checkpoint(
            config=config,
            layout=changed,
            standard=Standard(np.full(6, 0.25, np.float32), np.full(6, 2, np.float32)),
            fingerprint="",
            epoch=1,
            metrics={},
            packages={},
            training=None,
            tensors={f"model.{name}": value for name, value in model.state_dict().items()},
        )
        save_checkpoint(path, checkpoint)
        return path

    return make


@pytest.fixture
def waveform(tracks: dict[str, tuple[str, np.ndarray]]) -> np.ndarray:
    """Half a minute of music, float32 [channel, sample]."""
    whole = np.concatenate([waveforms[0] for _, waveforms in tracks.values()], axis=1)
    return np.tile(whole, (1, 2))[:, :250_007]


def separate(separator: TrackSeparator, waveform: np.ndarray, *args: object) -> np.ndarray:
    return np.concatenate(list(separator.separate([waveform], *args)), axis=2)  # type: ignore[arg-type]


def test_one_chunk_is_the_model_itself(save: Callable[..., Path], waveform: np.ndarray) -> None:
    separator = TrackSeparator(save(), device=CPU)
    short = waveform[:, :20_000]
    with torch.no_grad():
        mixture = analyse(torch.from_numpy(short)[None], 256, 64)
        estimates = separator._model(mixture, None).estimates_SNBCF
        expected = synthesise(estimates, 64, 20_000)[:, 0].numpy()
    np.testing.assert_array_equal(separate(separator, short), expected)


def test_chunks_give_nearly_what_the_whole_gives(
    save: Callable[..., Path], waveform: np.ndarray
) -> None:
    path = save()
    whole = separate(TrackSeparator(path, device=CPU, chunk_seconds=60), waveform)
    assert whole.shape == (3, 2, waveform.shape[1])
    chunked = separate(TrackSeparator(path, device=CPU, chunk_seconds=8), waveform)
    assert chunked.shape == whole.shape
    error = np.square(chunked - whole).sum() / np.square(whole).sum()
    assert 0 < error < 1e-5


def test_the_fades_add_up_to_one(save: Callable[..., Path], waveform: np.ndarray) -> None:
    # A model that returns the mixture: chunked or not, nothing may be lost or doubled.
    separator = TrackSeparator(save(), device=CPU, chunk_seconds=8)
    separator._separate_chunk = (  # type: ignore[method-assign]
        lambda chunk, start, embeddings: np.stack([chunk] * 3).copy()
    )
    separated = separate(separator, waveform)
    np.testing.assert_allclose(separated, np.stack([waveform] * 3), atol=1e-6)


@pytest.mark.parametrize("block", [1_000, 7_919, 100_000])
def test_blocks_do_not_matter(save: Callable[..., Path], waveform: np.ndarray, block: int) -> None:
    separator = TrackSeparator(save(), device=CPU, chunk_seconds=8)
    blocks = [waveform[:, i : i + block] for i in range(0, waveform.shape[1], block)]
    found = np.concatenate(list(separator.separate(blocks)), axis=2)
    np.testing.assert_array_equal(found, separate(separator, waveform))


def test_memory_is_bounded_by_the_chunk(save: Callable[..., Path]) -> None:
    separator = TrackSeparator(save(), device=CPU, chunk_seconds=8)
    lengths = []
    inner = separator._separate_chunk

    def spy(chunk: np.ndarray, start: int, embeddings: None) -> np.ndarray:
        lengths.append(chunk.shape[1])
        return inner(chunk, start, embeddings)

    separator._separate_chunk = spy  # type: ignore[method-assign]
    blocks = (np.zeros((2, 8_000), np.float32) for _ in range(45))
    total = sum(part.shape[2] for part in separator.separate(blocks))
    assert total == 45 * 8_000
    assert len(lengths) > 8
    assert set(lengths[:-1]) == {64_000}
    assert 32_000 <= lengths[-1] <= 96_000


@pytest.mark.parametrize("num_samples", [1, 100, 129, 300])
def test_tracks_shorter_than_a_window(save: Callable[..., Path], num_samples: int) -> None:
    separator = TrackSeparator(save(), device=CPU)
    estimates = separate(separator, np.full((2, num_samples), 0.1, np.float32))
    assert estimates.shape == (3, 2, num_samples)
    assert np.isfinite(estimates).all()


def test_concat_holds_each_window_over_its_frames(
    save: Callable[..., Path], waveform: np.ndarray
) -> None:
    separator = TrackSeparator(save("approach.name=concat"), device=CPU, chunk_seconds=8)
    assert separator.needs_teacher
    num_windows = waveform.shape[1] // 2400
    rng = np.random.default_rng(0)
    embeddings = rng.standard_normal((num_windows, 6), dtype=np.float32)
    windows = separator._hold(embeddings, 38, 40)
    torch.testing.assert_close(windows.embeddings[0], torch.from_numpy((embeddings - 0.25) * 2))
    assert windows.held.tolist() == [[1] * 37 + [2] * 3]
    chunked = separate(separator, waveform, embeddings)
    longer = TrackSeparator(separator_path(separator, save), device=CPU, chunk_seconds=60)
    whole = separate(longer, waveform, embeddings)
    assert np.square(chunked - whole).sum() / np.square(whole).sum() < 1e-5
    other = separate(separator, waveform, embeddings[::-1].copy())
    assert np.square(chunked - other).sum() / np.square(whole).sum() > 1e-7
    with pytest.raises(InferenceError, match="was trained with concat and needs the teacher's"):
        separate(separator, waveform)


def separator_path(separator: TrackSeparator, save: Callable[..., Path]) -> Path:
    return save("approach.name=concat")  # the same seed gives the same weights


@old_scipy_name
def test_wiener_estimates_add_up_to_the_mixture(
    save: Callable[..., Path], waveform: np.ndarray
) -> None:
    path = save()
    short = waveform[:, :30_000].copy()
    short[:, 10_000:14_000] = 0  # silence must not become NaN
    estimates = separate(TrackSeparator(path, device=CPU, wiener=True), short)
    np.testing.assert_allclose(estimates.sum(0), short, atol=2e-3)
    plain = separate(TrackSeparator(path, device=CPU), short)
    assert np.abs(plain.sum(0) - short).max() > 0.05


@old_scipy_name
def test_wiener_in_blocks_equals_wiener_of_each_block() -> None:
    norbert = pytest.importorskip("norbert")
    torch.manual_seed(0)
    estimates = torch.rand(2, 310, 1, 2, 5)
    mixture = torch.randn(310, 1, 2, 5, dtype=torch.complex64)
    found = filter_wiener(estimates, mixture)
    for frames in (slice(0, 300), slice(300, 310)):
        expected = norbert.wiener(
            estimates[:, frames, 0].permute(1, 3, 2, 0).double().numpy(),
            mixture[frames, 0].permute(0, 2, 1).to(torch.complex128).numpy(),
            iterations=1,
        )
        np.testing.assert_allclose(
            found[:, frames, 0].permute(1, 3, 2, 0), expected, rtol=1e-4, atol=1e-5
        )


def test_missing_norbert_is_one_line(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "norbert", None)
    with pytest.raises(InferenceError, match=r"--wiener needs norbert .*`pip install flsep"):
        TrackSeparator(save(), device=CPU, wiener=True)


def test_chunks_too_short_and_checkpoints_missing(
    save: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InferenceError, match="chunks of 5 s: expected at least 8 s"):
        TrackSeparator(save(), device=CPU, chunk_seconds=5)
    with pytest.raises(InferenceError, match="chunks of nan s: expected at least 8 s"):
        TrackSeparator(save(), device=CPU, chunk_seconds=float("nan"))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        TrackSeparator(tmp_path / "best.safetensors", device=CPU)


def test_targets_go_by_name() -> None:
    sources = ("drums", "bass", "vocals")
    assert choose_targets(sources, None) == sources
    assert choose_targets(sources, "vocals, drums,vocals") == ("vocals", "drums")
    with pytest.raises(InferenceError, match="no source 'voice'; it has drums, bass, vocals"):
        choose_targets(sources, "voice")


def test_files_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InferenceError, match="no such file or folder"):
        list_audio(tmp_path / "gone")
    with pytest.raises(InferenceError, match="holds no audio file"):
        list_audio(tmp_path)
    for name in ("b.wav", "a.MP3", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in list_audio(tmp_path)] == ["a.MP3", "b.wav"]
    (tmp_path / "a.wav").touch()
    with pytest.raises(InferenceError, match="several files are named 'a'"):
        list_audio(tmp_path)


def test_targets_are_written_in_their_files(
    save: Callable[..., Path], waveform: np.ndarray, tmp_path: Path
) -> None:
    # A source picked by position in place of its name is the classic mistake.
    separator = TrackSeparator(save(), device=CPU, chunk_seconds=8)
    soundfile.write(tmp_path / "song.wav", waveform.T, 8000, "FLOAT")
    seconds = separate_file(
        separator,
        tmp_path / "song.wav",
        tmp_path / "out",
        targets=("vocals", "drums"),
        embeddings=None,
    )
    assert seconds == waveform.shape[1] / 8000
    expected = separate(separator, waveform)
    for name, row in (("vocals", 2), ("drums", 0)):
        found, rate_hz = soundfile.read(tmp_path / "out" / f"{name}.wav", dtype="float32")
        assert rate_hz == 8000
        np.testing.assert_array_equal(found.T, expected[row])
    assert not (tmp_path / "out" / "bass.wav").exists()


def test_a_mono_model(save: Callable[..., Path], waveform: np.ndarray, tmp_path: Path) -> None:
    separator = TrackSeparator(save(num_channels=1), device=CPU)
    assert separate(separator, waveform[:1, :9_000]).shape == (3, 1, 9_000)


@old_scipy_name
def test_wiener_spectra_invert() -> None:
    torch.manual_seed(0)
    mixture = analyse(torch.randn(1, 2, 2_000), 256, 64)
    magnitudes = torch.stack([mixture.abs(), torch.zeros_like(mixture.abs())])
    spectra = filter_wiener(magnitudes, mixture)
    torch.testing.assert_close(
        synthesise(spectra, 64, 2_000).sum(0), synthesise(mixture, 64, 2_000), atol=1e-3, rtol=0
    )
