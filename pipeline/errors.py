"""What can be wrong with a corpus, a track or a teacher."""


class TrackError(ValueError):
    """A track that cannot be stored; the others go on."""


class MediaError(ValueError):
    """An audio file that is missing, damaged, or not of the shape that was asked for."""


class TeacherError(ValueError):
    """A teacher that cannot be found, downloaded, built or used."""
