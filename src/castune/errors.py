"""Errors that the user can mend: one line that says what, where, what is accepted and what to do.

The command line prints them without a traceback and exits with code 2. Every other exception is a bug in
castune (or below it) and keeps its traceback.
"""


class CastuneError(ValueError):
    """Base of all errors caused by input: a file, a recipe, a model, a run directory."""


class UnsupportedArchitecture(CastuneError):
    """The attention heads of this model could not be located beyond doubt."""


class DataError(CastuneError):
    """A data source is missing, malformed, empty or lacks a column."""


class ArtifactError(CastuneError):
    """An artifact is missing, damaged, of another schema version, or was made from something else."""


class TrainingError(CastuneError):
    """Training cannot start or cannot go on."""


class CheckpointError(CastuneError):
    """A checkpoint of a training cannot be written; the one before it is kept."""


class CertificateError(CastuneError):
    """An adapter changes, or could change, something outside the selected heads."""


class MapUnfinished(CastuneError):
    """This process has done its share of a diagnosis; other shares are still missing."""
