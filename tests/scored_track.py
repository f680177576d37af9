"""Two sources with estimates, scored by museval: for the tests of engines and of the pool."""

import numpy as np

from flsep.trainer.scoring.museval_engine import Museval

RATE_HZ = 8000
METRICS = ("SDR", "SIR", "ISR", "SAR")


def make_track(num_samples: int = 2 * RATE_HZ, num_channels: int = 1) -> np.ndarray:
    """Return references and estimates, float32 [2, source, sample, channel]."""
    rng = np.random.default_rng(0)
    references, noise = 0.1 * rng.standard_normal((2, 2, num_samples, num_channels))
    estimates = references + 0.3 * references[::-1] + 0.1 * noise
    references = np.round(references * 2**15) / 2**15  # 16-bit audio: scored as it is
    return np.stack([references, estimates]).astype(np.float32)


def score(track: np.ndarray, sources=("vocals", "bass")) -> dict:
    engine = Museval()
    engine.prepare()
    return engine.score(*track, sources=sources, sample_rate_hz=RATE_HZ, name="a track")


def table(scores: dict) -> np.ndarray:
    """Return float64 [source, metric, frame]."""
    return np.array(
        [
            [[frame["metrics"][metric] for frame in target["frames"]] for metric in METRICS]
            for target in scores["targets"]
        ]
    )
