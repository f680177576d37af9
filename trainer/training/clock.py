"""How long training takes, and how long the device waits for data."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class WaitClock:
    """Measures each step, and the wait for its batch as the device sees it.

    On a GPU the wait lies between two CUDA events: one behind all work of the step before, one
    where the batch has arrived. What the host does in that time while the GPU still computes is no
    wait. On a processor it is the time that reading the batch blocks.

    Parameters
    ----------
    device : torch.device
        Where training computes.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._waited = 0.0
        self.start()

    def start(self) -> None:
        """Begin a step."""
        self._began = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Measure the wait for a batch."""
        began = time.perf_counter()
        if self._events:
            self._events[0].record()
        yield
        if self._events:
            self._events[1].record()
        self._waited = time.perf_counter() - began

    def lap(self) -> tuple[float, float]:
        """Return the seconds of this step, and those its batch was waited for.

        The device must have got as far as the batch: a step reads back its loss.
        """
        if self._events:
            self._waited = self._events[0].elapsed_time(self._events[1]) / 1000
        return time.perf_counter() - self._began, self._waited
