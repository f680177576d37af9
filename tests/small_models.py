"""Small layouts and separators for tests."""

import torch

from flsep.cache import Layout
from flsep.trainer.separators.xumx import XUMX, XumxConfig


def make_layout(**changes) -> Layout:
    """Return a layout of small spectra: 9 bins, of which 5 lie below 4 kHz."""
    settings = {
        "sample_rate_hz": 16000,
        "num_channels": 2,
        "n_fft": 16,
        "hop_samples": 4,
        "stft_dtype": "float32",
        "sources": ("drums", "bass", "vocals"),
        "teacher": "teacher",
        "teacher_digest": "0" * 64,
        "embedding_size": 6,
        "window_seconds": 1.0,
        "window_hop_seconds": 1.0,
    }
    return Layout(**settings | changes)


def build_xumx(layout: Layout, *, statistics=None, condition_size: int = 0, **settings) -> XUMX:
    """Build a small X-UMX with seeded weights, which sees the bins below 4 kHz."""
    small = {"hidden_size": 4, "num_layers": 2, "dropout": 0.0, "bandwidth_hz": 4000.0}
    torch.manual_seed(0)
    return XUMX(
        XumxConfig(**small | settings), layout, statistics=statistics, condition_size=condition_size
    )
