import dataclasses

import pytest

from flsep.trainer.config import (
    DataConfig,
    FitConfig,
    OptimConfig,
    TrainConfig,
    configure_approach,
    configure_separator,
    list_differences,
)
from flsep.trainer.errors import ConfigError
from flsep.trainer.separators.xumx import XumxConfig
from flsep.trainer.settings import apply_settings


def test_settings_change_fields_by_their_type() -> None:
    config = apply_settings(
        TrainConfig(),
        [
            "separator.hidden_size=64",
            "optim.learning_rate=3e-4",
            "loss.combine=false",
            "data.mixing = random",
            "fit.seed=1",
            "fit.seed=7",
        ],
    )
    assert config.separator == XumxConfig(hidden_size=64)
    assert config.optim == OptimConfig(learning_rate=3e-4)
    assert config.loss.combine is False
    assert config.data == DataConfig(mixing="random")
    assert config.fit.seed == 7
    assert config.approach == configure_approach("none")


def test_settings_of_one_section_are_checked_together() -> None:
    # Each alone would be refused: dropout needs a second layer.
    settings = ["separator.num_layers=1", "separator.dropout=0"]
    for order in (settings, settings[::-1]):
        assert apply_settings(TrainConfig(), order).separator.num_layers == 1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.learning_rat=1", "no field 'learning_rat'; did you mean learning_rate"),
        ("optimm.learning_rate=1", "no section 'optimm'; did you mean optim"),
        ("fit.zzzz=1", "no field 'zzzz'; choose from epochs, patience, seed"),
        ("fit.epochs", "expected section.field=value"),
        ("epochs=3", "expected section.field=value"),
        ("fit.epochs=3.5", "'3.5' is not a whole number"),
        ("fit.epochs=0", "fit.epochs is 0; expected 1 or more"),
        ("fit.seed=-1", "fit.seed is -1"),
        ("loss.combine=maybe", "'maybe' is not true or false"),
        ("optim.learning_rate=nan", "optim.learning_rate is nan; expected a finite number"),
        ("data.mixing=mixed", "data.mixing is 'mixed'; expected one of original, random, rendered"),
        ("data.min_gain=2", r"data.min_gain is 2.0; expected in \[0, max_gain\]"),
        ("separator.hidden_size=7", "separator.hidden_size is 7; expected an even"),
        ("separator.num_layers=1", "separator.dropout is 0.4; expected 0 with one layer"),
        ("approach.weight=1", "'approach' of 'none' has no field 'weight'; it has none"),
        ("approach.name=triplet", "unknown approach 'triplet'; expected one of none, concat"),
        ("separator.name=scnett", "unknown separator 'scnett'; expected one of xumx"),
    ],
)
def test_bad_settings_are_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_settings(TrainConfig(), [setting])


def test_settings_know_only_the_fields_of_the_chosen_approach() -> None:
    chosen = ["approach.weight=0.5", "approach.temperature=0.2", "approach.name=contrastive"]
    config = apply_settings(TrainConfig(), chosen)
    assert config.approach == configure_approach("contrastive", weight=0.5, temperature=0.2)
    with pytest.raises(ConfigError, match="of 'distance' has no field 'temperature'"):
        apply_settings(TrainConfig(), ["approach.temperature=0.2", "approach.name=distance"])
    # The name that it has already leaves the other fields as they are.
    again = apply_settings(config, ["approach.name=contrastive", "separator.name=xumx"])
    assert again == config
    assert apply_settings(config, ["approach.name=none"]).approach == configure_approach("none")


def test_a_separator_brings_its_defaults_and_its_loss() -> None:
    config = apply_settings(
        TrainConfig(), ["separator.hidden_size=64", "loss.time_weight=1", "fit.seed=3"]
    )
    other = config.with_separator("xumx")
    assert other.separator == configure_separator("xumx")
    assert other.loss.time_weight == 10  # type: ignore[attr-defined]
    assert other.fit.seed == 3


def test_wrong_types_are_refused_in_code_too() -> None:
    with pytest.raises(ConfigError, match="hidden_size is '64'; expected a whole number"):
        XumxConfig(hidden_size="64")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="epochs is True; expected a whole number"):
        FitConfig(epochs=True)
    assert type(OptimConfig(learning_rate=1).learning_rate) is float


def test_json_gives_the_configuration_again() -> None:
    for name in ("none", "concat", "contrastive", "distance"):
        settings = ["fit.seed=3", "data.mixing=random", f"approach.name={name}"]
        config = apply_settings(TrainConfig(), settings)
        assert TrainConfig.from_json(config.to_json()) == config


def test_json_of_another_shape_is_refused() -> None:
    values = TrainConfig().to_json()
    with pytest.raises(ConfigError, match=r"unknown sections .'extra'"):
        TrainConfig.from_json({**values, "extra": {}})
    with pytest.raises(ConfigError, match="no separator or approach"):
        TrainConfig.from_json({**values, "approach": {}})
    del values["fit"]["seed"]
    with pytest.raises(ConfigError, match=r"section 'fit' .* expected the fields epochs, patience"):
        TrainConfig.from_json(values)


def test_differences_are_named() -> None:
    new = apply_settings(TrainConfig(), ["fit.seed=3"])
    assert list_differences(TrainConfig(), new) == {"fit.seed": (0, 3)}
    other = apply_settings(TrainConfig(), ["approach.name=concat"])
    assert list_differences(TrainConfig(), other) == {
        "approach.name": ("none", "concat"),
        "approach.teacher_signal": (None, "mixture"),
        "approach.projection_size": (None, 128),
    }


def test_sections_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().fit.seed = 1  # type: ignore[misc]
