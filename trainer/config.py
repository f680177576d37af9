"""Everything that decides a training: frozen sections that hold the only defaults.

The defaults are the public recipe of X-UMX; `flsep.trainer.recipes` names complete experiments,
and ``--set section.field=value`` changes one field of one.
"""

import difflib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from flsep.trainer.errors import ConfigError

Settings = Any
"""One of the sections below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeparatorConfig:
    """X-UMX.

    Attributes
    ----------
    hidden_size : int
        Width of encoders and decoders; the BLSTM has half of it in each direction. Even.
    num_layers : int
        Layers of the BLSTM.
    dropout : float
        Between the layers of the BLSTM, in [0, 1).
    bandwidth_hz : float
        The encoders see the mixture up to this frequency; the masks cover all of it.
    """

    hidden_size: int = 512
    num_layers: int = 3
    dropout: float = 0.4
    bandwidth_hz: float = 16000.0

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self, "hidden_size", self.hidden_size >= 2 and self.hidden_size % 2 == 0, "even")
        _check(self, "num_layers", self.num_layers >= 1, "1 or more")
        _check(self, "dropout", 0 <= self.dropout < 1, "in [0, 1)")
        _check(self, "dropout", self.num_layers > 1 or self.dropout == 0, "0 with one layer")
        _check(self, "bandwidth_hz", self.bandwidth_hz > 0, "> 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Excerpts, and how they are mixed.

    Attributes
    ----------
    mixing : {'original', 'random', 'rendered'}
        ``original``: excerpts of the tracks as they are; both channels of a whole excerpt may be
        swapped, but there is no gain: the teacher's embedding belongs to the unchanged mixture.
        ``random``: each source from a random track at a random position, with its own gain and
        channel swap, and the mixture is their sum. ``rendered``: the same, from the recipes of
        ``flsep-precompute mixes``, whose mixtures the teacher has heard.
    excerpt_seconds : float
        Length of an excerpt, in training and in validation.
    excerpts_per_track : int
        An epoch has this many excerpts for each training track.
    batch_size : int
        Excerpts in a batch, in all processes together.
    min_gain, max_gain : float
        Each source's gain is uniform between these (not with original mixing).
    swap_probability : float
        Of reversing the order of the channels.
    """

    mixing: Literal["original", "random", "rendered"] = "original"
    excerpt_seconds: float = 6.0
    excerpts_per_track: int = 64
    batch_size: int = 16
    min_gain: float = 0.25
    max_gain: float = 1.25
    swap_probability: float = 0.5

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self, "excerpt_seconds", self.excerpt_seconds > 0, "> 0")
        _check(self, "excerpts_per_track", self.excerpts_per_track >= 1, "1 or more")
        _check(self, "batch_size", self.batch_size >= 1, "1 or more")
        _check(self, "min_gain", 0 <= self.min_gain <= self.max_gain, "in [0, max_gain]")
        _check(self, "swap_probability", 0 <= self.swap_probability <= 1, "in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class ApproachConfig:
    """How the teacher informs the latent; see `flsep.trainer.approaches.registry`.

    Attributes
    ----------
    name : {'none', 'concat', 'contrastive', 'distance'}
        The approach.
    teacher_signal : {'mixture', 'stems'}
        Signal whose embeddings are used.
    weight : float
        Factor of the regularizer (contrastive, distance).
    temperature : float
        Divisor of the cosines (contrastive).
    projection_size : int
        Features of the projected embedding (concat), hidden units of the latent's projection
        (contrastive).
    silence_db : float
        Windows quieter than this, in dBFS, are not compared.
    """

    name: Literal["none", "concat", "contrastive", "distance"] = "none"
    teacher_signal: Literal["mixture", "stems"] = "mixture"
    weight: float = 1.0
    temperature: float = 0.1
    projection_size: int = 128
    silence_db: float = -60.0

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self, "weight", self.weight > 0, "> 0; for no regularizer take the approach none")
        _check(self, "temperature", self.temperature > 0, "> 0")
        _check(self, "projection_size", self.projection_size >= 1, "1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The separation loss: magnitude term + `time_weight` x time-domain term.

    Attributes
    ----------
    combine : bool
        Average over all combinations of sources, or over the single sources.
    time_weight : float
        Weight of the time-domain term, 0 or more.
    """

    combine: bool = True
    time_weight: float = 10.0

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self, "time_weight", self.time_weight >= 0, "0 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """Adam, and its plateau schedule on the validation loss.

    Attributes
    ----------
    learning_rate, weight_decay : float
        Adam's.
    plateau_factor : float
        The learning rate is multiplied with it on a plateau, in (0, 1).
    plateau_patience : int
        Epochs without improvement that make a plateau.
    plateau_cooldown : int
        Epochs to wait after a reduction.
    accumulate : int
        Batches whose gradients are averaged for one step. Batch norm and the regularizers see one
        batch at a time.
    clip_norm : float
        Gradients of a larger norm are scaled down to it; 0 clips nothing.
    ema_decay : float
        Validate and keep a moving average of the weights, which holds this share of the old one
        at each step, in [0, 1); 0 keeps the weights themselves.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 1e-5
    plateau_factor: float = 0.3
    plateau_patience: int = 80
    plateau_cooldown: int = 10
    accumulate: int = 1
    clip_norm: float = 0.0
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self, "learning_rate", self.learning_rate > 0, "> 0")
        _check(self, "weight_decay", self.weight_decay >= 0, "0 or more")
        _check(self, "plateau_factor", 0 < self.plateau_factor < 1, "in (0, 1)")
        _check(self, "plateau_patience", self.plateau_patience >= 0, "0 or more")
        _check(self, "plateau_cooldown", self.plateau_cooldown >= 0, "0 or more")
        _check(self, "accumulate", self.accumulate >= 1, "1 or more")
        _check(self, "clip_norm", self.clip_norm >= 0, "0 or more")
        _check(self, "ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig:
    """How the network is computed.

    Attributes
    ----------
    precision : {'float32', 'tf32', 'bfloat16'}
        ``float32``: as it says, also on GPUs. ``tf32``: products on a GPU round their factors to
        10 bits. ``bfloat16``: the network in mixed precision, weights and losses in float32.
    compile : bool
        Let torch.compile fuse the encoders and the decoders; takes a minute at the start.
    """

    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        _check_types(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """How long to train, and from which seed.

    Attributes
    ----------
    epochs : int
        At most this many.
    patience : int
        Stop after this many epochs without a better validation loss.
    seed : int
        Of the weights, the dropout and the excerpts.
    """

    epochs: int = 1000
    patience: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        _check_types(self)
        _check(self, "epochs", self.epochs >= 1, "1 or more")
        _check(self, "patience", self.patience >= 1, "1 or more")
        _check(self, "seed", 0 <= self.seed < 2**63, "in [0, 2^63)")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A complete training."""

    separator: SeparatorConfig = field(default_factory=SeparatorConfig)
    data: DataConfig = field(default_factory=DataConfig)
    approach: ApproachConfig = field(default_factory=ApproachConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    fit: FitConfig = field(default_factory=FitConfig)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return all sections as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainConfig":
        """Rebuild a configuration; raises ConfigError unless it has exactly these fields."""
        sections = {}
        for section in fields(cls):
            kind: Any = section.type
            stored, names = values.get(section.name), {entry.name for entry in fields(kind)}
            if not isinstance(stored, dict) or set(stored) != names:
                raise ConfigError(
                    f"stored configuration: section {section.name!r} is {stored!r}; "
                    f"expected the fields {', '.join(sorted(names))}"
                )
            sections[section.name] = kind(**stored)
        if unknown := set(values) - set(sections):
            raise ConfigError(f"stored configuration: unknown sections {sorted(unknown)}")
        return cls(**sections)


def apply_settings(config: TrainConfig, settings: Iterable[str]) -> TrainConfig:
    """Return a configuration with some fields changed.

    Parameters
    ----------
    config : TrainConfig
        What to start from.
    settings : iterable of str
        Each ``section.field=value``; the last one of a field holds. All are applied before a
        section is checked, so that their order does not matter.

    Raises
    ------
    ConfigError
        For an unknown section or field (the message names the nearest), or a value that the field
        cannot have.
    """
    changes: dict[str, dict[str, Any]] = {}
    for setting in settings:
        target, equals, text = setting.partition("=")
        section, dot, name = target.strip().partition(".")
        if not equals or not dot:
            raise ConfigError(f"setting {setting!r}: expected section.field=value")
        kinds = {entry.name: entry.type for entry in fields(TrainConfig)}
        if section not in kinds:
            raise ConfigError(f"setting {setting!r}: no section {_suggest(section, kinds)}")
        hints = get_type_hints(kinds[section])
        if name not in hints:
            raise ConfigError(
                f"setting {setting!r}: section {section!r} has no field {_suggest(name, hints)}"
            )
        changes.setdefault(section, {})[name] = _parse(setting, text.strip(), hints[name])
    return replace(
        config,
        **{section: replace(getattr(config, section), **new) for section, new in changes.items()},
    )


def list_differences(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return ``section.field`` -> (old, new) for every field that differs."""
    before, after = old.to_json(), new.to_json()
    return {
        f"{section}.{name}": (before[section][name], after[section][name])
        for section in before
        for name in before[section]
        if before[section][name] != after[section][name]
    }


def _parse(setting: str, text: str, kind: Any) -> Any:
    if get_origin(kind) is Literal or kind is str:
        return text
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"setting {setting!r}: {text!r} is not {_describe(kind)}") from None


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}[
        kind
    ]


def _suggest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"{name!r}; did you mean {' or '.join(near)}?"
    return f"{name!r}; there are {', '.join(names)}"


def _check_types(section: Settings) -> None:
    """Refuse values of another type; a whole number becomes the float that a field wants."""
    for name, kind in get_type_hints(type(section)).items():
        value = getattr(section, name)
        if kind is float and type(value) is int:
            value = float(value)
            object.__setattr__(section, name, value)
        if get_origin(kind) is Literal:
            fits = value in get_args(kind)
        else:
            fits = type(value) is kind and (kind is not float or math.isfinite(value))
        _check(section, name, fits, _describe(kind))


def _check(section: Settings, name: str, holds: bool, expected: str) -> None:
    if not holds:
        title = type(section).__name__.removesuffix("Config").lower()
        raise ConfigError(f"{title}.{name} is {getattr(section, name)!r}; expected {expected}")
