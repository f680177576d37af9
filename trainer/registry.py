"""Names of the parts that can be added from outside, and where their classes are."""

import importlib
from collections.abc import Mapping
from typing import Any

from flsep.trainer.errors import ConfigError

ENGINES: dict[str, str] = {"museval": "flsep.trainer.scoring.museval_engine:Museval"}


def load(registry: Mapping[str, str], name: str, what: str) -> Any:
    """Import the class that a registry has under a name; raises ConfigError for other names."""
    if name not in registry:
        raise ConfigError(f"no {what} {name!r}; there are {', '.join(sorted(registry))}")
    module, _, attribute = registry[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
