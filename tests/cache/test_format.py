from dataclasses import replace

import numpy as np
import pytest

from flsep.cache import Layout
from flsep.cache.errors import FieldError
from flsep.cache.format import canonical_json, fingerprint, track_datasets


def test_window_frames_by_hand(layout: Layout) -> None:
    # 500 frames a second; windows of 20 ms every 20 ms are 10 frames each.
    assert [layout.window_frames(w) for w in range(3)] == [(0, 10), (10, 20), (20, 30)]


def test_window_frames_of_vggish_at_44100_hz(layout: Layout) -> None:
    vggish = replace(
        layout,
        sample_rate_hz=44100,
        hop_samples=1024,
        window_seconds=0.975,
        window_hop_seconds=0.96,
    )
    # 0.96 s are 41.34 frames, 0.975 s 41.99: frames 42 ... 83 have their centres in window 1.
    assert vggish.window_frames(0) == (0, 42)
    assert vggish.window_frames(1) == (42, 84)
    frames = [vggish.window_frames(w) for w in range(1000)]
    centres = np.arange(60_000) * 1024 / 44100
    for w in (0, 1, 17, 999):
        inside = (centres >= w * 0.96) & (centres < w * 0.96 + 0.975)
        assert frames[w] == (np.flatnonzero(inside)[0], np.flatnonzero(inside)[-1] + 1)


def test_datasets_by_hand(layout: Layout) -> None:
    datasets = track_datasets(layout, num_samples=100, num_windows=5, with_audio=True)
    assert {name: (str(d.dtype), d.shape) for name, d in datasets.items()} == {
        "stft": ("float16", (3, 7, 2, 33, 2)),
        "embedding": ("float32", (3, 5, 3)),
        "activity": ("float32", (3, 5)),
        "magnitude_moments": ("float64", (2, 33)),
        "embedding_moments": ("float64", (3, 2, 3)),
        "audio": ("int16", (3, 2, 100)),
    }
    assert datasets["stft"].num_bytes == 3 * 7 * 2 * 33 * 2 * 2


def test_layout_survives_json(layout: Layout) -> None:
    assert Layout.from_json(layout.to_json()) == layout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stft_dtype": "float64"}, "stft_dtype is 'float64'"),
        ({"sources": ("bass", "bass")}, "distinct"),
        ({"sources": ("mixture",)}, "distinct"),
        ({"sources": ()}, "at least one"),
        ({"hop_samples": 0}, "hop_samples is 0"),
        ({"window_seconds": float("nan")}, "window_seconds is nan"),
        ({"window_hop_seconds": float("inf")}, "window_hop_seconds is inf"),
    ],
)
def test_impossible_layouts_are_refused(
    layout: Layout, change: dict[str, object], message: str
) -> None:
    with pytest.raises(FieldError, match=message):
        replace(layout, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_fft": "64"}, "Layout.n_fft is '64'; expected int"),
        ({"extra": 1}, r"Layout has the fields \['embedding_size', 'extra', .*; expected \['emb"),
        ({"sources": [1]}, r"Layout.sources is \[1\]; expected a list of names"),
        ({"sources": "ab"}, "Layout.sources is 'ab'; expected a list of names"),
    ],
)
def test_malformed_layout_json_is_refused(
    layout: Layout, change: dict[str, object], message: str
) -> None:
    with pytest.raises(FieldError, match=message):
        Layout.from_json({**layout.to_json(), **change})


def test_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    assert canonical_json({"b": 1, "a": [1.5]}) == '{"a":[1.5],"b":1}'
    assert fingerprint({"b": 1, "a": 2}) == fingerprint({"a": 2, "b": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
