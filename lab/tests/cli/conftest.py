"""One short training run of the command line, shared by the tests that only look at what it left."""

import pytest

from lab.tests.cli.shell import TINY, Trained, semisparse_lab


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("train") / "out" / "deeper"  # folders that are missing are made
    return Trained(folder, semisparse_lab("train", *TINY, "--out", folder))
