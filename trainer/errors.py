"""Expected failures of the trainer."""

from flsep.cache.errors import FlsepError


class DataError(FlsepError):
    """Shards that cannot be trained on as configured."""


class ScoringError(FlsepError):
    """A track that cannot be scored, or an engine that does not work on this machine."""


class EvaluationError(FlsepError):
    """Something that cannot be evaluated or compared."""


class ConfigError(FlsepError):
    """A setting that does not exist, or whose value cannot be used."""


class AudioError(FlsepError):
    """An audio file that cannot be read or written."""


class InferenceError(FlsepError):
    """A model that cannot be used on the given input, or as installed."""


class RunError(FlsepError):
    """A run folder that cannot be used as asked."""


class CheckpointError(FlsepError):
    """A checkpoint that is missing, damaged, too new, or of another shape."""


class NonFiniteLossError(FlsepError):
    """A loss or gradient that is NaN or infinite; the step was not taken."""


class ComparisonError(FlsepError):
    """Scores that cannot be compared."""


class LostProcessError(FlsepError):
    """A process of this training has died or given up."""
