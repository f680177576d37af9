"""Stop a training when a signal asks for it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(Exception):  # noqa: N818 - no error
    """The training was asked to stop by a signal, and has saved its state."""

    def __init__(self, number: signal.Signals, place: str) -> None:
        super().__init__(place)
        self.number = number
        self.place = place


class StopRequest:
    """Whether a signal asked the training to stop.

    SIGINT (Ctrl-C), SIGTERM and SIGUSR1 are noted, to be acted on after the step; a second SIGINT
    interrupts at once. Signals reach the main thread only; elsewhere none are caught.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None

    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.number is not None

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Note signals instead of dying of them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = signal.Signals(number)
