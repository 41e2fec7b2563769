"""Errors that the user can mend: one line that says what, where, what is accepted and what to do.

The command line prints them without a traceback and exits with code 2. Every other exception is a bug in
castune (or below it) and keeps its traceback, but for what memory and disks do (`of_the_machine`).
"""

import errno
import re

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
# A file where a directory should be, or the other way round.
_IN_THE_WAY = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR)


class CastuneError(ValueError):
    """Base of all errors caused by input: a file, a recipe, a model, a run directory."""


class UnsupportedArchitecture(CastuneError):
    """The attention heads of this model could not be located beyond doubt."""


class DataError(CastuneError):
    """A data source is missing, malformed, empty or lacks a column."""


class SourceUnreachable(DataError):
    """A data source is on the hub, which cannot be reached from here; nothing is wrong with its name."""


class ArtifactError(CastuneError):
    """An artifact is missing, damaged, of another schema version, or was made from something else."""


class TrainingError(CastuneError):
    """Training cannot start or cannot go on."""


class CheckpointError(CastuneError):
    """A checkpoint of a training cannot be written; the one before it is kept."""


class CertificateError(CastuneError):
    """An adapter changes, or could change, something outside the selected heads."""


class WeightsChanged(CastuneError):
    """The weights of a model are not what they were when a stage that only reads them began."""


class AdapterNotApplied(CastuneError):
    """A model does not compute with the adapter it was to be evaluated with."""


class NothingScored(CastuneError):
    """Not one example of a suite could be scored. Nothing is wrong with the input: the exit code is 1."""


class MapUnfinished(CastuneError):
    """This process has done its share of a diagnosis; other shares are still missing."""


def of_the_machine(error: Exception) -> str | None:
    """What to tell the user of an error that memory or a disk made; None of any other, which is a bug."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{str(error.filename)[:60]}...: this name is too long for the file system"
    if isinstance(error, OSError) and error.errno in _DISK:
        return (
            f"{error.filename or 'a file'} could not be written: {error.strerror}. Finished work is kept; run the same "
            "command again once there is space and permission"
        )
    if isinstance(error, OSError) and error.errno in _IN_THE_WAY:
        return f"{error.filename or 'a file'}: path already exists ({error.strerror}); remove it, or choose another"
    if isinstance(error, FileNotFoundError) and str(error.filename).startswith("/proc/"):
        return f"{error.filename}: nothing can be created in this file system; choose another path"
    # Writers below Python, and copies of whole directories, have errors of their own.
    if re.search("No space left on device|File too large|Read-only file system|Disk quota exceeded", str(error)):
        return (
            f"a file could not be written: {' '.join(str(error).split())[:200]}. Finished work is kept; run the same "
            "command again once there is space"
        )
    if isinstance(error, MemoryError) or re.search(
        "out of memory|can(?:'t|not) allocate memory|not enough memory", str(error), re.IGNORECASE
    ):
        return (
            "out of memory. Finished work is kept; run the same command again to continue. Smaller batches need less: "
            "diagnose.batch_tokens, evaluate.batch_tokens, tune.batch_size with more tune.accumulation, "
            "tune.gradient_checkpointing = true (options --batch-tokens, --batch-size, --accumulation, "
            "--gradient-checkpointing)"
        )
    return None
