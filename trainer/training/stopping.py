"""Stop a training after the present step when a signal asks for it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):  # noqa: N818 - no error
    """Signal `number` has stopped the training at `place`, where its state is saved."""

    def __init__(self, number: signal.Signals, place: str) -> None:
        super().__init__(place)
        self.number = number
        self.place = place


class StopRequest:
    """Remember that a signal has asked the training to stop.

    SIGINT (Ctrl-C), SIGTERM and SIGUSR1 are remembered until the loop asks after its step; a second
    SIGINT interrupts at once. Only the main thread receives signals; elsewhere none are caught.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None

    def requested(self) -> bool:
        """Return whether a signal has arrived."""
        return self.number is not None

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Catch the signals inside a block."""
        # Python lets only the main thread set handlers.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._remember) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        # With a second Ctrl-C the user gives up the step, and what it would save.
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = signal.Signals(number)
