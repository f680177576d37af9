"""The names of separators, approaches and scoring engines, and where their classes are.

A new separator, approach or engine is one file with its class and one line here. A class is
imported when it is used, so that listing the names costs nothing.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from flsep.trainer.errors import ConfigError

SEPARATORS = {
    "xumx": "flsep.trainer.separators.xumx:XUMX",
}

APPROACHES = {
    "none": "flsep.trainer.approaches.none:NoTeacher",
    "concat": "flsep.trainer.approaches.concat:Concatenation",
    "contrastive": "flsep.trainer.approaches.contrastive:Contrastive",
    "distance": "flsep.trainer.approaches.distance:Distance",
}

ENGINES = {
    "museval": "flsep.trainer.scoring.museval_engine:Museval",
}


def load(registry: Mapping[str, str], name: str, what: str) -> Any:
    """Import the class registered under a name; `what`, e.g. ``engine``, is for the message."""
    if name not in registry:
        raise ConfigError(f"unknown {what} {name!r}; expected one of {', '.join(registry)}")
    # An entry is ``module:Class``.
    module, _, attribute = registry[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
