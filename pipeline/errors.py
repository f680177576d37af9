"""What can be wrong with a corpus, a track or a teacher."""

from flsep.cache.errors import FlsepError


class TrackError(FlsepError):
    """A track that cannot be stored; the others go on."""


class MediaError(FlsepError):
    """An audio file that is missing, damaged, or not of the shape that was asked for."""


class TeacherError(FlsepError):
    """A teacher that cannot be found, downloaded, built or used."""


class CorpusError(FlsepError):
    """A corpus that is missing, or not laid out as expected."""


class SettingsError(FlsepError):
    """Options that contradict each other, or a value that cannot be used."""
