from flsep.cache import Grid, Layout
from flsep.trainer.approaches.informed import build_model
from flsep.trainer.config import TrainConfig
from flsep.trainer.recipes import RECIPES, demo, resolve_config, xumx


def test_xumx_is_the_public_recipe() -> None:
    config = xumx()
    assert config == TrainConfig()
    assert (config.separator.hidden_size, config.separator.bandwidth_hz) == (512, 16000)
    assert (config.separator.num_layers, config.separator.dropout) == (3, 0.4)
    assert (config.optim.learning_rate, config.optim.weight_decay) == (1e-3, 1e-5)
    optim = config.optim
    assert (optim.plateau_factor, optim.plateau_patience, optim.plateau_cooldown) == (0.3, 80, 10)
    data = config.data
    assert (data.excerpt_seconds, data.batch_size, data.excerpts_per_track) == (6, 16, 64)
    assert (data.min_gain, data.max_gain, data.swap_probability) == (0.25, 1.25, 0.5)
    assert (config.loss.combine, config.loss.time_weight) == (True, 10)
    assert (config.fit.epochs, config.fit.patience) == (1000, 1000)


def test_demo_is_small_and_compares_windows() -> None:
    layout = Layout(
        sample_rate_hz=44100,
        num_channels=2,
        n_fft=4096,
        hop_samples=1024,
        stft_dtype="float16",
        sources=("drums", "bass", "other", "vocals"),
        teacher="musicnn",
        teacher_digest="",
        embedding_size=256,
        window_seconds=187 * 256 / 16000,
        window_hop_seconds=187 * 256 / 16000,
    )
    config = demo()
    # A batch compares windows: there must be several, and an excerpt holds one at least.
    assert Grid(layout, config.data.excerpt_seconds).num_whole_windows >= 1
    windows = config.data.batch_size * Grid(layout, config.data.excerpt_seconds).num_whole_windows
    assert windows >= 4
    assert sum(p.numel() for p in build_model(config, layout).parameters()) < 6e6


def test_recipes_go_by_name() -> None:
    assert set(RECIPES) == {"xumx", "demo"}


def test_a_recipe_chooses_settings_for_each_approach() -> None:
    settings = ["approach.name=concat"]
    assert resolve_config("xumx", settings).approach.projection_size == 128  # type: ignore[attr-defined]
    assert resolve_config("demo", settings).approach.projection_size == 16  # type: ignore[attr-defined]
    more = [*settings, "approach.projection_size=8"]
    assert resolve_config("demo", more).approach.projection_size == 8  # type: ignore[attr-defined]
    assert resolve_config("demo", ["approach.name=distance"]) == demo("distance")
