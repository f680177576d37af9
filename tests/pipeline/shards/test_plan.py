from collections.abc import Sequence
from pathlib import Path

import pytest

from flsep.pipeline.config import FeatureConfig
from flsep.pipeline.corpus.media import AudioStream
from flsep.pipeline.corpus.tracks import Corpus, Track, TrackInfo
from flsep.pipeline.shards.plan import plan_shards

SECOND = 44100


def corpus(lengths: Sequence[tuple[str, str, float]], rate_hz: int = SECOND) -> Corpus:
    """Tracks by name, split and seconds; no file exists."""
    streams = tuple(AudioStream(Path(name)) for name in "ab")
    return Corpus(
        root=Path("corpus"),
        kind="folder",
        sources=("a", "b"),
        tracks=tuple(Track(name, split, None, streams) for name, split, _ in lengths),
        rejected=(),
        infos={
            name: TrackInfo(int(seconds * rate_hz), rate_hz, seconds)
            for name, _, seconds in lengths
        },
    )


def test_size_by_hand() -> None:
    plan = plan_shards(corpus([("x", "test", 1.0)]), FeatureConfig())
    # 3 signals, 1 + 44100 // 1024 = 44 frames, 2 channels, 2049 bins, 2 parts of 2 bytes
    stft = 3 * 44 * 2 * 2049 * 2 * 2
    audio = 3 * 2 * 44100 * 2
    embedding, activity = 3 * 128 * 4, 3 * 4
    moments = 2 * 2049 * 8 + 3 * 2 * 128 * 8
    assert plan.num_bytes == stft + audio + embedding + activity + moments


def test_short_tracks_share_a_shard_but_splits_do_not() -> None:
    lengths = [(f"t{i}", "train", 7.0) for i in range(5)] + [("v", "valid", 7.0)]
    one_track = plan_shards(corpus(lengths[:1]), FeatureConfig()).num_bytes
    plan = plan_shards(corpus(lengths), FeatureConfig(), shard_bytes=2 * one_track)
    groups = [[planned.track.name for planned in task.tracks] for task in plan.tasks]
    assert sorted(groups) == [["t0", "t1"], ["t2", "t3"], ["t4"], ["v"]]
    assert [task.num_bytes for task in plan.tasks] == [2 * one_track] * 2 + [one_track] * 2


def test_largest_first_and_long_tracks_alone() -> None:
    lengths = [("a", "train", 10.0), ("b", "train", 400.0), ("c", "train", 20.0)]
    plan = plan_shards(corpus(lengths), FeatureConfig(), shard_bytes=100 << 20)
    assert [[p.track.name for p in task.tracks] for task in plan.tasks] == [["b"], ["c"], ["a"]]


def test_a_shard_is_named_after_its_tracks_alone() -> None:
    first = plan_shards(corpus([("../../x", "train", 9.0), ("v", "valid", 9.0)]), FeatureConfig())
    more = [("../../x", "train", 9.0), ("v", "valid", 9.0), ("w", "test", 9.0)]
    second = plan_shards(corpus(more), FeatureConfig())
    names = {task.name for task in first.tasks}
    assert names < {task.name for task in second.tasks}
    assert all(Path(name).name == name for name in names)
    longer = plan_shards(corpus([("../../x", "train", 10.0)]), FeatureConfig())
    assert longer.tasks[0].name not in names


def test_lengths_are_those_after_resampling() -> None:
    plan = plan_shards(corpus([("x", "train", 2.0)], rate_hz=48000), FeatureConfig())
    assert plan.tracks[0].num_samples == 2 * 44100


def test_nothing_to_do_is_refused() -> None:
    with pytest.raises(ValueError, match="no usable track"):
        plan_shards(corpus([]), FeatureConfig())
    with pytest.raises(ValueError, match="--shard-size 10: expected at least 1 MiB"):
        plan_shards(corpus([("x", "train", 2.0)]), FeatureConfig(), shard_bytes=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_rate_hz": 0}, "--sample-rate 0"),
        ({"num_channels": 0}, "--channels 0"),
        ({"n_fft": 4095}, "--n-fft 4095"),
        ({"hop_samples": 4096}, "--hop 4096: expected 1 to 2048"),
        ({"stft_dtype": "int8"}, "--stft-dtype int8"),
        ({"audio_splits": ("exam",)}, "--audio-splits"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureConfig(**change)  # type: ignore[arg-type]
