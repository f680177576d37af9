"""Measure how long training takes, and how long the device waits for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WaitClock:
    """Measure each batch, and how long the device waits for it.

    On a GPU the wait lies between two CUDA events: one after all work on the last batch, one when
    this batch has arrived. Work that the host does while the GPU still computes is no wait. On a
    CPU the wait is the time that reading the batch blocks.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._waited = 0.0
        self.start()

    def start(self) -> None:
        """Begin a batch."""
        self._began = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the wait for a batch."""
        began = time.perf_counter()
        if self._events:
            # The GPU passes this event when all work on the last batch is done.
            self._events[0].record()
        yield
        if self._events:
            self._events[1].record()
        self._waited = time.perf_counter() - began

    def lap(self) -> tuple[float, float]:
        """Return the seconds since `start`, and the seconds of them spent waiting.

        The device must have received the batch; it has when its loss has been read back.
        """
        if self._events:
            # elapsed_time is in milliseconds, and fails until the GPU has passed both events.
            self._waited = self._events[0].elapsed_time(self._events[1]) / 1000
        return time.perf_counter() - self._began, self._waited
