"""The packages that the integrations need, and the error if one is missing."""

from semisparse.errors import MissingPackageError

TESTED = {
    "accelerate": "1.15.0",
    "lightning": "2.6.6",
    "timm": "1.0.31",
    "torchtitan": "0.3.0",
    "transformers": "5.24.0",
}
"""Versions that the integrations were tried with."""


def missing(module: str, packages: str, error: ImportError) -> MissingPackageError:
    """The error to raise if the packages of an integration cannot be imported.

    Args:
        module: Of the integration, dotted.
        packages: What to give to pip.
        error: What the import raised.
    """
    return MissingPackageError(f"{module} cannot import what it needs ({error}): pip install {packages}")
