"""Mixes without audio: their embeddings are random numbers."""

from pathlib import Path
from typing import Any

import numpy as np

from flsep.cache import Grid, MixesConfig, RandomMixes, Shards, write_mixes, write_mixes_index
from flsep.cache.mixes.file import digest_tracks


def make_mixes(
    folder: Path, shards: Shards, *, num_epochs: int = 2, **settings: Any
) -> MixesConfig:
    """Write mixes of the training split, as ``flsep-precompute mixes`` does."""
    chosen = {
        "split": "train",
        "seed": 0,
        "excerpt_seconds": 0.7,
        "excerpts_per_track": 3,
        "min_gain": 0.25,
        "max_gain": 1.25,
        "swap_probability": 0.5,
        "with_stems": False,
        "embedding_dtype": "float32",
        "num_windows": 2,
        **settings,
    }
    grid = Grid(shards.layout, chosen["excerpt_seconds"])
    tracks, _ = grid.split_by_length(shards, chosen["split"])
    config = MixesConfig(
        shards=shards.index.fingerprint,
        tracks=digest_tracks(tracks),
        num_tracks=len(tracks),
        num_sources=len(shards.layout.sources),
        embedding_size=shards.layout.embedding_size,
        **chosen,
    )
    names = ("min_gain", "max_gain", "swap_probability", "seed")
    draws = RandomMixes(
        grid, tracks, mixes_per_track=config.excerpts_per_track, **{k: chosen[k] for k in names}
    )
    rng = np.random.default_rng(0)
    folder.mkdir()
    for epoch in range(num_epochs):
        for name, indices in config.files_of_epoch(epoch).items():
            drawn = [draws.draw(epoch, index) for index in indices]
            shapes = {key: d.shape for key, d in config.datasets(len(indices)).items()}
            arrays = {
                "track": np.array([[tracks.index(t) for t, _ in d.places] for d in drawn]),
                "frame": np.array([[grid.first_frame(k) for _, k in d.places] for d in drawn]),
                "gain": np.array([d.gains for d in drawn]),
                "swap": np.array([d.swaps for d in drawn]),
                "embedding": rng.standard_normal(shapes["embedding"]),
                "activity": rng.uniform(-40, -10, shapes["activity"]),
            }
            write_mixes(folder / name, config, epoch, arrays, {"flsep": "0"})
    write_mixes_index(folder, config, num_epochs)
    return config
