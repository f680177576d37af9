"""Expected failures of the precomputation."""

from flsep.cache.errors import FlsepError


class SettingsError(FlsepError):
    """Options contradict each other, or a value cannot be used."""


class CorpusError(FlsepError):
    """A corpus is missing, or not laid out as expected."""


class MediaError(FlsepError):
    """An audio file is missing, damaged, or not of the expected rate, length or channels."""


class SignalError(FlsepError):
    """Audio cannot be turned into features: too short, too loud or not finite."""


class TrackError(FlsepError):
    """A track cannot be stored."""

    def __init__(self, track: str, reason: str) -> None:
        # Both as arguments: workers send the error back pickled, and it is rebuilt from them.
        super().__init__(track, reason)
        self.track = track
        self.reason = reason

    def __str__(self) -> str:
        """Return track and reason as one text."""
        return f"{self.track}: {self.reason}"


class TeacherError(FlsepError):
    """A teacher cannot be found, downloaded, built or used."""


class WorkerError(FlsepError):
    """Workers cannot be started or reached, or died on a task."""
