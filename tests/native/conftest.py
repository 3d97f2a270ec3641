"""The native library as it was built for the package under test."""

import os
from pathlib import Path

import pytest

from semisparse.native.loading import LIBRARY


@pytest.fixture(scope="session")
def library() -> Path:
    """launch.so; where it was not built, the test is skipped, unless the run says that it must be there."""
    if not LIBRARY.is_file():
        if os.environ.get("SEMISPARSE_REQUIRE_NATIVE") == "1":
            pytest.fail(f"{LIBRARY} is not there, and SEMISPARSE_REQUIRE_NATIVE is 1")
        pytest.skip("the native library was not built; SEMISPARSE_REQUIRE_NATIVE=1 makes this a failure")
    return LIBRARY
