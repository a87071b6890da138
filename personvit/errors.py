"""Exceptions of PersonViT.

Every message follows one rule: what failed, the value seen, the likely cause, and the next command to type.
"""

from __future__ import annotations


class PersonViTError(Exception):
    """Base of every error that a user can cause or cure. The command line prints it without a traceback."""

    exit_code: int = 1


class ConfigError(PersonViTError):
    """A configuration value or key is wrong, or two of them contradict each other."""

    exit_code = 2


class DataError(PersonViTError):
    """A data set, an image or a file list cannot be used."""

    exit_code = 3


class CheckpointError(PersonViTError):
    """A checkpoint cannot be written, read, or does not fit the model."""

    exit_code = 4


class RunFolderError(PersonViTError):
    """The run folder already holds a run and neither `--resume` nor `--overwrite` was given."""

    exit_code = 5


class BackendUnavailableError(PersonViTError):
    """A backend that was asked for by name cannot run here."""

    exit_code = 6


class NonFiniteError(PersonViTError):
    """Training stopped because too many steps in a row had a non-finite loss or gradient."""

    exit_code = 7


class UnsupportedInputError(PersonViTError, ValueError):
    """A kernel was asked for by name and cannot compute tensors of this shape, type or layout."""

    exit_code = 8


EXIT_INTERRUPTED = 75
"""Exit code after SIGTERM or SIGINT once the checkpoint is written: `EX_TEMPFAIL`, run again with `--resume auto`."""
