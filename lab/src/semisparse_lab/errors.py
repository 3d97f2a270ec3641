"""Errors of the lab: about files and folders. Settings raise semisparse.errors.ConfigError, as in the library."""

from semisparse import SemiSparseError


class DataError(SemiSparseError, ValueError):
    """A data file or data folder is missing, damaged or of another kind."""


class CheckpointError(SemiSparseError, RuntimeError):
    """A checkpoint is missing, damaged or belongs to another model."""


class OutputExistsError(SemiSparseError, RuntimeError):
    """An output folder already holds results and overwriting was not asked for."""
