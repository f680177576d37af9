"""The configuration of a training: frozen sections that hold the only defaults.

`flsep.trainer.recipes` returns complete configurations, and `flsep.trainer.settings` changes single
fields. The sections `separator`, `approach` and `loss` have the type that the chosen separator
and approach declare: their fields differ, everything else is common to all trainings.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Literal, Self, get_args, get_origin, get_type_hints

from flsep.trainer.errors import ConfigError
from flsep.trainer.registry import APPROACHES, SEPARATORS, load

_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
_PLURALS = {int: "whole numbers", float: "finite numbers", str: "names"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """Base class of the sections; each checks its fields in ``__post_init__``."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self.check_types()

    def check_types(self) -> None:
        """Refuse values of another type; a whole number becomes the float that a field wants."""
        for name, kind in type_hints(type(self)).items():
            value = getattr(self, name)
            if kind is float and type(value) is int:
                value = float(value)
                object.__setattr__(self, name, value)  # the section is frozen
            self.require(name, _fits(value, kind), describe_type(kind))

    def require(self, name: str, holds: bool, expected: str) -> None:
        """Raise ConfigError, with what was expected of a field, unless the condition holds."""
        if not holds:
            raise ConfigError(
                f"{self.section}.{name} is {getattr(self, name)!r}; expected {expected}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SeparatorConfig(Section):
    """Base class of the separators' own sections.

    Attributes
    ----------
    name : str
        Name of the separator.
    """

    section: ClassVar[str] = "separator"

    name: str = field(default="", init=False)  # a subclass sets its name in the registry


@dataclass(frozen=True, kw_only=True, slots=True)
class ApproachConfig(Section):
    """Base class of the approaches' own sections.

    Attributes
    ----------
    name : str
        Name of the approach.
    """

    section: ClassVar[str] = "approach"

    name: str = field(default="", init=False)  # a subclass sets its name in the registry


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig(Section):
    """Base class of the separation losses; each separator has its own."""

    section: ClassVar[str] = "loss"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Section):
    """Excerpts, and how they are mixed.

    Attributes
    ----------
    mixing : {'original', 'random', 'rendered'}
        ``original``: excerpts of the tracks as they are. Their channels may be swapped, but there
        is no gain, since the teacher's embedding belongs to the unchanged mixture. ``random``: each
        source comes from a random track at a random position, with its own gain and channel swap,
        and the mixture is their sum. ``rendered``: the same, but the mixes were drawn by
        ``flsep-precompute mixes`` and the teacher has heard them.
    excerpt_seconds : float
        Length of an excerpt, in training and in validation.
    excerpts_per_track : int
        Number of excerpts for each training track in an epoch.
    batch_size : int
        Number of excerpts in a batch, over all processes.
    min_gain, max_gain : float
        Each source's gain is uniform between these (not with original mixing).
    swap_probability : float
        Probability of reversing the order of the channels.
    """

    section: ClassVar[str] = "data"

    mixing: Literal["original", "random", "rendered"] = "original"
    excerpt_seconds: float = 6.0
    excerpts_per_track: int = 64
    batch_size: int = 16
    min_gain: float = 0.25
    max_gain: float = 1.25
    swap_probability: float = 0.5

    def __post_init__(self) -> None:
        self.check_types()
        self.require("excerpt_seconds", self.excerpt_seconds > 0, "> 0")
        self.require("excerpts_per_track", self.excerpts_per_track >= 1, "1 or more")
        self.require("batch_size", self.batch_size >= 1, "1 or more")
        self.require("min_gain", 0 <= self.min_gain <= self.max_gain, "in [0, max_gain]")
        self.require("swap_probability", 0 <= self.swap_probability <= 1, "in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig(Section):
    """Adam, and its plateau schedule on the validation loss.

    Attributes
    ----------
    learning_rate, weight_decay : float
        Parameters of Adam.
    plateau_factor : float
        The learning rate is multiplied by this factor on a plateau, in (0, 1).
    plateau_patience : int
        Number of epochs without improvement that count as a plateau.
    plateau_cooldown : int
        Number of epochs to wait after a reduction.
    accumulate : int
        Number of batches whose gradients are averaged for one step. Batch norm and the regularizers
        see one batch at a time.
    clip_norm : float
        Gradients of a larger norm are scaled down to this norm; 0 disables clipping.
    ema_decay : float
        Decay d of the moving average of the weights, average = d * average + (1 - d) * weights,
        which is then validated and kept; in [0, 1); 0 keeps the weights themselves.
    """

    section: ClassVar[str] = "optim"

    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    plateau_factor: float = 0.3
    plateau_patience: int = 80
    plateau_cooldown: int = 10
    accumulate: int = 1
    clip_norm: float = 0.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        self.check_types()
        self.require("learning_rate", self.learning_rate > 0, "> 0")
        self.require("weight_decay", self.weight_decay >= 0, "0 or more")
        self.require("plateau_factor", 0 < self.plateau_factor < 1, "in (0, 1)")
        self.require("plateau_patience", self.plateau_patience >= 0, "0 or more")
        self.require("plateau_cooldown", self.plateau_cooldown >= 0, "0 or more")
        self.require("accumulate", self.accumulate >= 1, "1 or more")
        self.require("clip_norm", self.clip_norm >= 0, "0 or more")
        self.require("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig(Section):
    """How the network is computed.

    Attributes
    ----------
    precision : {'float32', 'tf32', 'bfloat16'}
        ``float32``: exact products, on GPUs too. ``tf32``: matrix products on a GPU round their
        factors to 10 bits. ``bfloat16``: the network in mixed precision, weights and losses in
        float32.
    compile : bool
        Compile the separator's layers with torch.compile, which takes a minute at the start.
    """

    section: ClassVar[str] = "compute"

    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    compile: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig(Section):
    """How long to train, and from which seed.

    Attributes
    ----------
    epochs : int
        Largest number of epochs.
    patience : int
        Number of epochs without a better validation loss after which training stops.
    seed : int
        Seed of the weights, the dropout and the excerpts.
    """

    section: ClassVar[str] = "fit"

    epochs: int = 1000
    patience: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        self.check_types()
        self.require("epochs", self.epochs >= 1, "1 or more")
        self.require("patience", self.patience >= 1, "1 or more")
        self.require("seed", 0 <= self.seed < 2**63, "in [0, 2^63)")


def configure_separator(name: str, **settings: Any) -> SeparatorConfig:
    """Return the section of a separator, with some fields set."""
    config: SeparatorConfig = load(SEPARATORS, name, "separator").Config(**settings)
    return config


def configure_approach(name: str, **settings: Any) -> ApproachConfig:
    """Return the section of an approach, with some fields set."""
    config: ApproachConfig = load(APPROACHES, name, "approach").Config(**settings)
    return config


def default_loss(separator: SeparatorConfig) -> LossConfig:
    """Return the default loss of a separator."""
    loss: LossConfig = load(SEPARATORS, separator.name, "separator").Loss()
    return loss


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The configuration of a training.

    The sections `separator`, `loss` and `approach` are instances of the classes that the chosen
    separator and approach declare; `loss` is the separator's default when it is not given.
    """

    separator: SeparatorConfig = field(default_factory=lambda: configure_separator("xumx"))
    data: DataConfig = field(default_factory=DataConfig)
    approach: ApproachConfig = field(default_factory=lambda: configure_approach("none"))
    loss: LossConfig = None  # type: ignore[assignment]  # set below: it depends on the separator
    optim: OptimConfig = field(default_factory=OptimConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    def __post_init__(self) -> None:
        if self.loss is None:
            # The section is frozen; this is its own initialisation.
            object.__setattr__(self, "loss", default_loss(self.separator))

    def with_separator(self, name: str) -> Self:
        """Return this configuration with another separator, at its defaults, and its loss."""
        separator = configure_separator(name)
        return replace(self, separator=separator, loss=default_loss(separator))

    def with_approach(self, name: str) -> Self:
        """Return this configuration with another approach, at its defaults."""
        return replace(self, approach=configure_approach(name))

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return all sections as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild a configuration; raises ConfigError unless it has exactly these fields."""
        try:
            separator_name, approach_name = (
                str(values[section]["name"]) for section in ("separator", "approach")
            )
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"stored configuration: no separator or approach ({error})"
            ) from error
        separator = load(SEPARATORS, separator_name, "separator")
        approach = load(APPROACHES, approach_name, "approach")
        # Annotations name base classes; the chosen separator and approach have the real ones.
        kinds = {entry.name: entry.type for entry in fields(cls)}
        kinds |= {
            "separator": separator.Config,
            "loss": separator.Loss,
            "approach": approach.Config,
        }
        if unknown := set(values) - set(kinds):
            raise ConfigError(f"stored configuration: unknown sections {sorted(unknown)}")
        return cls(**{name: _read_section(name, kinds[name], values.get(name)) for name in kinds})


def _read_section(section: str, kind: Any, stored: Any) -> Any:
    names = {entry.name for entry in fields(kind)}
    if not isinstance(stored, dict) or set(stored) != names:
        raise ConfigError(
            f"stored configuration: section {section!r} is {stored!r}; "
            f"expected the fields {', '.join(sorted(names))}"
        )
    # JSON has lists where sections have tuples.
    values = {key: tuple(value) if type(value) is list else value for key, value in stored.items()}
    # The class itself sets its name.
    return kind(**{entry.name: values[entry.name] for entry in fields(kind) if entry.init})


def _fits(value: object, kind: Any) -> bool:
    """Return whether a value is of a type: a choice, a tuple, or a plain type."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return type(value) is tuple and all(_fits(item, get_args(kind)[0]) for item in value)
    # Not isinstance: bool is a subclass of int.
    return type(value) is kind and (type(value) is not float or math.isfinite(value))


def type_hints(kind: type[Section]) -> dict[str, Any]:
    """Return the type of each field of a section."""
    # The annotations are text where a module postpones their evaluation.
    hints = get_type_hints(kind)
    return {entry.name: hints[entry.name] for entry in fields(kind)}


def list_differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return ``section.field`` -> (old, new) of the fields that differ; None for a missing one."""
    before, after = old.to_json(), new.to_json()
    differences = {}
    for section in before:
        for name in before[section] | after[section]:
            # Another separator or approach has other fields.
            values = before[section].get(name), after[section].get(name)
            if values[0] != values[1]:
                differences[f"{section}.{name}"] = values
    return differences


def describe_type(kind: Any) -> str:
    """Say which values a field of a type takes."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"{_PLURALS[get_args(kind)[0]]}, separated by commas"
    return _NAMES[kind]
