"""Measure how much time each phase of the work takes."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


class Stopwatch(dict[str, float]):
    """Seconds by phase, such as ``decode`` or ``teacher``."""

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Add the time of a block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self[phase] = self.get(phase, 0.0) + time.perf_counter() - start

    def measure_each(self, phase: str, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items, and add the time that it takes to produce them to a phase."""
        iterator = iter(items)
        while True:
            with self.measure(phase):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def add(self, other: dict[str, float]) -> None:
        """Add the times of another stopwatch."""
        for phase, seconds in other.items():
            self[phase] = self.get(phase, 0.0) + seconds
