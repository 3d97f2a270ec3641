"""The set-up of the library's tests, which the first import makes before anything can import Triton."""

from tests.conftest import poison, pytest_collection_modifyitems, seed

__all__ = ["poison", "pytest_collection_modifyitems", "seed"]
