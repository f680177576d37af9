from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flsep.cache import Layout, Shards
from flsep.trainer.approaches.informed import build_model
from flsep.trainer.config import TrainConfig
from flsep.trainer.errors import DataError


def test_separators_start_alike_whatever_the_approach(
    tiny: Callable[..., TrainConfig], layout: Layout
) -> None:
    states = [
        build_model(tiny(f"approach.name={name}"), layout).separator.state_dict()
        for name in ("none", "contrastive", "distance")
    ]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(value, states[0][name]) for name, value in state.items())
    other = build_model(tiny("fit.seed=1"), layout).separator.state_dict()
    assert not all(torch.equal(value, states[0][name]) for name, value in other.items())


def test_the_input_is_standardised_by_the_statistics(
    tiny: Callable[..., TrainConfig], layout: Layout, shards: Path
) -> None:
    statistics = Shards(shards).index.statistics
    assert statistics is not None
    separator = build_model(tiny(), layout, statistics).separator
    assert separator.max_bin == 65  # 2 kHz of 4 kHz in 129 bins
    mean = separator.input_mean_SF[1].detach().numpy()
    scale = separator.input_scale_SF[1].detach().numpy()
    np.testing.assert_allclose(mean, -statistics.magnitude_mean[:65], rtol=1e-6)
    np.testing.assert_allclose(scale, 1 / statistics.magnitude_std[:65], rtol=1e-5)


def test_a_bandwidth_beyond_half_the_rate_takes_all_bins(
    tiny: Callable[..., TrainConfig], layout: Layout
) -> None:
    assert build_model(tiny("separator.bandwidth_hz=16000"), layout).separator.max_bin == 129


def test_one_source_is_refused(tiny: Callable[..., TrainConfig], layout: Layout) -> None:
    with pytest.raises(DataError, match="two sources or more"):
        build_model(tiny(), replace(layout, sources=("vocals",)))
