"""Where the time goes."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")


class Stopwatch(dict[str, float]):
    """Seconds spent on each part of some work."""

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time of a block to one part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self[part] = self.get(part, 0.0) + time.perf_counter() - start

    def measure_each(self, part: str, items: Iterable[Item]) -> Iterator[Item]:
        """Pass items on, and add the time that it takes to make them to one part."""
        iterator = iter(items)
        while True:
            with self.measure(part):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def add(self, other: dict[str, float]) -> None:
        """Add what others have spent."""
        for part, seconds in other.items():
            self[part] = self.get(part, 0.0) + seconds
