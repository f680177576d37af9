"""Types of option values that click does not have."""

import json
from pathlib import Path
from typing import Any

import click

FOLDER = click.Path(path_type=Path, file_okay=True)

_SIZES = {"K": 10, "M": 20, "G": 30, "T": 40}


class Pair(click.ParamType):
    """Two numbers such as 1:8 or 2/4, between them the separator of the type."""

    def __init__(self, separator: str) -> None:
        self.name = f"number{separator}number"
        self._separator = separator

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """Return both numbers."""
        first, _, second = str(value).partition(self._separator)
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
        try:
            return key.replace("-", "_"), json.loads(text)
        except json.JSONDecodeError:
            return key.replace("-", "_"), text


class Size(click.ParamType):
    """A number of bytes such as 1G or 500M."""

    name = "size"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """Return the number of bytes."""
        text = str(value).upper().removesuffix("B").removesuffix("I")
        factor = 1 << _SIZES[text[-1]] if text and text[-1] in _SIZES else 1
        try:
            return int(float(text.rstrip("KMGT")) * factor)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is no size; write 500M or 1G", param, ctx)


class Names(click.ParamType):
    """Names separated by commas."""

    name = "names"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, ...]:
        """Return the names without surrounding spaces."""
        if isinstance(value, tuple):
            return value
        return tuple(name.strip() for name in value.split(",") if name.strip())
