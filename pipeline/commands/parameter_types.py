"""Types of option values that click does not have."""

import json
from pathlib import Path
from typing import Any

import click

# Whether the path exists is not checked here: each command says what it expected to find there.
FOLDER = click.Path(path_type=Path, file_okay=True)

# Powers of two, for binary units: 1G is 2**30 bytes.
_SIZES = {"K": 10, "M": 20, "G": 30, "T": 40}


class Pair(click.ParamType):
    """Two numbers such as 1:8 or 2/4, between them the separator of the type."""

    def __init__(self, separator: str) -> None:
        self.name = f"number{separator}number"
        self._separator = separator

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """Return both numbers."""
        first, _, second = str(value).partition(self._separator)
        # Signs and spaces are no decimals. Bounds depend on the option and are checked where it is
        # used.
        if not (first.isdecimal() and second.isdecimal()):
            self.fail(f"{value!r}: write two numbers, such as 1{self._separator}8", param, ctx)
        return int(first), int(second)


class Setting(click.ParamType):
    """A setting KEY=VALUE; the value is parsed as JSON if possible, else taken as text."""

    name = "setting"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Any]:
        """Return key and value."""
        key, equals, text = str(value).partition("=")
        if not key or not equals:
            self.fail(f"{value!r}: write KEY=VALUE", param, ctx)
        # Keys become names of Python arguments. Text needs no quotes: walltime=08:00:00 is no JSON.
        try:
            return key.replace("-", "_"), json.loads(text)
        except json.JSONDecodeError:
            return key.replace("-", "_"), text


class Size(click.ParamType):
    """A number of bytes such as 1G or 500M."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Return the number of bytes."""
        # "1G", "1GB" and "1GiB" mean the same.
        text = str(value).upper().removesuffix("B").removesuffix("I")
        factor = 1 << _SIZES[text[-1]] if text and text[-1] in _SIZES else 1
        try:
            return int(float(text.rstrip("KMGT")) * factor)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is not a size; write, for example, 500M", param, ctx)


class Names(click.ParamType):
    """Names separated by commas."""

    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        """Return the names without surrounding spaces."""
        # click may pass a value that was converted already.
        if isinstance(value, tuple):
            return value
        return tuple(name.strip() for name in value.split(",") if name.strip())
