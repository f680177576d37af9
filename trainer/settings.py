"""Settings ``section.field=value``, which change single fields of a configuration."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, Literal, get_args, get_origin

from flsep.trainer.config import Section, TrainConfig, describe_type, type_hints
from flsep.trainer.errors import ConfigError


def apply_settings(config: TrainConfig, settings: Iterable[str]) -> TrainConfig:
    """Return a configuration changed by settings ``section.field=value``.

    The last setting of a field wins; apart from that, their order does not matter. A new
    ``separator.name`` or ``approach.name`` brings the defaults of its section. ConfigError names
    the nearest known section or field, or what a field takes.
    """
    texts: dict[str, dict[str, str]] = {}
    for setting in settings:
        section, name, text = split_setting(setting)
        texts.setdefault(section, {})[name] = text
    # Another separator or approach replaces its section, so that it has to come first.
    for section, choose in (
        ("separator", TrainConfig.with_separator),
        ("approach", TrainConfig.with_approach),
    ):
        old = getattr(config, section).name
        name = texts.get(section, {}).pop("name", old)
        if name != old:
            config = choose(config, name)
    # Check a section after all its fields are changed: the limits of one may depend on another.
    changed: dict[str, Any] = {
        section: _change_section(getattr(config, section), changes)
        for section, changes in texts.items()
    }
    return replace(config, **changed)


def _change_section(section: Section, changes: Mapping[str, str]) -> Section:
    kinds = type_hints(type(section))
    kinds.pop("name", None)  # the name has chosen the section already
    values = {}
    for name, text in changes.items():
        setting = f"{section.section}.{name}={text}"
        if name not in kinds:
            owner = f" of {section.name!r}" if hasattr(section, "name") else ""
            raise ConfigError(
                f"setting {setting!r}: section {section.section!r}{owner} has no field "
                f"{_suggest(name, kinds)}"
            )
        values[name] = _parse(setting, text, kinds[name])
    return replace(section, **values)


def split_setting(setting: str) -> tuple[str, str, str]:
    """Split ``section.field=value``; raises ConfigError for another form or an unknown section."""
    target, equals, text = setting.partition("=")
    section, dot, name = target.strip().partition(".")
    if not equals or not dot:
        raise ConfigError(f"setting {setting!r}: expected section.field=value")
    known = [entry.name for entry in fields(TrainConfig)]
    if section not in known:
        raise ConfigError(f"setting {setting!r}: no section {_suggest(section, known)}")
    return section, name, text.strip()


def _parse(setting: str, text: str, kind: Any) -> Any:
    if get_origin(kind) is Literal:
        # A choice keeps its own type; what is none is left to the section to refuse.
        return next((choice for choice in get_args(kind) if str(choice) == text), text)
    if get_origin(kind) is tuple:
        item = get_args(kind)[0]
        return tuple(_parse(setting, part.strip(), item) for part in text.split(",") if part)
    if kind is str:
        return text
    try:
        # bool("false") would be true.
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise ConfigError(f"setting {setting!r}: {text!r} is not {describe_type(kind)}") from None


def _suggest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"{name!r}; did you mean {' or '.join(near)}?"
    return f"{name!r}; {'choose from ' + ', '.join(names) if names else 'it has none'}"
