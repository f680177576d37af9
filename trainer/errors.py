"""What can be wrong with what a user gives the trainer."""


class DataError(ValueError):
    """Shards that cannot be trained on as configured."""


class ScoringError(ValueError):
    """A track, or the machine, with which museval cannot work."""


class EvaluationError(ValueError):
    """Something that cannot be evaluated or compared."""


class ConfigError(ValueError):
    """A setting that does not exist, or whose value cannot be used."""


class AudioError(ValueError):
    """An audio file that cannot be read or written."""


class InferenceError(ValueError):
    """A model that cannot be used on the given input, or as installed."""


class RunError(ValueError):
    """A run folder that cannot be used as asked."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, too new, or of another shape."""


class NonFiniteLossError(ValueError):
    """A loss or gradient that is NaN or infinite; the step was not taken."""


class ComparisonError(ValueError):
    """Scores that cannot be compared."""


class LostProcessError(ValueError):
    """A process of this training has died or given up."""
